"""The sender of a weight sync. Runs in the trainer."""

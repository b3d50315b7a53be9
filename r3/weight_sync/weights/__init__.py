"""The trainer's weights under the names of a checkpoint, materialised lazily. Runs in the trainer."""

"""The trainer's weights by the names of a checkpoint, made when their turn comes. Runs in the trainer."""

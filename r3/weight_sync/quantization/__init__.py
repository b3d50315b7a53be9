"""Weights in the form of an FP8 engine. Runs in the trainer."""

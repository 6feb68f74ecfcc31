"""Evaluation of an emulator: its use for training, and how much of the full model it gives away."""

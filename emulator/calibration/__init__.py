"""Calibration on public examples: hidden states and gradients at the middle of the full model, block by block."""

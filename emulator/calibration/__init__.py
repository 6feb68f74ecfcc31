"""Public examples at the middle of the full model: hidden states and gradients, block by block."""

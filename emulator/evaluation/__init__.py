"""How good an emulator is, and how much of the full model it gives away."""

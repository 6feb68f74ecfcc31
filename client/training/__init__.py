"""Local training on the emulator, with clipping and noise for each record."""

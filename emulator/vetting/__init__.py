"""What a site checks before it loads an emulator."""

"""Vetting: a site's checks of an emulator and its adapter before any training."""

"""The federation file as frozen dataclasses, checked at the door."""

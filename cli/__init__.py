"""The command `offsite`; the only room that prints."""

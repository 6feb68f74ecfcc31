"""The check of a federation before any work: every fault at once, in seconds, and nothing is written."""

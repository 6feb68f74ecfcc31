"""Experiments and their tables; nothing imports this room."""

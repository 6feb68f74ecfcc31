"""Adapter methods, the layout of an adapter as one vector, and adapter files."""

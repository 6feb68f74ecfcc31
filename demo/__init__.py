"""Demos with real models and data from package indexes."""

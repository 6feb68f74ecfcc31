"""Demos on real models and data that package indexes carry."""

"""Readers of records: tables, columns and image files."""

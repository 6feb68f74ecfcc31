"""Tasks: loading models, reading and encoding records, and per-example losses."""

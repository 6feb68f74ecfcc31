"""What a model is trained for: loading, encoding, per-example losses."""

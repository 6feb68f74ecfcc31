"""The wire: one schema, one codec, the job manifest."""

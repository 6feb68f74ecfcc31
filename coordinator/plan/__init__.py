"""What a job will need, computed from a model's configuration alone: bytes, memory, seconds, rounds and epsilon."""

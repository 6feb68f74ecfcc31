"""What is trained: adapter methods, their layout as a vector, their files."""

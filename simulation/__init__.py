"""A whole federation on one machine, with every real part in its place."""

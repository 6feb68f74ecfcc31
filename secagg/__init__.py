"""Secure aggregation: the coordinator learns the sum of at least `min_sites` updates and nothing else about them."""

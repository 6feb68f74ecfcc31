"""Secure aggregation: the coordinator learns the sum of at least m updates and nothing else of them."""

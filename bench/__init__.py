"""Benchmarks and their tables; no other room imports this one."""

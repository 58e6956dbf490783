"""Benchmarks: how fast patterns run, against dense attention and other libraries."""

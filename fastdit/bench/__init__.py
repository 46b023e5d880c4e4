"""Benchmarks: speed and quality, always beside dense attention of the same run."""

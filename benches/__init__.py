"""Benchmarks: speed and quality, always beside dense of the same run."""

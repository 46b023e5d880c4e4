"""The results of benchmarks: kept, compared, ranked and shown."""

"""What benchmarks measure: problems, settings, and calls that are captured or made up."""

"""How benchmarks measure: contenders, times, checks of what they compute, and what videos show."""

"""The kernel for CPUs."""

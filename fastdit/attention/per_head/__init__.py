"""A method for every head: plans as they run."""

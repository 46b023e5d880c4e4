"""Programs that make what comes with the package; none of them is installed with it."""

"""Running a pipeline: found, loaded, called, timed and written to a file, without a terminal."""

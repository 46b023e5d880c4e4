"""Measurements: contenders, times, verification of results, and comparison of videos."""

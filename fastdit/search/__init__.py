"""Offline search: the method and parameters of every layer and head, under a budget, kept in a plan file."""

"""Interception of the attention calls of a transformer, and its removal."""

"""Interception: how the attention calls of a transformer reach its runtime, and how that is taken back."""

"""Pipelines: the model families, the interception of their attention calls, step and branch tracking."""

from importlib import import_module

from .base import ModelFamily, find_family, list_families, register_family

FAMILIES = ("wan", "cogvideox", "hunyuan_video", "mochi", "ltx")

for _name in FAMILIES:
    import_module(f".{_name}", __name__)

__all__ = ["ModelFamily", "find_family", "list_families", "register_family"]

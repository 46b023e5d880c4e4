"""The methods, one file each; importing them registers them by name."""

from importlib import import_module

METHODS = ("dense", "radial", "draft", "adaspa", "paro", "sla", "sparse_vdit", "profiled")

for _name in METHODS:
    import_module(f".{_name}", __name__)

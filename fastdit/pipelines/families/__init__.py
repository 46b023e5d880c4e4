"""The model families, one file each; importing them registers them."""

from importlib import import_module

FAMILIES = ("wan", "cogvideox", "hunyuan_video", "mochi", "ltx")

for _name in FAMILIES:
    import_module(f".{_name}", __name__)

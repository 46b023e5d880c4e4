"""Model families, interception of attention calls, and tracking of steps and guidance branches."""

from importlib import import_module

from .families.family import ModelFamily, find_family, list_families, register_family

import_module(".families", __name__)  # registers them

__all__ = ["ModelFamily", "find_family", "list_families", "register_family"]

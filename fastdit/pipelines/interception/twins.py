"""Copies of modules in which some names are replaced."""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable
from typing import Any

_PREFIX = "_fastdit_rebound."
_OWN = ("__name__", "__spec__", "__loader__")


class Twin:
    """A copy of a module with some names replaced, which follows patches of the original.

    It is in ``sys.modules`` under its own name, because Dynamo looks names up there.

    Args:
        source: The original module.
        replaced: Replaced values by name; names that the original lacks are ignored.
    """

    def __init__(self, source: types.ModuleType, replaced: dict[str, Any]) -> None:
        self.source = source
        self.replaced = replaced
        self.module = types.ModuleType(_PREFIX + source.__name__)
        self._taken: set[str] = set()
        sys.modules[self.module.__name__] = self.module

    def refresh(self) -> None:
        """Adopt names that were patched, added or removed."""
        names, own = vars(self.source).copy(), vars(self.module)
        names.update((name, value) for name, value in self.replaced.items() if name in names)
        names.update((name, own[name]) for name in _OWN)
        if self._taken != names.keys() or not all(map(operator.is_, map(own.get, names), names.values())):
            own.update(names)
            for name in self._taken - names.keys():  # leave others alone: Dynamo stores compiled code there
                own.pop(name, None)
            self._taken = set(names)


def find_twin(source: types.ModuleType, replaced: Callable[[], dict[str, Any]]) -> Twin:
    """Return the up-to-date twin of a module.

    Args:
        source: The module.
        replaced: Returns the replaced values by name when the twin is created.
    """
    known = _TWINS.get(source.__name__)
    if known is None or known.source is not source:
        known = _TWINS[source.__name__] = Twin(source, replaced())
    known.refresh()
    return known


_TWINS: dict[str, Twin] = {}

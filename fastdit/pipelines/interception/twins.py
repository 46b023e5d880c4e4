"""Modules with the names of another, some of which mean something else."""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable
from typing import Any

_PREFIX = "_fastdit_rebound."
_OWN = ("__name__", "__spec__", "__loader__")


class Twin:
    """Module that has the names of another, some of which mean something else, and follows it when it is patched.

    Dynamo looks names up in ``sys.modules``, so it is there under a name of its own.

    Args:
        source: The other module.
        replaced: What means something else, by name; a name that the other module lacks stays unknown.
    """

    def __init__(self, source: types.ModuleType, replaced: dict[str, Any]) -> None:
        self.source = source
        self.replaced = replaced
        self.module = types.ModuleType(_PREFIX + source.__name__)
        self._taken: set[str] = set()
        sys.modules[self.module.__name__] = self.module

    def refresh(self) -> None:
        """Take over what has been patched, added or removed."""
        names, own = vars(self.source).copy(), vars(self.module)
        names.update((name, value) for name, value in self.replaced.items() if name in names)
        names.update((name, own[name]) for name in _OWN)
        if self._taken != names.keys() or not all(map(operator.is_, map(own.get, names), names.values())):
            own.update(names)
            for name in self._taken - names.keys():  # no others: Dynamo keeps what it compiles beside them
                own.pop(name, None)
            self._taken = set(names)


def find_twin(source: types.ModuleType, replaced: Callable[[], dict[str, Any]]) -> Twin:
    """Return the twin of a module, as the module is now.

    Args:
        source: The module.
        replaced: Makes what means something else, by name, when the twin is made.
    """
    known = _TWINS.get(source.__name__)
    if known is None or known.source is not source:
        known = _TWINS[source.__name__] = Twin(source, replaced())
    known.refresh()
    return known


_TWINS: dict[str, Twin] = {}

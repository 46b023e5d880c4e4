"""Attachment of fastdit's methods to diffusers pipelines, in any import order."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_CLASSES = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}
"""Pipeline classes by module."""


def attach() -> None:
    """Attach to the pipeline classes: now if their modules are imported, otherwise when they are."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _CLASSES:
        if sys.modules.get(name) is not None:
            _attach(importlib.import_module(name))  # waits if another thread is loading it


class _Finder(importlib.abc.MetaPathFinder, threading.local):
    """A finder that delegates to the other finders and attaches to modules when they are loaded."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _CLASSES or self._asking:
            return None
        self._asking = True  # other finders may ask all finders in turn
        try:
            spec = _find_elsewhere(self, fullname, path, target)
        finally:
            self._asking = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec


def _find_elsewhere(
    finder: _Finder, fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> importlib.machinery.ModuleSpec | None:
    for other in list(sys.meta_path):
        find = None if other is finder else getattr(other, "find_spec", None)
        spec = None if find is None else find(fullname, path, target)
        if spec is not None:
            return spec
    return None


class _Loader(importlib.abc.Loader):
    """A loader that wraps a module's own loader, which other modules may share, and attaches to the module.

    Args:
        loader: The loader of the module.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _attach(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _attach(module: ModuleType) -> None:
    pipeline: Any = getattr(module, _CLASSES[module.__name__], None)
    if pipeline is None:
        return  # the module that imports fastdit is still loading
    pipeline.enable_sparse_attention = _enable
    pipeline.disable_sparse_attention = _disable
    pipeline.sparse_attention = property(_handle)


def _enable(self: Any, method: Any = None, **options: Any) -> Any:
    """Run the video self-attention of this pipeline sparse: see ``fastdit.enable_sparse_attention``."""
    from .api import enable_sparse_attention

    return enable_sparse_attention(self, method, **options)


def _disable(self: Any) -> None:
    """Restore the original attention exactly: see ``fastdit.disable_sparse_attention``."""
    from .api import disable_sparse_attention

    disable_sparse_attention(self)


def _handle(self: Any) -> Any:
    """Return the ``SparseAttention`` handle, or ``None`` if it is not enabled."""
    from .api import find_sparse_attention

    return find_sparse_attention(self)

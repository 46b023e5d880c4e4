"""Give diffusers pipelines the methods of fastdit, whichever of the two is imported first."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_MODULE = "diffusers.pipelines.pipeline_utils"


def attach() -> None:
    """Attach to ``DiffusionPipeline`` now if diffusers is imported already, else as soon as it is."""
    module = sys.modules.get(_MODULE)
    if module is not None and hasattr(module, "DiffusionPipeline"):
        _attach(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _attach(module)

            spec.loader.exec_module = exec_module
        return spec


def _attach(module: ModuleType) -> None:
    pipeline: Any = module.DiffusionPipeline
    pipeline.enable_sparse_attention = _enable
    pipeline.disable_sparse_attention = _disable
    pipeline.sparse_attention = property(_handle)


def _enable(self: Any, method: Any = None, **options: Any) -> Any:
    """Run the video self-attention of this pipeline sparse: see ``fastdit.enable_sparse_attention``."""
    from .api import enable_sparse_attention

    return enable_sparse_attention(self, method, **options)


def _disable(self: Any) -> None:
    """Restore the stock attention exactly: see ``fastdit.disable_sparse_attention``."""
    from .api import disable_sparse_attention

    disable_sparse_attention(self)


def _handle(self: Any) -> Any:
    """Return the ``SparseAttention`` handle, ``None`` where it is not enabled."""
    from .api import find_sparse_attention

    return find_sparse_attention(self)

"""Record of the changes made to a transformer."""

from __future__ import annotations

import copy
from typing import Any

from torch.nn import Module

from ..runtime import Runtime
from .rebind import follow_patches

ATTRIBUTE = "_fastdit"


class Installation:
    """The changes made to a transformer, for their removal.

    Args:
        runtime: Its runtime.
        replaced: The attention modules, with their original and rebound processors.
        handles: The hooks.
        parameters: Names of the arguments of its forward.
    """

    def __init__(
        self, runtime: Runtime, replaced: list[tuple[Module, Any, Any]], handles: list[Any], parameters: list[str]
    ) -> None:
        self.runtime = runtime
        self.replaced = replaced
        self.handles = handles
        self.parameters = parameters
        self.listener: Any = None
        self.owner: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Installation:
        copies = (copy.deepcopy(value, memo) for value in (self.runtime, self.replaced, self.handles))
        copied = Installation(*copies, list(self.parameters))
        copied.listener = self.listener
        return copied

    def __reduce__(self) -> Any:
        return _nothing, ()

    def check(self) -> None:
        """Check that the processors are still installed, and adopt patched functions.

        Raises:
            RuntimeError: A processor was replaced, or its ``__call__`` patched.
        """
        for (module, _, rebound), layer in zip(self.replaced, self.runtime.layers, strict=True):
            if module.processor is not rebound:
                raise RuntimeError(
                    f"the attention processor of {layer.name} was replaced by {type(module.processor).__name__} after "
                    "sparse attention was enabled (fuse_qkv_projections() and set_attn_processor() do that): change "
                    "processors first, then call enable_sparse_attention() again"
                )
        follow_patches(rebound for _, _, rebound in self.replaced)


def _nothing() -> None:
    return None


def installed(transformer: Module) -> Installation | None:
    """Return the installation of a transformer, or ``None``.

    Args:
        transformer: The model.
    """
    return transformer.__dict__.get(ATTRIBUTE)

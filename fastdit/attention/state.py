"""Memory of methods and cache of patterns between calls, owned by the handle."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.weak import WeakIdKeyDictionary

from ..mask import BlockMask
from ..tokens import AttentionCall, TokenSpec
from .kernels.dispatch import low_precision_reason

if TYPE_CHECKING:
    from .pattern import Pattern


Entry = TypeVar("Entry")


@dataclass
class PatternCache:
    """A cache of what depends on the token layout alone, such as static patterns.

    Threads may share it: what is missing is built by one of them while the others wait. A copy of it starts empty.

    Args:
        limit: How many entries are kept, the latest ones, at least 1; ``None``: all of them.
        lock: Held while something is looked up or built; building may look up other entries. Caches that are in each
            other share one.
        entries: What is kept, by key, the latest last.
        shortened: Masks without padding, by the mask that has it and the padding, ``(B, S)`` bool, for as long as both
            live. Guidance passes have paddings of their own.
    """

    limit: int | None = 32
    lock: AbstractContextManager[Any] = field(default_factory=RLock, repr=False, compare=False)
    entries: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict)
    shortened: WeakKeyDictionary[BlockMask, WeakIdKeyDictionary] = field(default_factory=WeakKeyDictionary)

    def static(self, key: Hashable, build: Callable[[], Entry]) -> Entry:
        """Return what is stored under a key, building it at the first call.

        Args:
            key: Names the entry; everything that it depends on.
            build: Makes the entry.
        """
        with self.lock:
            if key not in self.entries:
                with torch.inference_mode(False):  # later calls may want gradients
                    self.entries[key] = build()
                while self.limit is not None and len(self.entries) > self.limit:
                    self.entries.popitem(last=False)
            self.entries.move_to_end(key)
            return self.entries[key]

    def without_padding(self, pattern: Pattern, padding: Tensor) -> BlockMask:
        """Return a pattern's mask with padding taken out, computed once for each mask and padding.

        Padded keys are not attended to, and padded queries do not count.

        Args:
            pattern: The pattern.
            padding: ``(B, S)`` bool, True where a token is padding; as long as it stays the same, the same tensor
                object.
        """
        with self.lock:
            known = self.shortened.setdefault(pattern.mask, WeakIdKeyDictionary())
            if padding not in known:
                mask, lengths = pattern.mask, pattern.layout.lengths_without
                with torch.inference_mode(False):
                    known[padding] = mask.shortened(lengths(padding, mask.block_q), lengths(padding, mask.block_k))
            return known[padding]

    def clear(self) -> None:
        """Forget everything."""
        with self.lock:
            self.entries.clear()
            self.shortened.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit,)  # a lock cannot be copied, and what is kept can be built again


@dataclass
class MethodState:
    """The memory of one layer in one guidance branch between denoising steps.

    Args:
        cache: Static patterns, shared by all layers.
        kernel: Name of the kernel to use; ``None`` chooses.
        precision: ``"int8"`` or ``"int8_fp8"`` for products in low precision; ``None`` for the precision of the inputs.
        excuse: Takes the reason why a call had better not run in that precision, and it then does not. The handle sets
            it; by default there are no excuses: it runs, or the kernel raises.
        weights: What the layer learns, as ``make_weights`` of the method made it; ``None`` outside of a model.
        measure: Runs a part of a call and takes its time: name of the part (``"choice"`` of blocks, ``"order"`` of
            tokens), device, function. The handle sets it; by default nothing is measured.
        refresh: Whether a dynamic pattern is to be rebuilt in this call. The handle sets it from the schedule.
        pattern: The dynamic pattern of the latest rebuild.
        tokens: The token spec that it was built for.
        batch: Samples that it was built for; ``None`` where it serves any number.
        memory: Whatever else a method wants to keep.
        kept: Fraction of (query, key) pairs of the latest call, 0-d fp32 tensor; ``None`` before the first.
    """

    cache: PatternCache = field(default_factory=PatternCache)
    kernel: str | None = None
    precision: str | None = None
    excuse: Callable[[str], object] | None = None
    weights: Module | None = None
    measure: Callable[[str, torch.device, Callable[[], Any]], Any] = lambda part, device, run: run()
    refresh: bool = True
    pattern: Pattern | None = None
    tokens: TokenSpec | None = None
    batch: int | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    kept: Tensor | None = None

    def mask(self, pattern: Pattern, call: AttentionCall) -> BlockMask:
        """Return the mask a kernel shall run for a call, padded keys taken out.

        Args:
            pattern: The pattern of the call.
            call: The call.
        """
        if call.key_padding is None:
            return pattern.mask
        return self.cache.without_padding(pattern, call.key_padding)

    def precision_of(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, compensate: str | None = None
    ) -> str | None:
        """Return the precision a kernel shall run a call in, ``None`` for that of the inputs.

        Args:
            q: ``(B, H, S, D)`` queries.
            k: ``(B, H, S, D)`` keys.
            v: ``(B, H, S, D)`` values.
            mask: The blocks.
            compensate: Compensation of skipped blocks, ``"mean"`` or ``None``.
        """
        if self.precision is None or self.excuse is None:
            return self.precision
        reason = low_precision_reason(q, k, v, mask, self.kernel, compensate=compensate, precision=self.precision)
        if reason is None:
            return self.precision
        self.excuse(reason)
        return None

    def forget_pattern(self) -> None:
        """Forget the pattern, and those of groups of heads; what else a method has learned from the run stays."""
        self.pattern = None
        for each in self.memory.values():
            forget = getattr(each, "forget_pattern", None)
            if forget is not None:
                forget()

    def reset(self) -> None:
        """Forget the run: pattern and memory."""
        self.pattern = None
        self.memory.clear()

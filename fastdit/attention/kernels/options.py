"""Options of a kernel call besides its tensors and its mask."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

COMPENSATIONS = ("mean",)
PRECISIONS = ("int8", "int8_fp8")
VARIANTS = ("loads", "tma", "warps")

INT8_MAX = 127
E4M3_MAX = 448


@dataclass(frozen=True, eq=False)
class Options:
    """Options of a kernel call.

    Args:
        scale: Softmax scale, finite.
        compensate: What replaces blocks that are not listed: one of ``COMPENSATIONS``, or ``None``.
        precision: Of the products: one of ``PRECISIONS``, or ``None`` for that of the inputs.
        variant: How a kernel of several variants reads full blocks, for tests and tuning: ``"loads"``: every thread
            copies its part; ``"tma"``: by tensor descriptors; ``"warps"``: likewise, by warps that do nothing else.
            Or ``None`` for what its table says.
        index: ``(1 or H, n)`` int64: the token at each position of the mask's sequence, -1 for padding, by which the
            kernel gathers tokens itself; ``None`` if they are in the order of the mask.

    Raises:
        ValueError: A value is not among these.
    """

    scale: float
    compensate: str | None = None
    precision: str | None = None
    variant: str | None = None
    index: Tensor | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, got {self.scale}; leave it out for D ** -0.5")
        if self.compensate not in (None, *COMPENSATIONS):
            raise ValueError(f"unknown compensate {self.compensate!r}; there are: {', '.join(COMPENSATIONS)}, or None")
        if self.precision not in (None, *PRECISIONS):
            raise ValueError(f"unknown precision {self.precision!r}; precisions are: {', '.join(PRECISIONS)}, or None")
        if self.variant not in (None, *VARIANTS):
            raise ValueError(f"unknown variant {self.variant!r}; variants are: {', '.join(VARIANTS)}, or None")

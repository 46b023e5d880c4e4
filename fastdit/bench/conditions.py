"""What holds for all measurements of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .report.result_store import Row


@dataclass(frozen=True)
class Conditions:
    """The device, the dtype and the seed of a run, and its results.

    Args:
        output: File of results.
        seed: Random seed.
        device: Device that is measured.
        dtype: Dtype of weights and tensors.
        rows: Rows of earlier runs that this one resumes.
    """

    output: Path
    seed: int
    device: str
    dtype: torch.dtype
    rows: Sequence[Row] = ()

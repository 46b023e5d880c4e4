"""What the user asked of sparse attention."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import as_input_error

if TYPE_CHECKING:
    from ..api import SparseAttention
    from ..plans.plan import Plan


@dataclass(frozen=True)
class Settings:
    """Hold the arguments of ``enable_sparse_attention``.

    Args:
        method: Name of a method, or a plan; ``None`` takes the best known method for the model.
        fields: Fields of the method.
        schedule: Fields of ``Schedule`` that differ from the plan's or the model's own.
        kernel: Name of a kernel; ``None`` chooses.
        precision: Low precision of products; ``None`` for that of the model.
    """

    method: str | Plan | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    kernel: str | None = None
    precision: str | None = None

    def files(self) -> Iterator[tuple[str, Path]]:
        """Yield the files that fields of the method name, and the option that said so."""
        for name, value in self.fields.items():
            if isinstance(value, str) and os.path.exists(value):
                yield f"--set {name}", Path(value)

    def enable(self, pipeline: Any) -> SparseAttention:
        """Make the self-attention of a pipeline sparse.

        Args:
            pipeline: The pipeline.

        Raises:
            InputError: The model is not supported, or a value does not suit it.
        """
        from ..api import enable_sparse_attention
        from ..defaults import choose

        how = {"kernel": self.kernel, "precision": self.precision}
        with as_input_error():
            schedule = replace(choose(pipeline, self.method, **self.fields).schedule, **self.schedule)
            return enable_sparse_attention(pipeline, self.method, schedule=schedule, **how, **self.fields)

"""Observation of the self-attention calls of a running pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from torch.nn import Module

from ..attention import MethodState
from ..attention.methods.dense import Dense
from ..schedule import Schedule
from ..tokens import AttentionCall
from .families.family import find_family
from .interception.install import check_modules, install, uninstall
from .interception.installation import installed
from .run_tracker import RunTracker
from .runtime import Runtime, Settings
from .targets import require_transformers


class ObservedCall(NamedTuple):
    """A self-attention call and its dense output.

    Args:
        title: Name of the transformer in the pipeline.
        q: ``(B, H, S, D)`` queries, after normalisation and rotary embedding.
        k: ``(B, H, S, D)`` keys, likewise.
        v: ``(B, H, S, D)`` values.
        out: ``(B, H, S, D)`` output of dense attention.
        call: The call.
    """

    title: str
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    call: AttentionCall


@contextmanager
def observe(
    pipeline: Any, callback: Callable[[ObservedCall], Tensor | None], *, schedule: Schedule | None = None
) -> Iterator[list[tuple[Module, Runtime]]]:
    """Call back for the self-attention calls that a pipeline makes within a ``with`` block.

    The model goes on with the dense output, or with a tensor that the callback returns. An exception of the callback
    ends the run.

    Args:
        pipeline: A diffusers pipeline or a transformer, on which sparse attention is not enabled.
        callback: Receives each call as it is made.
        schedule: The calls it keeps dense are not observed; default: all calls are observed.

    Returns:
        The transformers and their runtimes.

    Raises:
        ValueError: Sparse attention is enabled, or the model is of no known family.
        RuntimeError: The attention processors of the model cannot be intercepted.
    """
    transformers = require_transformers(pipeline)
    if any(installed(transformer) is not None for transformer in transformers.values()):
        raise ValueError("sparse attention is enabled on this pipeline; call disable_sparse_attention() first")
    tracker = RunTracker(pipeline)
    observed = []
    try:
        for title, transformer in transformers.items():
            family = find_family(transformer)
            modules = family.self_attentions(transformer)
            check_modules(transformer, family, modules)
            settings = Settings(_Observer(title=title, callback=callback), Schedule() if schedule is None else schedule)
            runtime = Runtime(family, settings, tracker, [path for path, _ in modules], title)
            install(transformer, runtime, modules)
            observed.append((transformer, runtime))
        yield observed
    finally:
        for transformer in transformers.values():
            uninstall(transformer)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Observer(Dense):
    stock: ClassVar[bool] = False

    title: str
    callback: Callable[[ObservedCall], Tensor | None]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState) -> Tensor:
        out = super().forward(q, k, v, call, state)
        instead = self.callback(ObservedCall(self.title, q, k, v, out, call))
        return out if instead is None else instead

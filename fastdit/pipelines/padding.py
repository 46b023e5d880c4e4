"""Conversion of attention masks to key padding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tokens import TokenSpec


class Answer(NamedTuple):
    """The meaning of a mask.

    Args:
        padding: ``(B, S)`` bool, True where a key is padding; ``None`` if there is none.
        objection: Why no block pattern can implement the mask; ``None`` if one can.
    """

    padding: Tensor | None = None
    objection: str | None = None


class PaddingReader:
    """A converter of attention masks: once per forward pass, or once per video if the source of the mask is known.

    Reading the values of a mask synchronises with a GPU.
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._answer = Answer()
        self._known: dict[tuple[str, torch.device], tuple[Tensor, Any, Answer]] = {}

    def read(self, mask: Any, tokens: TokenSpec, batch: int, branch: str, source: Any = None) -> Answer:
        """Return the meaning of a mask; for an unchanged source, the same tensor per device.

        In inference mode tensors have no version counter, so a mask is read once per forward pass.

        Args:
            mask: What the model passes to its attention call: ``None``, a tensor, or anything else.
            tokens: Make-up of the sequence.
            batch: Samples.
            branch: The guidance pass.
            source: The tensor that the model derives its mask from, if known; pipelines reuse it from step to step.
        """
        if mask is None:
            return Answer()
        if not isinstance(mask, Tensor):
            return Answer(objection=f"the model passes a {type(mask).__name__} of its own")
        if self._mask is not None and _same(mask, self._mask):
            return self._answer
        if source is None or source.is_inference():
            answer = _convert(mask, tokens, batch)
        else:
            answer = self._of_source(mask, tokens, batch, branch, source)
        self._mask, self._answer = mask, answer
        return answer

    def _of_source(self, mask: Tensor, tokens: TokenSpec, batch: int, branch: str, source: Tensor) -> Answer:
        place, version = (branch, mask.device), (source._version, tokens, tuple(mask.shape), batch)
        known = self._known.get(place)
        if known is None or known[0] is not source or known[1] != version:
            known = self._known[place] = (source, version, _convert(mask, tokens, batch))
        return known[2]

    def end_forward(self) -> None:
        """Drop the mask of the forward pass that has ended."""
        self._mask = None
        self._answer = Answer()

    def clear(self) -> None:
        """Clear all memory."""
        self.end_forward()
        self._known.clear()


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.device == b.device and a.shape == b.shape and a.dtype == b.dtype
    )


def _convert(mask: Tensor, tokens: TokenSpec, batch: int) -> Answer:
    if mask.dtype != torch.bool:
        return Answer(objection=f"the model passes an additive {str(mask.dtype).removeprefix('torch.')} mask")
    shape = tuple(mask.shape)
    if mask.ndim == 4 and shape[1:3] == (1, 1):
        mask = mask[:, 0, 0]
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != tokens.num_tokens:
        return Answer(objection=f"the model passes a mask of shape {shape}, not one key padding per sample")
    padding = ~mask.expand(batch, -1)
    text = padding[:, tokens.text]
    if not bool(padding.any()):
        return Answer()
    if bool(padding[:, tokens.video].any()):
        return Answer(objection="the model masks video tokens")
    if bool((text[:, :-1] & ~text[:, 1:]).any()):
        return Answer(objection="the model masks text tokens that are not at the end of the text")
    return Answer(padding)

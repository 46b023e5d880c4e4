"""Read the mask of an attention call: which keys are padding, or why no block pattern can honour it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens import TokenSpec

_Answer = tuple[Tensor | None, str | None]


class PaddingReader:
    """Turn attention masks into key padding, once per forward pass, checking their values once per run and branch.

    On a GPU looking at the values waits for the device, which is why they are checked so rarely.
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._answer: _Answer = (None, None)
        self._checked: dict[Any, str | None] = {}
        self._run = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> PaddingReader:
        return PaddingReader()

    def read(self, mask: Any, tokens: TokenSpec, batch: int, run: int, branch: str) -> _Answer:
        """Return ``(B, S)`` bool key padding or ``None``, and the reason why the mask cannot be honoured or ``None``.

        Args:
            mask: What the model passes to its attention call: ``None``, a tensor, or anything else.
            tokens: What the sequence is made up of.
            batch: Samples.
            run: Number of the video.
            branch: The guidance pass.
        """
        if mask is None:
            return None, None
        if not isinstance(mask, Tensor):
            return None, f"the model passes a {type(mask).__name__} of its own"
        if self._mask is None or not _same(mask, self._mask):
            self._answer = self._convert(mask, tokens, batch, run, branch)
            self._mask = mask
        return self._answer

    def forget(self) -> None:
        """Drop the mask of the forward pass that has ended."""
        self._mask = None
        self._answer = (None, None)

    def _convert(self, mask: Tensor, tokens: TokenSpec, batch: int, run: int, branch: str) -> _Answer:
        if mask.dtype != torch.bool:
            return None, f"the model passes an additive {str(mask.dtype).removeprefix('torch.')} mask"
        shape = tuple(mask.shape)
        if mask.ndim == 4 and shape[1:3] == (1, 1):
            mask = mask[:, 0, 0]
        if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != tokens.num_tokens:
            return None, f"the model passes a mask of shape {shape}, not one key padding per sample"
        padding = ~mask.expand(batch, -1)
        if run != self._run:
            self._checked.clear()
            self._run = run
        key = (branch, shape, tokens)
        if key not in self._checked:
            self._checked[key] = _objection(padding, tokens)
        reason = self._checked[key]
        return (None, reason) if reason is not None else (padding, None)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype)


def _objection(padding: Tensor, tokens: TokenSpec) -> str | None:
    text = padding[:, tokens.text]
    if bool(padding[:, tokens.video].any()):
        return "the model masks video tokens"
    if bool((text[:, :-1] & ~text[:, 1:]).any()):
        return "the model masks text tokens that are not at the end of the text"
    return None

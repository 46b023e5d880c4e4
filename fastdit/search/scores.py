"""Scores of candidates and their files, one for each prompt and seed."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PlainValidator, TypeAdapter, ValidationError
from torch import Tensor

from ..files import moved_when_complete
from ..tokens import AttentionCall, TokenSpec
from ..validation import describe_error

VERSION = 2
DIGITS = 9
"""Significant digits in a file, enough for every fp32 number."""

Floats = Annotated[NDArray[np.float32], PlainValidator(lambda rows: np.array(rows, np.float32))]


@dataclass(frozen=True)
class Shape:
    """The sizes of the attention calls of a transformer.

    Args:
        layers: Self-attention layers, at least 1.
        heads: Heads of a layer, at least 1.
        head_dim: Channels of a head, at least 1.
        batch: Samples in a call: 2 where guidance is batched.
        tokens: What a sequence is made up of.
        dtype: Name of the dtype, such as ``"bfloat16"``.
        device: Name of the device.
    """

    layers: int
    heads: int
    head_dim: int
    batch: int
    tokens: TokenSpec
    dtype: str
    device: str

    @classmethod
    def of(cls, q: Tensor, call: AttentionCall) -> Shape:
        """Return the sizes of a call.

        Args:
            q: ``(B, H, S, D)`` queries.
            call: The call.
        """
        batch, heads, _, dim = q.shape
        dtype = str(q.dtype).removeprefix("torch.")
        return cls(call.num_layers, heads, dim, batch, call.tokens, dtype, str(q.device))


@dataclass(frozen=True, eq=False)
class CallScores:
    """The scores of all candidates at one attention call: arrays ``(candidates, heads)`` fp32, dense first.

    Args:
        title: The transformer.
        step: Index of the denoising step.
        branch: The guidance pass.
        layer: Index of the layer.
        error: Norm of a head's error after the output projection, over the norm of the layer's output; at least 0.
        head_error: Norm of a head's error before it, over the norm of the head's output; at least 0.
        recall: Attention mass covered, in [0, 1]; NaN where the result is not that of a pattern.
        density: Fraction of pairs computed, in [0, 1].
        mass: ``(heads, frames)`` of dense attention on video tokens of the same frame, one frame apart, and so on.
    """

    title: str
    step: int
    branch: str
    layer: int
    error: Floats
    head_error: Floats
    recall: Floats
    density: Floats
    mass: Floats

    def layer_error(self, candidate: int) -> float:
        """Return the relative error of the layer's output if all heads take a candidate, as if heads erred apart.

        Args:
            candidate: Index of the candidate.
        """
        return float(np.sqrt(np.square(self.error[candidate], dtype=np.float64).sum()))

    def typical_candidate(self) -> int | None:
        """Return the candidate of the median error among those that leave something out; ``None`` if none does."""
        sparse = np.flatnonzero(self.density.mean(1) < 1)
        errors = sorted((self.layer_error(int(index)), int(index)) for index in sparse)
        errors = [pair for pair in errors if 0 < pair[0] < math.inf]
        return errors[len(errors) // 2][1] if errors else None


@dataclass(frozen=True)
class Change:
    """The change of a transformer's output that a single sparse layer makes.

    Args:
        title: The transformer.
        step: Index of the denoising step.
        branch: The guidance pass.
        layer: Index of the layer.
        candidate: Index of the candidate that it ran with.
        error: Relative error of the layer's output, as its scores say.
        change: Relative L2 change of the transformer's output.
    """

    title: str
    step: int
    branch: str
    layer: int
    candidate: int
    error: float
    change: float


@dataclass
class Scores:
    """The scores of one video.

    Args:
        calls: The attention calls that were scored.
        changes: What single sparse layers changed.
        shapes: The sizes of each transformer's calls.
        steps: The steps at which each transformer ran.
        num_steps: Steps of the run; ``None`` before the first.
        seconds: Time of the forward passes in which nothing was scored.
        attention_seconds: Time of the self-attention in them.
    """

    calls: list[CallScores] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    steps: dict[str, list[int]] = field(default_factory=dict)
    num_steps: int | None = None
    seconds: float = 0.0
    attention_seconds: float = 0.0

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Write a file, under another name until it is complete.

        Args:
            path: The file.
            settings: What the scores depend on, as JSON values.
        """
        content = {"version": VERSION, "settings": settings, **asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with moved_when_complete(path) as part:
            part.write_text(json.dumps(content, allow_nan=False, default=_plain), encoding="utf-8")

    @classmethod
    def load(cls, path: Path, settings: Mapping[str, Any]) -> Scores | None:
        """Read a file; return ``None`` if it is missing, damaged, which is warned of, or of other settings.

        Args:
            path: The file.
            settings: What the scores must depend on.
        """
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
            if content["version"] != VERSION or content["settings"] != json.loads(json.dumps(settings)):
                return None
            return TypeAdapter(cls).validate_json(text, strict=True)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = describe_error(error) if isinstance(error, ValidationError) else repr(error)
            warnings.warn(f"the scores in {path} cannot be used and are taken again: {fault}", stacklevel=2)
            return None


def digest(settings: Mapping[str, Any]) -> str:
    """Return a short name for settings: 16 hexadecimal digits of their SHA-256.

    Args:
        settings: JSON values.
    """
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(values: Floats) -> list[list[float | None]]:
    # JSON has neither NaN nor infinity; an error that is no number comes back as NaN, and its candidate is not used
    return [[float(f"{x:.{DIGITS}g}") if math.isfinite(x) else None for x in row] for row in values.tolist()]

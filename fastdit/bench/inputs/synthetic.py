"""Synthetic queries, keys and values that attend like heads of video models, seeded and as sparse as real heads.

Scores are sums of a few terms: nearness along axes of the video, as rotary embedding makes it, membership in moving
clusters, keys that every query looks at, text, and noise. A head is a row of ``KINDS``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention import MethodState, get_method
from ...metrics import relative_l2
from ...tokens import AttentionCall, TokenSpec


@dataclass(frozen=True)
class Kind:
    """The terms of a head's scores; each number is the height of a term in units of the logit.

    Args:
        text: What the head does, for reports.
        near: Nearness in (time, height, width); 0 ignores an axis.
        width: How far "near" reaches along each axis, in tokens, above 0.
        shift: By how many tokens the keys looked at lie behind the query, on each axis.
        cluster: Of queries and keys of the same cluster.
        stripe: Of the few keys that all queries look at.
        text_sink: Of text keys.
        noise: Standard deviation of what has no structure.
    """

    text: str
    near: tuple[float, float, float] = (0.0, 0.0, 0.0)
    width: tuple[float, float, float] = (1.5, 2.0, 2.0)
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    cluster: float = 0.0
    stripe: float = 0.0
    text_sink: float = 0.0
    noise: float = 1.0


KINDS: dict[str, Kind] = {
    "decay": Kind("near in space and time, fading with distance", near=(3.0, 4.0, 4.0)),
    "temporal": Kind("the same place in all frames: diagonals of the map", near=(0.0, 6.0, 6.0)),
    "spatial": Kind("the same frame", near=(9.0, 1.0, 1.0), width=(0.8, 3.0, 3.0)),
    "row": Kind("the same row of every frame", near=(0.0, 9.0, 0.0), width=(1.0, 0.8, 1.0)),
    "column": Kind("the same column of every frame", near=(0.0, 0.0, 9.0), width=(1.0, 1.0, 0.8)),
    "motion": Kind("what lies behind along a motion: shifted diagonals", near=(4.0, 4.0, 4.0), shift=(1.0, 2.0, 3.0)),
    "stripes": Kind("a few keys that every query looks at", near=(1.0, 1.0, 1.0), stripe=7.0),
    "clusters": Kind("things that move through the video", near=(0.5, 0.5, 0.5), cluster=8.0),
    "text": Kind("text and the neighbourhood", near=(3.0, 3.0, 3.0), text_sink=8.0),
}
CLUSTERS = 12
STRIPES = 0.03
"""Fraction of the video tokens that are looked at by all."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One attention call with its tensors.

    Args:
        name: Where it comes from.
        q: ``(B, H, S, D)`` queries.
        k: ``(B, H, S, D)`` keys.
        v: ``(B, H, S, D)`` values.
        call: The call.
        kinds: The kind of each head; empty if unknown.
    """

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    call: AttentionCall
    kinds: tuple[str, ...] = ()

    def dense(self) -> Tensor:
        """Attend to everything but padding: ``(B, H, S, D)``."""
        return get_method("dense").forward(self.q, self.k, self.v, self.call, MethodState())

    def errors(self, out: Tensor, dense: Tensor) -> list[float]:
        """Return the relative L2 error of each head, over the queries that are no padding.

        Args:
            out: ``(B, H, S, D)``, what is measured.
            dense: ``(B, H, S, D)``, what it should be.
        """
        padding = self.call.key_padding
        rows = slice(None) if padding is None else ~padding
        return [float(relative_l2(out[:, head][rows], dense[:, head][rows])) for head in range(out.shape[1])]


def synthetic(
    tokens: TokenSpec,
    *,
    head_dim: int = 64,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Sample:
    """Make one call with a head of each kind.

    Args:
        tokens: The token spec of the sequence.
        head_dim: Channels of a head, at least 32.
        kinds: Names in ``KINDS``, one for each head; default: all, ``"text"`` only where there is text.
        seed: Random seed.
        dtype: Dtype of the tensors.
        device: Their device.

    Raises:
        ValueError: ``head_dim`` is smaller than 32.
    """
    if head_dim < 32:
        raise ValueError(f"synthetic heads need at least 32 channels, got {head_dim}")
    if kinds is None:
        kinds = [kind for kind in KINDS if kind != "text" or tokens.text_tokens]
    heads = [_head(KINDS[kind], tokens, head_dim, seed * 1000 + i) for i, kind in enumerate(kinds)]
    q, k, v = (torch.stack(x)[None].to(device=device, dtype=dtype) for x in zip(*heads, strict=True))
    return Sample("synthetic", q, k, v, AttentionCall(tokens, num_steps=1), tuple(kinds))


def _head(kind: Kind, tokens: TokenSpec, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    grid = tokens.grid
    axes = (torch.arange(n, dtype=torch.float32) for n in grid.shape)
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
    pairs = dim // 10
    parts_q, parts_k = [], []
    for axis in range(3):
        if kind.near[axis]:
            a, b = _near(places[:, axis], kind.width[axis], kind.shift[axis], pairs, random)
            parts_q.append(a * math.sqrt(kind.near[axis]))
            parts_k.append(b * math.sqrt(kind.near[axis]))
    rest = dim - sum(part.shape[1] for part in parts_q)
    q, k = (torch.randn(tokens.num_tokens, rest, generator=random) for _ in range(2))
    q, k = (x * math.sqrt(kind.noise) * rest**-0.25 for x in (q, k))
    constant = _unit(rest, random)
    video, text = tokens.video, tokens.text
    if kind.cluster:
        centers = torch.nn.functional.normalize(torch.randn(CLUSTERS, rest, generator=random), dim=-1)
        member = centers[_clusters(places, grid.shape, random)] * math.sqrt(kind.cluster)
        q[video] += member
        k[video] += member
    if kind.stripe:
        chosen = torch.rand(grid.num_tokens, generator=random) < STRIPES
        q += constant * math.sqrt(kind.stripe)
        k[video] += constant * math.sqrt(kind.stripe) * chosen[:, None]
    if kind.text_sink:
        q[video] += constant * math.sqrt(kind.text_sink)
        k[text] += constant * math.sqrt(kind.text_sink)
    full_q, full_k = (torch.zeros(tokens.num_tokens, dim) for _ in range(2))
    full_q[:, dim - rest :], full_k[:, dim - rest :] = q, k
    if parts_q:
        full_q[video, : dim - rest], full_k[video, : dim - rest] = torch.cat(parts_q, 1), torch.cat(parts_k, 1)
    # scores are divided by the root of the head dim
    scale = dim**0.25
    return full_q * scale, full_k * scale, _values(places, tokens, dim, random)


def _near(x: Tensor, width: float, shift: float, pairs: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return features whose product is 1 at distance ``shift`` and fades like a Gaussian: ``(n, 2 * pairs)``."""
    # evenly spread quantiles of the Gaussian's spectrum, so that few pairs do not ring
    at = (torch.arange(pairs) + 0.5 + 0.2 * (torch.rand(pairs, generator=random) - 0.5)) / pairs
    frequencies = math.sqrt(2) * torch.erfinv(at) / width

    def waves(positions: Tensor) -> Tensor:
        angles = positions[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(pairs)

    return waves(x), waves(x + shift)


def _clusters(places: Tensor, shape: tuple[int, int, int], random: torch.Generator) -> Tensor:
    """Assign places to the nearest of things that move on straight lines: ``(n,)`` int64."""
    frames, height, width = shape
    start, end = (torch.rand(2, CLUSTERS, 2, generator=random) * torch.tensor([height, width])).unbind(0)
    time = places[:, :1, None] / max(1, frames - 1)
    centers = start + (end - start) * time
    return (places[:, None, 1:] - centers).square().sum(-1).argmin(1)


def _values(places: Tensor, tokens: TokenSpec, dim: int, random: torch.Generator) -> Tensor:
    """Make values that change slowly through the video, with noise: ``(S, D)``."""
    waves = torch.randn(3, dim, generator=random) * torch.tensor([0.2, 0.3, 0.3])[:, None]
    phases = 2 * math.pi * torch.rand(dim, generator=random)
    values = 0.5 * torch.randn(tokens.num_tokens, dim, generator=random)
    values[tokens.video] += (places @ waves + phases).cos()
    return values


def _unit(n: int, random: torch.Generator) -> Tensor:
    x = torch.randn(n, generator=random)
    return x / x.norm()

"""Sparse-Linear Attention: exact attention to critical blocks, linear attention to others, learned weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from ....mask import BlockMask
from ....tokens import AttentionCall
from ...fields import Allowed, Count, Density
from ...method import register
from ...ordered import OrderedMethod
from ...pattern import Pattern, pattern_of
from ...reorder import pool_laid_out
from ...select import by_heads, keep_top_k, pool_blocks, top_count
from ...state import MethodState
from .features import Hedgehog, Mix, Projection, Router
from .linear import choose_linear, join_linear_attention, linear_attention

Negligible = Annotated[
    float, Allowed("in [0, 1)", lambda value: 0 <= value < 1, "write 0.1 to drop 10 % of the blocks")
]


@dataclass(frozen=True, eq=False)
class SlaPattern(Pattern):
    """A pattern that also names the blocks that neither part computes.

    Args:
        negligible: ``(B, H, N, N)`` bool; ``None`` for none.
    """

    negligible: Tensor | None = None


@register("sla")
@dataclass(frozen=True, kw_only=True)
class Sla(OrderedMethod):
    """Exact attention to the critical blocks of each query block, and linear attention to others.

    Pooled queries and keys say which blocks are critical; text always is. The linear part is added through a learned
    projection, which is 0 before training (``"sla2"``: mixed in by a learned share, which starts at 0.7 %). Without
    weights, as in a call outside of a model, there is only the exact part. The means of ``compensate`` belong to the
    exact part; the linear part is joined to it as without them.

    Args:
        density: Fraction of blocks in each row that are critical, in (0, 1]. Reported densities count these blocks; the
            linear part comes on top. The paper trains with 0.05, released models with 0.1.
        variant: What the linear part covers. ``"paper"``: blocks neither critical nor negligible; ``"sla1"``: all
            that are not critical; ``"full"``: all tokens, as in the released models; ``"sla2"``: as ``"sla1"``, with
            keys less their mean, a router before the choice, and a learned mix instead of a projection.
        negligible: Fraction of blocks in each row, the lowest, that variant ``"paper"`` leaves out, in [0, 1);
            critical ones stay.
        feature_map: Features of the linear part: ``"softmax"``, ``"elu"``, ``"relu"``, or learned ones, ``"hedgehog"``.
        tie: Whether queries and keys share their learned features.
        mix_points: Values of the learned mix along the video, at least 1; between them it is interpolated, so it fits
            any length.
        weights: Path of a file that ``save_weights`` made, loaded when sparse attention is enabled.

    Raises:
        ValueError: A value belongs to another variant or feature map.

    Source: SLA (arXiv 2509.24006), section 4, and its released code; SLA2 (arXiv 2602.12675).
    """

    trained_for: ClassVar[tuple[str, ...]] = ("variant", "feature_map", "tie", "mix_points")

    density: Density = 0.1
    variant: Literal["paper", "sla1", "full", "sla2"] = "paper"
    negligible: Negligible = 0.1
    feature_map: Literal["softmax", "elu", "relu", "hedgehog"] = "softmax"
    tie: bool = False
    mix_points: Count = 1
    weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tie and self.feature_map != "hedgehog":
            raise ValueError(f"tie=True needs feature_map='hedgehog', got {self.feature_map!r}")
        if self.mix_points > 1 and self.variant != "sla2":
            raise ValueError(f"mix_points belongs to the mix of variant 'sla2', got variant {self.variant!r}")

    def make_weights(self, heads: int, head_dim: int) -> Module:
        """Make what one layer learns: ``projection`` or ``mix``, routers, and learned features."""
        weights: Any = Module()
        if self.variant == "sla2":
            weights.mix = Mix(heads, self.mix_points)
            weights.router_q, weights.router_k = Router(head_dim), Router(head_dim)
        else:
            weights.projection = Projection(head_dim)
        if self.feature_map == "hedgehog":
            weights.features_q = Hedgehog(heads, head_dim)
            if not self.tie:
                weights.features_k = Hedgehog(heads, head_dim)
        return weights

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> SlaPattern:
        """Compare pooled queries and keys, and keep the best blocks of each row."""
        layout = self.layout(call, q.device, state)
        video, lengths = layout.video_blocks, layout.block_lengths
        q, k = (pool_laid_out(layout, x)[:, :, :video] for x in (q, k))
        k = k - _mean_of_blocks(k, lengths[:, :video])
        weights = self._weights(state)
        if self.variant == "sla2" and weights is not None:
            q, k = weights.router_q(q), weights.router_k(k)

        def keep(count: int) -> Tensor:
            return by_heads(
                lambda heads: keep_top_k(q[:, heads] @ k[:, heads].mT, count), q.shape[1], q.shape[0] * video**2
            )

        critical = top_count(self.density, video)
        pattern = pattern_of(layout, keep(critical), max_count=critical)
        considered = max(critical, top_count(1 - self.negligible, video)) if self.variant == "paper" else video
        if considered == video:
            return SlaPattern(layout, pattern.mask)
        text = layout.num_blocks - video
        return SlaPattern(layout, pattern.mask, F.pad(~keep(considered), (0, text, 0, text)))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: AttentionCall, state: MethodState
    ) -> Tensor:
        assert isinstance(pattern, SlaPattern)
        weights, mask = self._weights(state), pattern.mask
        exact = super().attend(q, k, v, pattern, call, state)
        if weights is None:
            return exact
        if self.variant == "sla2":
            k = k - _mean_of_keys(k, mask)
        blocks = None if self.variant == "full" else ~mask.to_dense()
        if blocks is not None and pattern.negligible is not None:
            blocks &= ~pattern.negligible
        join = self._join(blocks, pattern, weights, q)
        sides, feature_map = self._features(q, k, weights)
        listed = (*sides, v, blocks, mask.lengths_k, mask.block_k, feature_map)
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (exact, *weights.parameters()))
        kernel = choose_linear(sides[0], v, mask.block_k, state.kernel, gradients=gradients)
        if kernel == "fused":
            return join_linear_attention(exact, *join, *listed)
        return _joined(exact, linear_attention(*listed, kernel), *join, mask)

    def _join(
        self, blocks: Tensor | None, pattern: Pattern, weights: Any, like: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the share of the linear part in each query block, and the weight and bias of its projection."""
        # A row whose blocks are all critical is exact already: nothing is joined to it, not even a bias.
        joined = None if blocks is None else blocks.any(-1)
        if joined is None or self.variant != "sla2":
            return joined, *weights.projection(like)
        mix = weights.mix(pattern.layout.video_blocks, like)
        return F.pad(mix, (0, joined.shape[-1] - mix.shape[-1])) * joined, None, None

    def _features(self, q: Tensor, k: Tensor, weights: Any) -> tuple[tuple[Tensor, Tensor], str]:
        if self.feature_map != "hedgehog":
            return (q, k), self.feature_map
        return (weights.features_q(q), (weights.features_q if self.tie else weights.features_k)(k)), "given"

    def _weights(self, state: MethodState) -> Any:
        if state.weights is None and self.weights is not None:
            raise ValueError(
                f"the weights in {self.weights} are loaded when sparse attention is enabled on a model; "
                "in a call of its own, give a layer's weights as state=MethodState(weights=...)"
            )
        return state.weights


def _mean_of_blocks(means: Tensor, lengths: Tensor) -> Tensor:
    weights = lengths.to(means)[..., None]
    return (means * weights).sum(2, keepdim=True) / weights.sum(-2, keepdim=True)


def _mean_of_keys(k: Tensor, mask: BlockMask) -> Tensor:
    means = pool_blocks(k, mask.block_k, mask.lengths_k)
    return _mean_of_blocks(means, mask.lengths_k).to(k.dtype)


def _joined(
    exact: Tensor, linear: Tensor, share: Tensor | None, weight: Tensor | None, bias: Tensor | None, mask: BlockMask
) -> Tensor:
    """Do what ``join_linear_attention`` does, in the dtype of the exact part."""
    if weight is not None:
        linear = F.linear(linear, weight, bias)
    if share is None:
        return exact + linear
    by_token = share.to(exact.dtype).repeat_interleave(mask.block_q, -1)[..., : exact.shape[2], None]
    return torch.lerp(exact, linear, by_token) if weight is None else torch.addcmul(exact, linear, by_token)

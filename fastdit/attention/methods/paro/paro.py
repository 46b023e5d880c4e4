"""PAROAttention: a calibrated axis order and calibrated blocks for each head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ....layout import TokenLayout, stack_heads
from ....mask import BlockMask
from ....schedule import step_bucket
from ....token_orders import axis_order
from ....tokens import AttentionCall, TokenSpec
from ...method import BlockMethod, register
from ...pattern import Pattern, pattern_of
from ...state import MethodState
from .calibration import calibrate
from .masks import ParoPlan

__all__ = ["Paro", "ParoPlan", "calibrate"]


@register("paro")
@dataclass(frozen=True, kw_only=True)
class Paro(BlockMethod):
    """Attention to calibrated blocks, each head in an axis order of its own.

    Nothing is chosen while a video is made: orders and blocks are those of the plan, which fits one grid and one
    length of text. It also says at which steps blocks change, whatever ``Schedule.refresh_steps`` is.

    Args:
        plan: What ``calibrate`` returned, or the path of a file that it was saved to. Without one every call is an
            error that says how to make one.

    Raises:
        ValueError: The file cannot be read, or is no plan.
        TypeError: ``plan`` is something else.

    Source: PAROAttention (arXiv 2506.16054). In its released code text that comes first shares a block with video; here
    it has blocks of its own.
    """

    plan: ParoPlan | str | None = None

    def __post_init__(self) -> None:
        if self.loaded is not None and not isinstance(self.loaded, ParoPlan):
            raise TypeError(f"plan must be a ParoPlan or the path of one, got {type(self.plan).__name__}")
        super().__post_init__()

    @cached_property
    def loaded(self) -> ParoPlan | None:
        """Return the plan, read from its file where a path was given."""
        return ParoPlan.load(self.plan) if isinstance(self.plan, str) else self.plan

    def describe(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold: the path of the plan, or the plan in words."""
        plan = repr(self.plan) if isinstance(self.plan, ParoPlan) else self.plan
        return {**super().describe(), "plan": plan}

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        """Look up orders and blocks.

        Raises:
            ValueError: There is no plan, or it is for something else, or the step bucket cannot be known.
        """
        heads = tuple(range(q.shape[1])) if call.heads is None else call.heads
        plan = self._checked_plan(call, heads)
        layouts = _layouts(plan, heads, call, q.device, state)
        bucket = step_bucket(plan.edges, call.step, call.num_steps)
        masks: dict[Any, tuple[int, BlockMask]] = state.cache.static(("masks", plan, q.device), dict)
        known, mask = masks.get((call.layer, heads), (None, None))
        if mask is None or known != bucket:
            mask = pattern_of(layouts[0], plan.blocks(bucket, call.layer, heads, q.device)[None]).mask
            masks[call.layer, heads] = (bucket, mask)
        return Pattern(stack_heads(layouts), mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState) -> Tensor:
        """Compute the attention of the blocks that the plan has for this layer and step."""
        state.pattern = None  # looked up in every call, whether or not others are to be rebuilt
        return super().forward(q, k, v, call, state)

    def _checked_plan(self, call: AttentionCall, heads: Sequence[int]) -> ParoPlan:
        plan = self.loaded
        if plan is None:
            raise ValueError(
                "method 'paro' has no plan; make one with fastdit.attention.methods.paro.calibrate(run, "
                "density=...) and give it, or the path it was saved to, as plan="
            )
        for what, planned, got in (
            ("a video of {} tokens", plan.tokens.grid, call.tokens.grid),
            ("{} text tokens", plan.tokens.text_tokens, call.tokens.text_tokens),
            ("text that comes {}", _place(plan.tokens), _place(call.tokens)),
            ("{} layers", plan.num_layers, call.num_layers),
            ("{} heads", plan.num_heads, len(heads) if call.heads is None else max(plan.num_heads, max(heads) + 1)),
        ):
            if planned != got:
                raise ValueError(
                    f"the plan of method 'paro' is for {what.format(planned)}, got {what.format(got)}; "
                    "calibrate one for this model and size with fastdit.attention.methods.paro.calibrate"
                )
        return plan


def _layouts(
    plan: ParoPlan, heads: Sequence[int], call: AttentionCall, device: torch.device, state: MethodState
) -> list[TokenLayout]:
    def build(axes: str) -> TokenLayout:
        order = axis_order(call.tokens.grid, axes)
        return TokenLayout.build(call.tokens, block=plan.block_size, order=order, device=device)

    orders = [plan.orders[call.layer][head] for head in heads]
    key = ("axes", plan.block_size, call.tokens, device)
    layouts = {axes: state.cache.static((*key, axes), partial(build, axes)) for axes in set(orders)}
    return [layouts[axes] for axes in orders]


def _place(tokens: TokenSpec) -> str:
    return "nowhere" if not tokens.text_tokens else "first" if tokens.text_first else "last"

"""Dense attention, the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...layout import TokenLayout
from ...mask import BlockMask
from ...tokens import AttentionCall
from ..method import AttentionMethod, register
from ..pattern import Pattern
from ..state import MethodState

BLOCK = 128


@register("dense")
@dataclass(frozen=True, kw_only=True)
class Dense(AttentionMethod):
    """Full attention; inside a pipeline the stock attention call, untouched."""

    static: ClassVar[bool] = True
    stock: ClassVar[bool] = True

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        layout = TokenLayout.build(call.tokens, block=BLOCK, device=q.device)
        lengths = layout.lengths()
        blocks = torch.ones(layout.num_blocks, layout.num_blocks, dtype=torch.bool, device=q.device)
        mask = BlockMask.from_dense(
            blocks, block_q=BLOCK, block_k=BLOCK, lengths_q=lengths[None], lengths_k=lengths[None]
        )
        return Pattern(layout, mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState) -> Tensor:
        state.kept = torch.ones((), dtype=torch.float32, device=q.device)
        allowed = None if call.key_padding is None else ~call.key_padding[:, None, None]
        return scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=call.scale)

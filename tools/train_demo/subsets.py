"""Train a transformer on some tokens of a large grid, each at its true place.

A subset of N tokens is fed as a ``(B, C, 1, 1, N)`` video, which patch size (1, 1, 1) allows; only
the rotary embedding and the text's key bias differ from the stock model, which runs unchanged
on the whole grid afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed
from torch import Tensor, nn

TEXT_TOKENS = 16
PLACE_LAYER = 2


@dataclass(frozen=True)
class Subset:
    """A kind of subset: one token per cell of ``stride``, and, if given, a dense ``window``.

    Both are (frames, height, width) in tokens. ``first_frames`` leaves out all later frames.
    """

    stride: tuple[int, int, int]
    window: tuple[int, int, int] | None = None
    first_frames: int | None = None

    def draw(self, grid: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Return the places ``(N, 3)`` int64 (frame, row, column) of the chosen tokens."""
        axes = [_strided(n, s, generator) for n, s in zip(grid, self.stride, strict=True)]
        chosen = torch.zeros(grid, dtype=torch.bool)
        chosen[torch.meshgrid(*axes, indexing="ij")] = True
        if self.window:
            corner = []
            for n, w in zip(grid, self.window, strict=True):
                start = int(torch.randint(max(n - w, 0) + 1, (), generator=generator))
                corner.append(slice(start, start + w))
            chosen[tuple(corner)] = True
        return chosen[: self.first_frames].nonzero()


def _strided(length: int, stride: int, generator: torch.Generator) -> Tensor:
    """Return one random index of every cell of ``stride`` along an axis."""
    starts = torch.arange(0, length, stride)
    jitter = torch.randint(stride, starts.shape, generator=generator)
    return torch.minimum(starts + jitter, torch.tensor(length - 1)).unique()


class PlacedRope(nn.Module):
    """The stock rotary embedding, evaluated at given places instead of a whole grid."""

    def __init__(self, stock: WanRotaryPosEmbed):
        super().__init__()
        self.stock = stock
        self.places: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin ``(1, N, 1, D)`` at ``places``, or the stock ones without any."""
        if self.places is None:
            return self.stock(hidden_states)
        sizes = [self.stock.t_dim, self.stock.h_dim, self.stock.w_dim]
        out = []
        for table in (self.stock.freqs_cos, self.stock.freqs_sin):
            parts = table.split(sizes, dim=1)
            rows = [part[self.places[:, axis]] for axis, part in enumerate(parts)]
            out.append(torch.cat(rows, dim=1)[None, :, None, :])
        return out[0], out[1]


class ComplexRopeProcessor(WanAttnProcessor):
    """Self-attention with the rotation as one complex product, for fewer passes over memory."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Do what ``WanAttnProcessor`` does, for self-attention only.

        Args:
            attn: The attention layer.
            hidden_states: ``(B, N, D)``.
            encoder_hidden_states: Not used.
            attention_mask: Not used.
            rotary_emb: Cos and sin, ``(1, N, 1, D)`` each.

        Returns:
            ``(B, N, D)``.
        """
        assert rotary_emb is not None
        cos, sin = rotary_emb
        rotation = torch.complex(cos[..., 0::2].float(), sin[..., 1::2].float())

        def rotate(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.unflatten(2, (attn.heads, -1, 2)))
            return torch.view_as_real(pairs * rotation).flatten(3).transpose(1, 2)

        query = rotate(attn.norm_q(attn.to_q(hidden_states)))
        key = rotate(attn.norm_k(attn.to_k(hidden_states)))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class PaddedTextProcessor(WanAttnProcessor):
    """Cross-attention in which the last text token counts as ``repeats`` equal ones."""

    def __init__(self):
        super().__init__()
        self.repeats = 1

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Add log(repeats) to the last key's score, and do what ``WanAttnProcessor`` does.

        Args:
            attn: The attention layer.
            hidden_states: ``(B, N, D)``.
            encoder_hidden_states: ``(B, 16, D)``, the text.
            attention_mask: Not used.
            rotary_emb: Not used.

        Returns:
            ``(B, N, D)``.
        """
        assert encoder_hidden_states is not None
        bias = hidden_states.new_zeros(1, 1, 1, encoder_hidden_states.shape[1])
        bias[..., -1] = math.log(self.repeats)
        return super().__call__(attn, hidden_states, encoder_hidden_states, bias, None)


@contextmanager
def subset_training(transformer: WanTransformer3DModel) -> Iterator[SubsetModel]:
    """Give a view of ``transformer`` that takes subsets; the stock parts are back on leaving."""
    stock_rope = transformer.rope
    attentions = [a for block in transformer.blocks for a in (block.attn1, block.attn2)]
    stock_processors = [attention.processor for attention in attentions]
    view = SubsetModel(transformer)
    try:
        yield view
    finally:
        transformer.rope = stock_rope
        for attention, processor in zip(attentions, stock_processors, strict=True):
            attention.set_processor(processor)


class SubsetModel:
    """``transformer`` on chosen tokens with a short text; made by ``subset_training``."""

    def __init__(self, transformer: WanTransformer3DModel):
        self.transformer = transformer
        self.rope = PlacedRope(transformer.rope)
        self.processor = PaddedTextProcessor()
        self.hidden: Tensor | None = None
        transformer.rope = self.rope
        for block in transformer.blocks:
            block.attn1.set_processor(ComplexRopeProcessor())
            block.attn2.set_processor(self.processor)

    def __call__(self, tokens: Tensor, places: Tensor, sigma: Tensor, text: Tensor, text_length: int) -> Tensor:
        """Predict the velocity of ``tokens``.

        Args:
            tokens: ``(B, C, N)``, noised latents.
            places: ``(N, 3)`` int64, where they lie on the grid.
            sigma: ``(B,)`` noise level in [0, 1].
            text: ``(B, 16, D)``, zero after the prompt's end; the last one is always zero.
            text_length: Tokens that the text stands for, at least 16; the rest are zeros.

        Returns:
            ``(B, C, N)``.
        """
        self.rope.places = places
        hook = self.transformer.blocks[PLACE_LAYER].register_forward_hook(self._keep)
        self.processor.repeats = text_length - text.shape[1] + 1
        video = tokens[:, :, None, None, :]
        out = self.transformer(video, sigma * 1000.0, text, return_dict=False)[0]
        hook.remove()
        return out[:, :, 0, 0]

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.hidden = output

    def place_loss(self, places: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Return how badly the last call's tokens know where they are.

        Three channels of the normalised third layer's output are asked to be frame, row and column.

        Args:
            places: ``(N, 3)`` int64.
            grid: Frames, rows and columns of the whole grid.

        Returns:
            Mean squared error ``()``, of places scaled to [-1.7, 1.7].
        """
        assert self.hidden is not None
        told = F.layer_norm(self.hidden, self.hidden.shape[-1:])[..., :3]
        last = torch.tensor(grid, device=places.device) - 1
        wanted = (places / last * 2.0 - 1.0) * 3.0**0.5
        return F.mse_loss(told, wanted.expand_as(told))


def gather_tokens(latents: Tensor, places: Tensor) -> Tensor:
    """Return the latents ``(B, C, N)`` at ``places`` ``(N, 3)`` of a grid ``(B, C, T, Y, X)``."""
    t, y, x = places.unbind(1)
    return latents[:, :, t, y, x]


def flow_loss(
    model: SubsetModel, clean: Tensor, noise: Tensor, places: Tensor, sigma: Tensor, text: Tensor, text_length: int
) -> Tensor:
    """Return the squared error of the predicted velocity per sample.

    Args:
        model: The transformer on subsets.
        clean: ``(B, C, N)`` latents; the noised tokens lie on the line from them to ``noise``.
        noise: ``(B, C, N)``.
        places: ``(N, 3)`` int64.
        sigma: ``(B,)`` in [0, 1].
        text: ``(B, 16, D)``.
        text_length: Tokens that the text stands for.

    Returns:
        ``(B,)``.
    """
    level = sigma[:, None, None]
    noised = (1.0 - level) * clean + level * noise
    predicted = model(noised, places, sigma, text, text_length)
    return F.mse_loss(predicted, noise - clean, reduction="none").mean((1, 2))

"""Train the demo's transformer by flow matching on subsets of the latent tokens."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from .latents import LatentSet
from .models import build_text_encoder, build_tokenizer, build_transformer
from .optim import WeightAverage, build_optimizer, load_checkpoint, lr_factor, save_checkpoint
from .parallel import average_gradients, start_processes
from .progress import LossLog, training_bar
from .subsets import TEXT_TOKENS, Subset, SubsetModel, flow_loss, gather_tokens, subset_training

logger = logging.getLogger(__name__)

TEXT_LENGTH = 512
CAPTION_DROPOUT = 0.1
PLACE_WEIGHT = 0.2


@dataclass(frozen=True)
class Kind:
    """One kind of training step.

    ``share`` of the steps at the start and from 65 % of the training on, ``batch``
    clips per process, noise levels pushed up by ``shift``.
    """

    name: str
    subset: Subset
    batch: int
    shift: float
    share: tuple[float, float]


KINDS = (
    Kind("head2.2.2", Subset((2, 2, 2), first_frames=4), 10, 6.0, (0.6, 0.1)),
    Kind("st1.4.4", Subset((1, 4, 4)), 6, 2.5, (0.1, 0.1)),
    Kind("st2.2.2", Subset((2, 2, 2)), 3, 4.0, (0.2, 0.2)),
    Kind("st1.2.2", Subset((1, 2, 2)), 1, 4.0, (0.05, 0.2)),
    Kind("hyb4.8.8", Subset((2, 3, 3), (4, 8, 8)), 4, 2.5, (0.05, 0.4)),
)
"""The first frames alone tell "left" from "right" by place, before motion is understood."""


class CaptionTable:
    """Text embeddings ``(16, 64)`` of captions as the pipeline makes them, zero after the end."""

    def __init__(self, device: str):
        self.tokenizer, self.encoder = build_tokenizer(), build_text_encoder()
        self.device = device
        self.known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> Tensor:
        """Return ``(B, 16, 64)``.

        Raises:
            ValueError: A caption has more than 14 words.
        """
        for caption in captions:
            if caption not in self.known:
                ids = self.tokenizer(caption, return_tensors="pt").input_ids
                if ids.shape[1] >= TEXT_TOKENS:
                    raise ValueError(f"caption of {ids.shape[1]} tokens, 15 are allowed: {caption!r}")
                text = torch.zeros(TEXT_TOKENS, self.encoder.config.d_model)
                text[: ids.shape[1]] = self.encoder(ids).last_hidden_state[0]
                self.known[caption] = text.to(self.device)
        return torch.stack([self.known[caption] for caption in captions])


def draw_kind(step: int, total: int, generator: torch.Generator) -> Kind:
    """Draw the kind of a step by the shares at this point of the training."""
    done = min(max(step / total - 0.55, 0.0) / 0.15, 1.0)
    shares = torch.tensor([k.share[0] * (1 - done) + k.share[1] * done for k in KINDS])
    return KINDS[int(torch.multinomial(shares, 1, generator=generator))]


def draw_sigma(batch: int, shift: float, generator: torch.Generator) -> Tensor:
    """Return noise levels ``(B,)``: logit-normal, spread over the batch, pushed up by ``shift``.

    Two in five are uniform in [0.8, 1] instead: there the motion is decided.
    """
    rank = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    u = torch.sigmoid(1.2 * torch.special.ndtri(rank.clamp(1e-4, 1 - 1e-4)))
    shifted = shift * u / (1.0 + (shift - 1.0) * u)
    high = 0.8 + 0.2 * torch.rand(batch, generator=generator)
    return torch.where(torch.rand(batch, generator=generator) < 0.4, high, shifted)


def draw_text_length(generator: torch.Generator) -> int:
    """Return 512, the pipeline's default, in 70 % of the steps, else log-uniform from 16."""
    if torch.rand((), generator=generator) < 0.7:
        return TEXT_LENGTH
    low, high = torch.tensor([float(TEXT_TOKENS), float(TEXT_LENGTH)]).log()
    return int((low + (high - low) * torch.rand((), generator=generator)).exp())


def training_loss(
    model: SubsetModel, data: LatentSet, table: CaptionTable, kind: Kind, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the mean loss ``()`` and the place loss ``()`` of one batch; all chance comes from ``generator``."""
    picks = torch.randint(len(data.latents), (kind.batch,), generator=generator)
    grid = tuple(data.latents.shape[2:])
    places = kind.subset.draw(grid, generator)
    clean = gather_tokens(data.latents[picks], places).float()
    noise = torch.randn(clean.shape, generator=generator)
    sigma = draw_sigma(kind.batch, kind.shift, generator)
    dropped = torch.rand(kind.batch, generator=generator) < CAPTION_DROPOUT
    captions = ["" if drop else data.captions[i] for i, drop in zip(picks, dropped, strict=True)]
    text = table(captions)
    length = draw_text_length(generator)
    to = text.device
    loss = flow_loss(model, clean.to(to), noise.to(to), places.to(to), sigma.to(to), text, length).mean()
    return loss, model.place_loss(places.to(to), grid)


@torch.no_grad()
def held_out_loss(model: SubsetModel, work: Path, table: CaptionTable) -> list[float]:
    """Return the loss on 4 held-out clips, all tokens, at noise levels .95, .85, .7 and .4."""
    latents, captions = LatentSet.held_out(work)
    places = torch.ones(latents.shape[2:], dtype=torch.bool).nonzero()
    losses = []
    for i, level in enumerate((0.95, 0.85, 0.7, 0.4)):
        clean = gather_tokens(latents[i : i + 1], places)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(i))
        sigma, text = torch.tensor([level]), table(captions[i : i + 1])
        to = text.device
        loss = flow_loss(model, clean.to(to), noise.to(to), places.to(to), sigma.to(to), text, TEXT_LENGTH)
        losses.append(round(loss.item(), 4))
    return losses


def train_dit(
    work: Path,
    steps: int,
    device: str,
    seed: int,
    save_every: float = 60.0,
    check_every: int = 500,
    lr: tuple[float, float] = (6e-3, 3e-3),
) -> None:
    """Train to ``work/dit.pt``; goes on from that file if it is there.

    Args:
        work: Folder with ``latents/`` and ``statistics.pt``; shards may still be arriving.
        steps: Optimiser steps in all. Another number on resuming moves the decay.
        device: A torch device.
        seed: Seeds weights, batches, noise.
        save_every: Seconds between checkpoints.
        check_every: Steps between held-out losses, 0 for none.
        lr: Learning rates of Muon and Adam.

    Raises:
        FileNotFoundError: There are no latents yet.
    """
    rank, processes = start_processes()
    torch.manual_seed(seed)
    transformer = build_transformer().to(device)
    optimizer = build_optimizer(transformer, muon_lr=lr[0], adam_lr=lr[1])
    average = WeightAverage(transformer, decay=0.995)
    path = work / "dit.pt"
    state = load_checkpoint(path, device)
    start = 0
    if state:
        transformer.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights = state["average"]
        start = state["step"]
    data, table = LatentSet(work), CaptionTable(device)
    if not data.refresh():
        raise FileNotFoundError(f"no latents in {work / 'latents'}; run the latents stage first")
    log = LossLog(work / "dit.jsonl", start) if rank == 0 else None

    def save(step: int) -> None:
        if rank:
            return
        save_checkpoint(
            path, model=transformer.state_dict(), optimizer=optimizer.state_dict(), average=average.weights, step=step
        )

    saved = began = time.monotonic()
    recent: deque[float] = deque(maxlen=50)
    with subset_training(transformer) as model, training_bar("dit", start, steps) as update:
        for step in range(start, steps):
            shared = torch.Generator().manual_seed(seed * 1_000_003 + step)
            kind = draw_kind(step, steps, shared)
            generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + rank)
            loss, place_loss = training_loss(model, data, table, kind, generator)
            optimizer.zero_grad(set_to_none=True)
            (loss + PLACE_WEIGHT * place_loss).backward()
            average_gradients(transformer, processes)
            torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
            optimizer.scale_lr(lr_factor(step, steps))
            optimizer.step()
            average.update(transformer, step)
            recent.append(loss.item())
            if log:
                log.add(step=step + 1, loss=round(loss.item(), 5), kind=kind.name, place=round(place_loss.item(), 4))
            speed = (time.monotonic() - began) / (step + 1 - start)
            mean = sum(recent) / len(recent)
            update(step + 1, f"loss {mean:.4f} {speed:.2f} s/step {len(data.captions)} clips")
            if step % 100 == 99:
                data.refresh()
            if log and check_every and (step + 1) % check_every == 0:
                losses = _check_average(transformer, average, model, work, table)
                log.add(step=step + 1, held_out=sum(losses) / len(losses), levels=str(losses))
                logger.info("step %d held out %s", step + 1, losses)
            if time.monotonic() - saved > save_every:
                save(step + 1)
                saved = time.monotonic()
    save(steps)


def _check_average(
    transformer: WanTransformer3DModel, average: WeightAverage, model: SubsetModel, work: Path, table: CaptionTable
) -> list[float]:
    """Return the held-out losses of the averaged weights; the live ones are put back."""
    live = {k: v.clone() for k, v in transformer.state_dict().items()}
    transformer.load_state_dict(average.weights)
    losses = held_out_loss(model, work, table)
    transformer.load_state_dict(live)
    return losses


def load_dit(work: Path, device: str = "cpu") -> WanTransformer3DModel:
    """Return the averaged transformer of ``work/dit.pt`` in evaluation mode.

    Raises:
        FileNotFoundError: There is no such file.
    """
    state = load_checkpoint(work / "dit.pt", device)
    if state is None:
        raise FileNotFoundError(f"no {work / 'dit.pt'}; run the dit stage first")
    transformer = build_transformer().to(device).eval()
    transformer.load_state_dict(state["average"])
    return transformer

"""Train the demo's video autoencoder on small moving crops of the demo world."""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from .models import build_vae
from .optim import WeightAverage, build_optimizer, load_checkpoint, lr_factor, save_checkpoint
from .parallel import average_gradients, start_processes
from .progress import LossLog, training_bar
from .scenes import Scene, sample_scene

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VaePhase:
    """``batch`` crops of ``frames`` x ``size`` x ``size`` pixels until ``until`` of all steps.

    ``cut`` is the chance in [0, 1] that a latent frame starts another scene. Without cuts the
    latents hold colour changes only, and long clips drift; a cut makes every latent frame tell
    its own colours.
    """

    until: float
    frames: int
    size: int
    batch: int
    cut: float


PHASES = (VaePhase(0.97, 13, 64, 1, 0.5), VaePhase(1.0, 29, 80, 1, 0.2))


def sample_crops(rng: np.random.Generator, phase: VaePhase) -> Tensor:
    """Return crops ``(B, 3, F, S, S)`` in [-1, 1] of random scenes, most of them at the object."""
    crops = []
    for _ in range(phase.batch):
        cuts = [0, *(f for f in range(1, phase.frames, 4) if rng.random() < phase.cut), phase.frames]
        parts = [_crop(rng, b - a, phase.size) for a, b in itertools.pairwise(cuts)]
        crops.append(np.concatenate(parts))
    clip = torch.from_numpy(np.stack(crops)).permute(0, 4, 1, 2, 3)
    return clip.float() / 127.5 - 1.0


def _crop(rng: np.random.Generator, frames: int, size: int) -> np.ndarray:
    """Return ``(F, S, S, 3)`` uint8 of one scene."""
    scene = sample_scene(int(rng.integers(2**31)))
    start = int(rng.integers(45 - frames + 1))
    top, left = _corner(rng, scene, start + frames // 2, size)
    return scene.render(
        frames=slice(start, start + frames), rows=slice(top, top + size), columns=slice(left, left + size)
    )


def _corner(rng: np.random.Generator, scene: Scene, frame: int, size: int) -> tuple[int, int]:
    x, y = scene.center[frame] * 192 - size / 2
    if rng.random() < 0.15:
        x, y = rng.uniform(0, 192 - size, 2)
    reach = scene.radius[frame] * 192
    x, y = x + rng.uniform(-reach, reach), y + rng.uniform(-reach, reach)
    return int(np.clip(y, 0, 192 - size)), int(np.clip(x, 0, 192 - size))


def decode_raw(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode chunk by chunk as ``vae.decode`` does, without its clamp (which has no gradient).

    Args:
        vae: The autoencoder.
        latents: ``(B, C, T, Y, X)``.

    Returns:
        ``(B, 3, F, H, W)``, about in [-1, 1].
    """
    vae.clear_cache()
    x = vae.post_quant_conv(latents)
    out = []
    for i in range(x.shape[2]):
        vae._conv_idx = [0]
        out.append(
            vae.decoder(x[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
        )
    vae.clear_cache()
    return unpatchify(torch.cat(out, 2), patch_size=vae.config.patch_size)


def vae_loss(vae: AutoencoderKLWan, clip: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the mean squared error of ``clip`` ``(B, 3, F, H, W)`` in [-1, 1]."""
    posterior = vae.encode(clip).latent_dist
    latents = posterior.mean + posterior.std * noise
    error = decode_raw(vae, latents) - clip
    square = error.square().mean()
    edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3, 4))
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    return error.abs().mean() + square + 0.5 * edges + 5e-4 * kl, square


def train_vae(work: Path, steps: int, device: str, seed: int, save_every: float = 60.0) -> None:
    """Train to ``work/vae.pt``; goes on from that file if it is there.

    Args:
        work: Folder of intermediate files.
        steps: Optimiser steps in all; the phases and the decay are shares of it.
        device: A torch device.
        seed: Seeds weights, scenes and noise.
        save_every: Seconds between checkpoints.
    """
    rank, processes = start_processes()
    torch.manual_seed(seed)
    vae = build_vae().to(device)
    optimizer = build_optimizer(vae, muon_lr=4e-3, adam_lr=1.5e-3)
    average = WeightAverage(vae, decay=0.99)
    path = work / "vae.pt"
    state = load_checkpoint(path, device)
    start = 0
    if state:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights = state["average"]
        start = state["step"]
    log = LossLog(work / "vae.jsonl", start) if rank == 0 else None

    def save(step: int) -> None:
        if rank:
            return
        save_checkpoint(
            path, model=vae.state_dict(), optimizer=optimizer.state_dict(), average=average.weights, step=step
        )

    saved = began = time.monotonic()
    with training_bar("vae", start, steps) as update:
        for step in range(start, steps):
            phase = next(p for p in PHASES if step < p.until * steps or p is PHASES[-1])
            rng = np.random.default_rng((seed, step, rank))
            clip = sample_crops(rng, phase).to(device)
            shape = (phase.batch, vae.config.z_dim, 1 + phase.frames // 4, phase.size // 8, phase.size // 8)
            noise = torch.from_numpy(rng.standard_normal(shape, np.float32)).to(device)
            loss, square = vae_loss(vae, clip, noise)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(vae, processes)
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.scale_lr(lr_factor(step, steps))
            optimizer.step()
            average.update(vae, step)
            psnr = 10.0 * np.log10(4.0 / max(square.item(), 1e-9))
            if log:
                log.add(step=step + 1, loss=round(loss.item(), 5), psnr=round(psnr, 2))
            speed = (time.monotonic() - began) / (step + 1 - start)
            update(step + 1, f"loss {loss.item():.4f} psnr {psnr:.1f} dB {speed:.2f} s/step")
            if time.monotonic() - saved > save_every:
                save(step + 1)
                saved = time.monotonic()
    save(steps)


def load_vae(work: Path, device: str = "cpu") -> AutoencoderKLWan:
    """Return the averaged autoencoder of ``work/vae.pt``, its latent statistics set if known.

    Raises:
        FileNotFoundError: There is no such file.
    """
    state = load_checkpoint(work / "vae.pt", device)
    if state is None:
        raise FileNotFoundError(f"no {work / 'vae.pt'}; run the vae stage first")
    vae = build_vae().to(device).eval()
    vae.load_state_dict(state["average"])
    statistics = load_checkpoint(work / "statistics.pt")
    if statistics:
        vae.register_to_config(latents_mean=statistics["mean"].tolist(), latents_std=statistics["std"].tolist())
    return vae


@torch.no_grad()
def measure_vae(vae: AutoencoderKLWan, seeds: range, device: str = "cpu") -> dict[str, float]:
    """Return PSNR in dB over whole held-out clips: ``psnr``, ``worst`` clip, ``last_frames``."""
    whole, last = [], []
    for seed in seeds:
        frames = torch.from_numpy(sample_scene(seed).render()).permute(3, 0, 1, 2)[None]
        clip = frames.to(device).float() / 127.5 - 1.0
        error = (vae.decode(vae.encode(clip).latent_dist.mean).sample - clip).square()
        whole.append(10.0 * torch.log10(4.0 / error.mean()).item())
        last.append(10.0 * torch.log10(4.0 / error[:, :, -8:].mean()).item())
    return {"psnr": float(np.mean(whole)), "worst": float(np.min(whole)), "last_frames": float(np.mean(last))}

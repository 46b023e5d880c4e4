"""The transformer's training data: clips encoded once to latents and kept on disk in shards."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from fastdit.demo.captions import is_held_out

from .optim import load_checkpoint, save_checkpoint
from .progress import training_bar
from .scenes import Scene, sample_scene
from .train_vae import load_vae

logger = logging.getLogger(__name__)

SHARD_CLIPS = 16
HELD_OUT_SEED = 1_000_000


@torch.no_grad()
def encode_scene(vae: AutoencoderKLWan, scene: Scene, device: str, size: int = 192) -> Tensor:
    """Return the latents ``(C, T, Y, X)`` of a scene, float32, not yet normalised."""
    frames = torch.from_numpy(scene.render(size, size)).to(device)
    clip = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
    return vae.encode(clip).latent_dist.mean[0]


def measure_statistics(work: Path, device: str, clips: int = 24) -> None:
    """Write mean and standard deviation ``(C,)`` of latents to ``work/statistics.pt``, once."""
    path = work / "statistics.pt"
    if path.exists():
        return
    vae = load_vae(work, device)
    scenes = [sample_scene(HELD_OUT_SEED * 2 + i) for i in range(clips)]
    flat = torch.stack([encode_scene(vae, s, device).flatten(1) for s in scenes], 1).flatten(1)
    save_checkpoint(path, mean=flat.mean(1).cpu(), std=flat.std(1).cpu())


def encode_clips(work: Path, clips: int, device: str, part: int = 0, parts: int = 1, num_frames: int = 45) -> None:
    """Encode ``clips`` training clips and 8 held-out ones to ``work/latents``; skips what is there.

    Args:
        work: Folder with ``vae.pt``.
        clips: Training clips in all, rounded up to whole shards.
        device: A torch device.
        part: Which of ``parts`` this process encodes, so that several can share the work.
        parts: Processes.
        num_frames: Frames of a clip.
    """
    if part == 0:
        measure_statistics(work, device)
    vae = load_vae(work, device)
    folder = work / "latents"
    shards = -(-clips // SHARD_CLIPS)
    jobs = [(folder / f"{i:05d}.pt", i * SHARD_CLIPS, SHARD_CLIPS) for i in range(part, shards, parts)]
    if part == 0:
        jobs.insert(0, (folder / "held_out.pt", HELD_OUT_SEED, 8))
    with training_bar("encode", 0, len(jobs)) as update:
        for done, (path, first, count) in enumerate(jobs, 1):
            if not path.exists():
                scenes = _scenes(first, count, num_frames)
                latents = torch.stack([encode_scene(vae, s, device) for s in scenes])
                captions = [s.caption for s in scenes]
                save_checkpoint(path, latents=latents.half().cpu(), captions=captions)
            update(done, path.name)


def _scenes(first: int, count: int, num_frames: int) -> list[Scene]:
    """Return scenes of the seeds from ``64 * first``; held-out combinations are passed over."""
    scenes, seed = [], first * 64
    while len(scenes) < count:
        scene = sample_scene(seed, num_frames)
        if not is_held_out(scene.shown):
            scenes.append(scene)
        seed += 1
    return scenes


@dataclass
class LatentSet:
    """The shards on disk, read into memory; ``refresh`` picks up new ones.

    ``latents`` is ``(N, C, T, Y, X)``, float16, normalised by the statistics.
    """

    work: Path
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    captions: list[str] = field(default_factory=list)
    shards: set[str] = field(default_factory=set)

    def refresh(self) -> int:
        """Read shards that are new; return the number of clips held."""
        new = []
        for path in sorted((self.work / "latents").glob("[0-9]*.pt")):
            if path.name not in self.shards:
                shard = load_checkpoint(path)
                new.append(normalize(self.work, shard["latents"]))
                self.captions += shard["captions"]
                self.shards.add(path.name)
        if new:
            self.latents = torch.cat([self.latents, *new] if len(self.latents) else new)
        return len(self.latents)

    @staticmethod
    def held_out(work: Path) -> tuple[Tensor, list[str]]:
        """Return the held-out clips' latents ``(8, C, T, Y, X)`` and captions."""
        shard = load_checkpoint(work / "latents" / "held_out.pt")
        return normalize(work, shard["latents"]).float(), shard["captions"]


def normalize(work: Path, latents: Tensor) -> Tensor:
    """Return latents ``(N, C, T, Y, X)`` with mean 0 and standard deviation 1 per channel."""
    statistics = load_checkpoint(work / "statistics.pt")
    mean, std = (statistics[k].view(1, -1, 1, 1, 1) for k in ("mean", "std"))
    return ((latents.float() - mean) / std).half()

"""Write the trained demo model as a diffusers folder of fp16 safetensors."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from fastdit.demo import WEIGHTS

from .models import build_pipeline
from .progress import plot_losses
from .train_dit import load_dit
from .train_vae import load_vae

MAX_BYTES = 8_000_000


def export_weights(work: Path, output: Path | None = None) -> Path:
    """Save the averaged weights of ``work`` in half precision; return the folder.

    Raises:
        ValueError: The folder would be larger than 8 MB.
    """
    output = output or WEIGHTS
    pipeline = build_pipeline(load_vae(work), load_dit(work)).to(torch.float16)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        folder = Path(temporary) / "weights"
        pipeline.save_pretrained(folder, safe_serialization=True)
        _name_tokenizer(folder)
        for file in folder.rglob("*.safetensors"):
            file.chmod(0o644)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if size > MAX_BYTES:
            raise ValueError(f"the demo may take {MAX_BYTES} bytes, got {size}; make it smaller")
        shutil.rmtree(output, ignore_errors=True)
        shutil.move(folder, output)
    return output


def _name_tokenizer(folder: Path) -> None:
    """Write the tokenizer's class by the name that every version of transformers knows."""
    for file in (folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"):
        file.write_text(file.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))


def plot_training(work: Path, output: Path) -> None:
    """Draw the loss curves of both models as PNG."""
    plot_losses({"autoencoder": work / "vae.jsonl", "transformer": work / "dit.jsonl"}, output)

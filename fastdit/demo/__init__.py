"""The demo model: a real, trained, tiny text-to-video pipeline that ships with the package.

It draws one bright object moving over a dim background, needs no download and no GPU, and is made
of stock diffusers classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import WanPipeline

__all__ = ["DEFAULTS", "WEIGHTS", "DemoDefaults", "DemoWeightsError", "load_pipeline"]

WEIGHTS = Path(__file__).parent / "weights"
"""The packaged weights, a diffusers folder; ``WanPipeline.from_pretrained`` reads it too."""


@dataclass(frozen=True)
class DemoDefaults:
    """The clip that the demo was trained for: 12 x 24 x 24 = 6,912 tokens.

    Args:
        num_frames: Frames of the clip, 4 n + 1.
        height: Pixels, a multiple of 8.
        width: Pixels, a multiple of 8.
        num_inference_steps: Denoising steps.
        guidance_scale: Weight of the prompt; 1 is without guidance, and half the work.
        fps: Frames per second to write the clip with.
        negative_prompt: What to steer away from; the demo knows none.
    """

    num_frames: int = 45
    height: int = 192
    width: int = 192
    num_inference_steps: int = 10
    guidance_scale: float = 4.0
    fps: int = 16
    negative_prompt: str = ""


DEFAULTS = DemoDefaults()


class DemoWeightsError(RuntimeError):
    """The demo's weights are missing or damaged."""


def load_pipeline(dtype: torch.dtype | None = None, device: str = "cpu") -> WanPipeline:
    """Load the demo model.

    Args:
        dtype: Dtype of all weights; float32 when ``None``, which is the fastest on a CPU.
        device: A torch device.

    Returns:
        A stock ``WanPipeline``; call it with the fields of ``DEFAULTS``.

    Raises:
        DemoWeightsError: The packaged weights are missing or damaged.
    """
    import torch
    from diffusers import WanPipeline

    index = WEIGHTS / "model_index.json"
    if not index.is_file():
        raise DemoWeightsError(
            f"the demo's weights are missing: no file {index}; reinstall fastdit, "
            "or train them with `python -m tools.train_demo.train`"
        )
    _check_weights()
    try:
        pipeline = WanPipeline.from_pretrained(WEIGHTS, torch_dtype=dtype or torch.float32, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DemoWeightsError(f"the demo's weights in {WEIGHTS} cannot be read: {error}; reinstall fastdit") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _check_weights() -> None:
    """Open every weight file, so that a damaged one is named.

    Raises:
        DemoWeightsError: A file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    for part in ("transformer", "vae", "text_encoder"):
        files = list((WEIGHTS / part).glob("*.safetensors"))
        if not files:
            raise DemoWeightsError(
                f"the demo's weights are incomplete: no .safetensors in {WEIGHTS / part}; reinstall fastdit"
            )
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    opened.keys()
            except (SafetensorError, OSError) as error:
                raise DemoWeightsError(
                    f"{file} is not a whole safetensors file: {error} ({file.stat().st_size} bytes); reinstall fastdit"
                ) from error

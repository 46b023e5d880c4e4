"""Tiny diffusers pipelines with random weights: every family fastdit knows, a few milliseconds per call.

``transformer(kind)`` and ``arguments(kind)`` are enough for one forward; ``pipeline(kind)`` and ``run(pipe)`` make a
latent video without text encoders or decoding.
"""

import functools
import inspect
from dataclasses import dataclass, field

import diffusers
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler

import fastdit

DRAFT = {"method": "draft", "density": 0.4, "tile": (1, 4, 4)}
"""A sparse method that leaves something out even of these small videos."""

EVERY_STEP = fastdit.Schedule()
"""No call stays dense."""

KINDS = ("wan", "wan_i2v", "vace", "cogvideox", "cogvideox15", "hunyuan_video", "mochi", "ltx")
"""Transformers, one or more per family."""

PIPELINES = ("wan", "wan22", "wan_i2v", "vace", "cogvideox", "cogvideox15", "hunyuan_video", "mochi", "ltx")
"""Pipelines, one or more per family."""

HEADS, HEAD_DIM, TEXT, WIDTH = 2, 16, 12, 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorder(fastdit.AttentionMethod):
    """Attend to everything and write down each call, with the ``refresh`` that came with it."""

    name = "recorder"
    calls: list = field(default_factory=list)
    refreshes: list = field(default_factory=list)

    def pattern(self, q, k, call, state):
        raise NotImplementedError

    def forward(self, q, k, v, call, state):
        self.calls.append(call)
        self.refreshes.append(state.refresh)
        return F.scaled_dot_product_attention(q, k, v)


def transformer(kind: str, layers: int = 2, head_dim: int = HEAD_DIM, seed: int = 0, **changes):
    """Make a transformer with random weights; the same for the same seed."""
    torch.manual_seed(seed)
    heads = {"num_attention_heads": HEADS, "attention_head_dim": head_dim}
    wan = {
        "patch_size": (1, 2, 2),
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": WIDTH,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    cogvideox = {
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": WIDTH,
        "num_layers": layers,
        "sample_width": 16,
        "sample_height": 16,
        "sample_frames": 9,
        "max_text_seq_length": TEXT,
    }
    classes = {
        "wan": ("WanTransformer3DModel", wan),
        "wan_i2v": ("WanTransformer3DModel", wan | {"in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 32}),
        "vace": ("WanVACETransformer3DModel", wan | {"vace_layers": [0], "vace_in_channels": 96}),
        "cogvideox": ("CogVideoXTransformer3DModel", cogvideox),
        "cogvideox15": (
            "CogVideoXTransformer3DModel",
            cogvideox | {"patch_size_t": 2, "use_rotary_positional_embeddings": True, "patch_bias": False},
        ),
        "hunyuan_video": (
            "HunyuanVideoTransformer3DModel",
            {
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": layers // 2,
                "num_single_layers": layers - layers // 2,
                "num_refiner_layers": 1,
                "text_embed_dim": WIDTH,
                "pooled_projection_dim": 8,
                "rope_axes_dim": (4, (head_dim - 4) // 2, (head_dim - 4) // 2),
            },
        ),
        "mochi": (
            "MochiTransformer3DModel",
            {
                "num_layers": layers,
                "pooled_projection_dim": 16,
                "in_channels": 12,
                "text_embed_dim": WIDTH,
                "time_embed_dim": 8,
                "max_sequence_length": TEXT,
            },
        ),
        "ltx": (
            "LTXVideoTransformer3DModel",
            {
                "in_channels": 8,
                "out_channels": 8,
                "cross_attention_dim": HEADS * head_dim,
                "num_layers": layers,
                "caption_channels": WIDTH,
            },
        ),
    }
    name, config = classes[kind]
    return getattr(diffusers, name)(**{**heads, **config, **changes}).eval()


def arguments(kind: str, grid: tuple[int, int, int] = (3, 8, 8), batch: int = 1, seed: int = 0) -> dict:
    """Make the arguments of a forward over a grid of tokens; the second sample has less text than the first."""
    noise = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=noise)

    frames, height, width = grid
    text = randn(batch, TEXT, WIDTH)
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[-1, 7:] = False
    time = {"timestep": torch.full((batch,), 500.0)}
    if kind == "wan":
        return {"hidden_states": randn(batch, 16, frames, 2 * height, 2 * width), "encoder_hidden_states": text} | time
    if kind == "wan_i2v":
        latent = randn(batch, 36, frames, 2 * height, 2 * width)
        image = {"encoder_hidden_states_image": randn(batch, 5, 8)}
        return {"hidden_states": latent, "encoder_hidden_states": randn(batch, 512, WIDTH)} | image | time
    if kind == "vace":
        control = {"control_hidden_states": randn(batch, 96, frames, 2 * height, 2 * width)}
        return arguments("wan", grid, batch, seed) | control
    if kind == "cogvideox":
        return {"hidden_states": randn(batch, frames, 4, 2 * height, 2 * width), "encoder_hidden_states": text} | time
    if kind == "cogvideox15":
        latent = randn(batch, 2 * frames, 4, 2 * height, 2 * width)
        angles = randn(frames * height * width, HEAD_DIM)
        rotary = {"image_rotary_emb": (angles.cos(), angles.sin())}
        return {"hidden_states": latent, "encoder_hidden_states": text} | rotary | time
    if kind == "hunyuan_video":
        return {
            "hidden_states": randn(batch, 4, frames, 2 * height, 2 * width),
            "encoder_hidden_states": text,
            "encoder_attention_mask": mask,
            "pooled_projections": randn(batch, 8),
            "guidance": torch.full((batch,), 6000.0),
        } | time
    if kind == "mochi":
        latent = randn(batch, 12, frames, 2 * height, 2 * width)
        return {"hidden_states": latent, "encoder_hidden_states": text, "encoder_attention_mask": mask} | time
    assert kind == "ltx", kind
    return {
        "hidden_states": randn(batch, frames * height * width, 8),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "num_frames": frames,
        "height": height,
        "width": width,
    } | time


@functools.cache
def _vae(kind: str):
    torch.manual_seed(0)
    if kind == "wan":
        return diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
        )
    if kind == "cogvideox":
        return diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8,) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        )
    if kind == "hunyuan_video":
        return diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
        )
    if kind == "mochi":
        return diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1,) * 5,
        )
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
    )


def pipeline(kind: str, seed: int = 0, scheduler=None, **changes):
    """Make a pipeline without text encoders; ``changes`` are for its transformer."""
    classes = {
        "wan": ("WanPipeline", "wan", "wan"),
        "wan22": ("WanPipeline", "wan", "wan"),
        "wan_i2v": ("WanImageToVideoPipeline", "wan", "wan"),
        "vace": ("WanVACEPipeline", "vace", "wan"),
        "cogvideox": ("CogVideoXPipeline", "cogvideox", "cogvideox"),
        "cogvideox15": ("CogVideoXPipeline", "cogvideox15", "cogvideox"),
        "hunyuan_video": ("HunyuanVideoPipeline", "hunyuan_video", "hunyuan_video"),
        "mochi": ("MochiPipeline", "mochi", "mochi"),
        "ltx": ("LTXPipeline", "ltx", "ltx"),
    }
    name, model, vae = classes[kind]
    if scheduler is None:
        scheduler = (
            diffusers.CogVideoXDDIMScheduler()
            if vae == "cogvideox"
            else FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=kind == "mochi")
        )
    cls = getattr(diffusers, name)
    if kind == "wan_i2v":
        changes["in_channels"] = 36
    parts = {"transformer": transformer(model, seed=seed, **changes), "vae": _vae(vae), "scheduler": scheduler}
    if kind == "wan22":
        parts |= {"transformer_2": transformer(model, seed=seed + 1, **changes), "boundary_ratio": 0.9}
    wanted = inspect.signature(cls.__init__).parameters
    absent = {part: None for part, how in wanted.items() if how.default is how.empty and part not in {"self", *parts}}
    pipe = cls(**parts, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, steps: int = 3, size: tuple[int, int, int] | None = None, guidance: float = 5.0, **changes):
    """Make a latent video of ``(frames, height, width)`` pixels."""
    noise = torch.Generator().manual_seed(7)
    small = {"LTXPipeline": (9, 32, 32), "WanImageToVideoPipeline": (9, 64, 64), "WanVACEPipeline": (9, 64, 64)}
    frames, height, width = size or small.get(type(pipe).__name__, (9, 128, 128))

    def randn(*shape):
        return torch.randn(*shape, generator=noise)

    kind = type(pipe).__name__.removesuffix("Pipeline")
    options = {
        "prompt_embeds": randn(1, TEXT, WIDTH),
        "num_frames": frames,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    if kind != "HunyuanVideo":
        options["negative_prompt_embeds"] = randn(1, TEXT, WIDTH)
    if kind in ("HunyuanVideo", "Mochi", "LTX"):
        options["prompt_attention_mask"] = torch.arange(TEXT)[None] < 9
    if kind in ("Mochi", "LTX"):
        options["negative_prompt_attention_mask"] = torch.arange(TEXT)[None] < 5
    if kind == "HunyuanVideo":
        options["pooled_prompt_embeds"] = randn(1, 8)
    if kind == "WanImageToVideo":
        options["image"] = torch.rand(1, 3, height, width, generator=noise)
    return pipe(**{**options, **changes}).frames

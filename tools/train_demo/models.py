"""Sizes of the demo model: stock diffusers and transformers classes, built untrained."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from fastdit.demo.captions import BACKGROUND_COLORS, FILLERS, KINDS, MOTIONS, OBJECT_COLORS, SHAPES, SIZES, SYNONYMS

LATENT_CHANNELS = 8
FLOW_SHIFT = 3.5


def build_vae() -> AutoencoderKLWan:
    """Build the autoencoder: 8x8 pixels and 4 frames to one latent cell.

    The log-variance starts small, else the posterior's noise hides the signal at first.
    """
    vae = AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=0,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    with torch.no_grad():
        vae.quant_conv.bias[LATENT_CHANNELS:] = -5.0
    return vae


def build_transformer() -> WanTransformer3DModel:
    """Build the transformer: 6 layers of 2 heads of 64, one token per latent cell."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=64,
        freq_dim=128,
        ffn_dim=384,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def build_text_encoder(seed: int = 0) -> UMT5EncoderModel:
    """Build the text encoder; it stays random and frozen.

    Words are bound to their roles by their places alone, so the position bias is made strong.
    """
    config = UMT5Config(
        vocab_size=len(build_vocabulary()),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    encoder = UMT5EncoderModel(config)
    torch.set_rng_state(state)
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            p.requires_grad_(False)
            if "relative_attention_bias" in name:
                p.mul_(30.0)
    return encoder.eval()


def build_vocabulary() -> dict[str, int]:
    """Return word to id; 0 is padding, 1 the end, 2 any unknown word."""
    words = ["<pad>", "</s>", "<unk>", "moving", "on", "background"]
    for group in (OBJECT_COLORS, BACKGROUND_COLORS, SHAPES, SIZES, MOTIONS, KINDS):
        words += [word for word in group if word and word not in words]
    return {word: i for i, word in enumerate(words)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word tokenizer; it knows the synonyms, so the encoder sees few words."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    steps = [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^a-z ]+"), " ")]
    for alternatives, word in SYNONYMS:
        steps.append(normalizers.Replace(Regex(rf"\b(?:{alternatives})\b"), word))
    steps.append(normalizers.Replace(Regex(rf"\b(?:{FILLERS})\b"), " "))
    tokenizer = Tokenizer(models.WordLevel(build_vocabulary(), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build_scheduler() -> UniPCMultistepScheduler:
    """Build the flow-matching sampler of the demo."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT)


def build_pipeline(
    vae: AutoencoderKLWan | None = None, transformer: WanTransformer3DModel | None = None
) -> WanPipeline:
    """Put the parts together; what is not given is untrained."""
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=build_text_encoder(),
        vae=vae or build_vae().eval(),
        scheduler=build_scheduler(),
        transformer=transformer or build_transformer().eval(),
        transformer_2=None,
    )

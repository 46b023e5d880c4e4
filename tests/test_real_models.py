"""Released configurations with random weights: every layer sparse, the density as asked."""

import accelerate
import pytest
import torch

import fastdit

pytestmark = pytest.mark.slow

TEXT = 226
MODELS = {
    "wan2.1-t2v-1.3b": (
        "WanTransformer3DModel",
        {
            "num_layers": 30,
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "ffn_dim": 8960,
            "patch_size": (1, 2, 2),
        },
        {"hidden_states": (1, 16, 2, 16, 16), "encoder_hidden_states": (1, 8, 4096)},
        0,
    ),
    "cogvideox-2b": (
        "CogVideoXTransformer3DModel",
        {"num_layers": 30, "num_attention_heads": 30, "attention_head_dim": 64, "max_text_seq_length": TEXT},
        {"hidden_states": (1, 2, 16, 16, 16), "encoder_hidden_states": (1, TEXT, 4096)},
        TEXT,
    ),
}


def random_weights(model):
    """Fill all parameters of one shape with the same noise, so that a model takes the memory of a few layers."""
    noise = {}
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            if empty.shape not in noise:
                noise[empty.shape] = torch.nn.Parameter(torch.randn(empty.shape) * 0.02, requires_grad=False)
            module.register_parameter(name, noise[empty.shape])
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_runs_sparse(name):
    import diffusers

    cls, config, shapes, text = MODELS[name]
    with accelerate.init_empty_weights(include_buffers=False):
        model = getattr(diffusers, cls)(**config)
    random_weights(model)
    handle = fastdit.enable_sparse_attention(model, "draft", density=0.25, tile=(1, 4, 4))
    with torch.no_grad():
        out = model(timestep=torch.tensor([500.0]), **{key: torch.randn(shape) for key, shape in shapes.items()}).sample
    assert out.isfinite().all()
    layers = handle.report()["layers"]
    assert len(layers) == 30
    video = 2 * 8 * 8
    asked = (0.25 * video**2 + 2 * text * video + text**2) / (video + text) ** 2
    for layer in layers:
        assert layer["sparse_calls"] == 1 and not layer["dense"] and not layer["fallbacks"]
        assert layer["density"] == pytest.approx(asked, abs=0.02)
    assert handle.density == pytest.approx(asked, abs=0.01)
    assert handle.summary().count("attn1") == 30

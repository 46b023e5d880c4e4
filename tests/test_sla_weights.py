"""Learned weights of a method: attached to the model, trained, saved, loaded, and taken away again."""

import copy

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_samples import default

import fastdit

SLA = {"method": "sla", "block_size": 16, "density": 0.3, "schedule": tiny.EVERY_STEP}
ATTRIBUTE = "sparse_attention_weights"


def forward(model, **changes):
    with torch.no_grad():
        return model(**tiny.arguments("wan", **changes)).sample


def train(model):
    """Give every weight a value that is nothing like the one at the start."""
    with torch.no_grad():
        for parameter in getattr(model, ATTRIBUTE).parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Trained weights of two layers, the output with them, and the output without."""
    model = tiny.transformer("wan")
    plain = forward(model)
    path = tmp_path_factory.mktemp("weights") / "sla.safetensors"
    handle = fastdit.enable_sparse_attention(model, **SLA)
    torch.manual_seed(3)
    train(model)
    out = forward(model)
    handle.save_weights(path)
    return path, out, plain


@pytest.mark.parametrize("what", [torch.bfloat16, torch.float16, torch.float64, "meta"], ids=str)
def test_weights_are_in_fp32_whatever_the_defaults_of_torch(what, file):
    path, out, _ = file
    model = tiny.transformer("wan")
    with default(what):
        fastdit.enable_sparse_attention(model, **SLA, weights=str(path))
    loaded = {name: p for name, p in model.named_parameters() if name.startswith(ATTRIBUTE)}
    assert {(p.dtype, p.device.type) for p in loaded.values()} == {(torch.float32, "cpu")}
    kept = load_file(path)
    assert all(torch.equal(p, kept[name.replace(ATTRIBUTE, "transformer")]) for name, p in loaded.items())
    assert torch.equal(forward(model), out)
    for fields in ({"variant": "sla2", "mix_points": 3}, {"feature_map": "hedgehog"}):
        with default(what):
            made = fastdit.get_method("sla", **fields).make_weights(2, 16)
        assert {p.dtype for p in made.parameters()} == {torch.float32}


@pytest.mark.parametrize("fields", [{}, {"variant": "full"}, {"variant": "sla2", "feature_map": "hedgehog"}], ids=str)
@pytest.mark.parametrize("kind", ["wan", "cogvideox", "hunyuan_video"])
def test_training_reaches_the_weights_of_every_layer(kind, fields):
    model = tiny.transformer(kind).requires_grad_(False)
    fastdit.enable_sparse_attention(model, **SLA, **fields)
    arguments = tiny.arguments(kind, grid=(2, 6, 8))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**arguments).sample.square().mean().backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * (3 if fields.get("feature_map") else 2)
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
        assert all(grad.abs().max() > 0 for grad in gradients[-1].values())
        model.train().enable_gradient_checkpointing()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, msg=name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = model(**arguments).sample
    optimizer.step()
    assert not torch.equal(model(**arguments).sample, before)


def test_disabling_restores_the_model():
    model = tiny.transformer("wan")
    before, expected = copy.deepcopy(model.state_dict()), forward(model)
    for _ in range(2):
        fastdit.enable_sparse_attention(model, **SLA)
        names = list(model.state_dict())
        assert names[: len(before)] == list(before)
        assert names[len(before) :] == [
            f"{ATTRIBUTE}.{i}.projection.{name}" for i in "01" for name in ("weight", "bias")
        ]
        train(model)
        assert not torch.equal(forward(model), expected)
    fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    assert list(model.state_dict()) == list(before)
    fastdit.enable_sparse_attention(model, **SLA)
    fastdit.disable_sparse_attention(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not hasattr(model, ATTRIBUTE) and torch.equal(forward(model), expected)


def test_weights_follow_the_model_and_stay_in_single_precision():
    model = tiny.transformer("wan").bfloat16()
    fastdit.enable_sparse_attention(model, **SLA)
    weights = getattr(model, ATTRIBUTE)
    assert {p.dtype for p in weights.parameters()} == {torch.float32}
    model.to("meta")
    assert {p.device.type for p in weights.parameters()} == {"meta"}


def test_round_trip(file):
    path, expected, plain = file
    model = tiny.transformer("wan")
    handle = fastdit.enable_sparse_attention(model, **SLA)
    assert not torch.equal(forward(model), expected)
    handle.load_weights(path)
    assert torch.equal(forward(model), expected)
    handle = fastdit.enable_sparse_attention(model, **SLA, weights=str(path))
    assert torch.equal(forward(model), expected)
    assert handle.report()["method"]["weights"] == str(path)
    handle.disable()
    assert torch.equal(forward(model), plain)


def test_saving_the_model_saves_the_weights(file, tmp_path):
    path, _, plain = file
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **SLA, weights=str(path))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    learned = {name: value for name, value in saved.items() if name.startswith(ATTRIBUTE)}
    assert {name.removeprefix(f"{ATTRIBUTE}.") for name in learned} == {
        name.removeprefix("transformer.") for name in load_file(path)
    }
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(forward(loaded), plain)


def test_a_copy_has_weights_of_its_own(file):
    path, expected, _ = file
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **SLA, weights=str(path))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in getattr(model, ATTRIBUTE).parameters():
            parameter.zero_()
    assert torch.equal(forward(copied), expected)
    assert not torch.equal(forward(model), expected)
    fastdit.find_sparse_attention(copied).load_weights(path)
    fastdit.disable_sparse_attention(copied)
    assert not hasattr(copied, ATTRIBUTE) and hasattr(model, ATTRIBUTE)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", ["group", "sequential"])
def test_offloaded_models(file, offload, when):
    path, expected, _ = file
    cpu = torch.device("cpu")
    model = tiny.transformer("wan")

    def enable():
        fastdit.enable_sparse_attention(model, **SLA, weights=str(path))

    enable() if when == "after" else None
    if offload == "group":
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    else:
        import accelerate

        accelerate.cpu_offload(model, execution_device=cpu)
    enable() if when == "before" else None
    torch.testing.assert_close(forward(model), expected)
    if (offload, when) == ("sequential", "after"):
        assert next(getattr(model, ATTRIBUTE).parameters()).is_meta
        for act in (
            fastdit.find_sparse_attention(model).save_weights,
            fastdit.find_sparse_attention(model).load_weights,
        ):
            with pytest.raises(ValueError, match="the weights are offloaded, out of reach"):
                act(path)


def test_two_transformers(tmp_path):
    pipe = tiny.pipeline("wan22")
    handle = pipe.enable_sparse_attention(**SLA)
    train(pipe.transformer), train(pipe.transformer_2)
    expected = tiny.run(pipe)
    path = tmp_path / "both.safetensors"
    handle.save_weights(path)
    assert {name.split(".")[0] for name in load_file(path)} == {"transformer", "transformer_2"}
    pipe.enable_sparse_attention(**SLA, weights=str(path))
    assert torch.equal(tiny.run(pipe), expected)
    pipe.disable_sparse_attention()
    with pytest.raises(ValueError, match=r"made for something else: transformer_2 is \{.*\} in the file, None here"):
        fastdit.enable_sparse_attention(pipe.transformer, **SLA, weights=str(path))
    single = tmp_path / "one.safetensors"
    fastdit.enable_sparse_attention(pipe.transformer, **SLA).save_weights(single)
    with pytest.raises(ValueError, match=r"made for something else: transformer_2 is None in the file"):
        pipe.enable_sparse_attention(**SLA, weights=str(single))


def broken(path, out, case):
    """Write a file that is wrong in one way."""
    if case == "corrupt":
        out.write_bytes(path.read_bytes()[:-100])
        return
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    name = "transformer.1.projection.weight"
    if case == "foreign":
        metadata = {"format": "pt"}
    elif case == "missing tensor":
        del tensors[name]
    elif case == "extra tensor":
        tensors["transformer.2.projection.weight"] = tensors[name].clone()
    elif case == "shape":
        tensors[name] = torch.zeros(3, 3)
    elif case == "values":
        tensors[name][0, 0] = torch.nan
    save_file(tensors, out, metadata)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("corrupt", "cannot be read as safetensors"),
        ("foreign", "was not made by save_weights"),
        ("missing tensor", r"are broken: transformer\.1\.projection\.weight is missing"),
        ("extra tensor", r"are broken: transformer\.2\.projection\.weight"),
        ("shape", r"are broken: transformer\.1\.projection\.weight"),
        ("values", r"are broken: transformer\.1\.projection\.weight .* or not finite"),
    ],
)
def test_bad_files_change_nothing(file, tmp_path, case, message):
    path, expected, plain = file
    bad = tmp_path / "bad.safetensors"
    broken(path, bad, case)
    model = tiny.transformer("wan")
    with pytest.raises(ValueError, match=message):
        fastdit.enable_sparse_attention(model, **SLA, weights=str(bad))
    assert not hasattr(model, ATTRIBUTE) and torch.equal(forward(model), plain)
    handle = fastdit.enable_sparse_attention(model, **SLA, weights=str(path))
    with pytest.raises(ValueError, match=message):
        handle.load_weights(bad)
    with pytest.raises(ValueError, match=message):
        fastdit.enable_sparse_attention(model, **SLA, weights=str(bad))
    assert fastdit.find_sparse_attention(model) is handle and torch.equal(forward(model), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "full"}, "variant is 'paper' in the file, 'full' here"),
        ({"feature_map": "relu"}, "feature_map is 'softmax' in the file, 'relu' here"),
        ({"layers": 4}, "'layers': 2.*'layers': 4"),
        ({"head_dim": 32}, "'head_dim': 16.*'head_dim': 32"),
    ],
)
def test_weights_of_something_else(file, change, message):
    of_model = {name: value for name, value in change.items() if name in ("layers", "head_dim")}
    of_method = {name: value for name, value in change.items() if name not in of_model}
    with pytest.raises(ValueError, match=f"made for something else: .*{message}"):
        fastdit.enable_sparse_attention(tiny.transformer("wan", **of_model), **SLA, weights=str(file[0]), **of_method)


def test_no_file_and_no_weights(file, tmp_path):
    model = tiny.transformer("wan")
    with pytest.raises(FileNotFoundError, match=r"no file of weights at .*nowhere\.safetensors"):
        fastdit.enable_sparse_attention(model, **SLA, weights=str(tmp_path / "nowhere.safetensors"))
    assert fastdit.find_sparse_attention(model) is None
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    assert not hasattr(model, ATTRIBUTE)
    for act in (handle.save_weights, handle.load_weights):
        with pytest.raises(ValueError, match="method 'draft' learns nothing"):
            act(file[0])

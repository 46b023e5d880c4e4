"""Scores are what their definitions say, taken beside an untouched video, and kept in files that can be used again."""

import gc
import json
import math

import numpy as np
import pytest
import test_methods
import tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastdit
from fastdit import metrics
from fastdit.attention import AttentionMethod, MethodState, get_method
from fastdit.pipelines import find_family
from fastdit.search.capture import capturing
from fastdit.search.sampling import SampledSteps, Sampling
from fastdit.search.scores import CallScores, Scores, digest
from fastdit.search.scoring import Reference, frame_mass, head_grams, projected_energy, sampled_recall
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

CANDIDATES = [
    get_method("dense"),
    get_method("draft", density=0.3, tile=(1, 4, 4)),
    get_method("draft", density=1.0, tile=(1, 4, 4)),
    get_method("radial", block_size=16, min_band=64),
]
FIRST = SampledSteps(sampling=Sampling(steps=(0,)))
BOTH_ENDS = SampledSteps(sampling=Sampling(steps=(0, 2)))


class Broken(AttentionMethod):
    """Give what it is told to."""

    name = "broken"

    def __init__(self, give):
        object.__setattr__(self, "give", give)

    def pattern(self, q, k, call, state):
        raise NotImplementedError

    def forward(self, q, k, v, call, state):
        state.kept = torch.zeros(())
        return self.give(v)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_output_projection_is_the_one_the_attention_goes_through(kind):
    model = tiny.transformer(kind)
    family = find_family(model)
    outputs, inputs = {}, {}
    for layer, (path, _) in enumerate(family.self_attentions(model)):
        linear = family.output_projection(model, path)
        linear.register_forward_pre_hook(lambda _, x, layer=layer: inputs.update({layer: x[0]}))

    class Watch(tiny.Recorder):
        def forward(self, q, k, v, call, state):
            mask = None if call.key_padding is None else ~call.key_padding[:, None, None]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            outputs.setdefault(call.layer, out[:, :, call.tokens.video])
            return out

    with torch.no_grad(), fastdit.sparse_attention(model, Watch()):
        model(**tiny.arguments(kind))
    assert len(inputs) == len(outputs) == len(family.self_attentions(model))
    for layer, out in outputs.items():
        flat = out.transpose(1, 2).flatten(2)
        tokens = flat.shape[1]
        text = inputs[layer].shape[1] - tokens if kind.startswith("cogvideox") else 0
        assert torch.equal(inputs[layer][:, text : text + tokens, : flat.shape[2]], flat)


@pytest.mark.parametrize("wider", [0, 24])
def test_errors_are_those_of_projected_heads(wider):
    spec = TokenSpec(VideoGrid(3, 7, 9), 5, True)
    linear = torch.nn.Linear(3 * 16 + wider, 40)
    linear.bias.data *= 100
    dense, out = torch.randn(2, 2, 3, spec.num_tokens, 16)
    call = AttentionCall(spec)
    weight = linear.weight[:, :48].detach().double().view(40, 3, 16)
    video = spec.video
    whole = torch.einsum("bhsd,ohd->bso", dense[:, :, video].double(), weight)
    parts = torch.einsum("bhsd,ohd->bhso", (out - dense)[:, :, video].double(), weight)
    with torch.no_grad():
        error, own = Reference.of(dense, call, linear).errors(out)
    torch.testing.assert_close(error, (parts.flatten(2).norm(dim=2).square().sum(0).sqrt() / whole.norm()).float())
    for head in range(3):
        expected = metrics.relative_l2(out[:, head, video], dense[:, head, video])
        torch.testing.assert_close(own[head], expected)


def test_errors_of_text_do_not_count_and_broken_numbers_show():
    spec = TokenSpec(VideoGrid(2, 4, 4), 6)
    linear, call = torch.nn.Linear(32, 32), AttentionCall(spec)
    dense = torch.randn(1, 2, spec.num_tokens, 16)
    with torch.no_grad():
        reference = Reference.of(dense, call, linear)
        wrong = dense.clone()
        wrong[:, :, spec.text] = 7
        assert [e.tolist() for e in reference.errors(wrong)] == [[0, 0], [0, 0]]
        wrong[:, 1, 3] = torch.nan
        assert all(e[0] == 0 and e[1].isnan() for e in reference.errors(wrong))
        nothing = Reference.of(torch.zeros_like(dense), call, linear)
        assert [e.tolist() for e in nothing.errors(torch.zeros_like(dense))] == [[0, 0], [0, 0]]


def test_grams_in_half_precision_do_not_drown_in_the_bias():
    linear = torch.nn.Linear(64, 96, dtype=torch.bfloat16)
    linear.bias.data += 3
    like = torch.randn(1, 2, 50, 32, dtype=torch.bfloat16)
    weight = linear.weight.detach().float()
    with torch.no_grad():
        grams = head_grams(linear, like)
        energy = projected_energy(linear, like)
    for head, columns in enumerate(weight.split(32, dim=1)):
        torch.testing.assert_close(grams[head], columns.T @ columns, rtol=0.02, atol=0.02)
    expected = (like.float().transpose(1, 2).flatten(2) @ weight.T).square().sum()
    torch.testing.assert_close(energy, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("text", test_methods.TEXTS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", CANDIDATES[1::2], ids=lambda method: method.name)
def test_recall_is_the_softmax_mass_of_what_is_kept(method, text, padded):
    spec = TokenSpec(VideoGrid(3, 9, 11), *text)
    padding = torch.zeros(2, spec.num_tokens, dtype=torch.bool)
    padding[1, spec.text.start + 4 : spec.text.stop] = True
    call = AttentionCall(spec, scale=0.6, key_padding=padding if padded else None)
    q, k, _ = test_methods.qkv(spec, batch=2)
    pattern = method.pattern(q, k, call, MethodState())
    tokens = pattern.layout.padded_tokens
    inverse = pattern.layout.inverse[0]
    kept = pattern.mask.to_tokens(tokens, tokens)[:, :, inverse][..., inverse]
    scores = (q @ k.mT * 0.6).masked_fill(padding[:, None, None] & padded, -math.inf)
    expected = (scores.softmax(-1) * kept)[:, :, spec.video].sum(-1).mean((0, 2))
    torch.testing.assert_close(sampled_recall(q, k, pattern, call, rows=10_000), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sampled_recall(q, k, pattern, call, rows=60), expected, rtol=0.2, atol=0.02)


@pytest.mark.parametrize("text", test_methods.TEXTS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_frame_mass_is_attention_by_the_distance_of_frames(text, padded):
    spec = TokenSpec(VideoGrid(3, 9, 11), *text)
    padding = torch.zeros(2, spec.num_tokens, dtype=torch.bool)
    padding[1, spec.text.start + 4 : spec.text.stop] = True
    call = AttentionCall(spec, scale=0.6, key_padding=padding if padded else None)
    q, k, _ = test_methods.qkv(spec, batch=2)
    scores = (q @ k.mT * 0.6).masked_fill(padding[:, None, None] & padded, -math.inf)
    frames = scores.softmax(-1)[:, :, spec.video, spec.video].unflatten(2, (3, 99)).unflatten(4, (3, 99)).sum(5)
    frames = frames.mean((0, 3)) / 3  # of each head, query frame, key frame
    expected = torch.stack(
        [frames.diagonal(d, 1, 2).sum(-1) + (d > 0) * frames.diagonal(-d, 1, 2).sum(-1) for d in range(3)], 1
    )
    torch.testing.assert_close(frame_mass(q, k, call, rows=10_000), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frame_mass(q, k, call, rows=60), expected, rtol=0.2, atol=0.02)
    assert text[0] or frame_mass(q, k, call).sum(1).tolist() == pytest.approx([1] * q.shape[1])


@pytest.mark.parametrize("kind", tiny.PIPELINES)
def test_a_captured_video_is_untouched_and_every_call_is_scored(kind):
    pipe = tiny.pipeline(kind)
    expected = tiny.run(pipe)
    with capturing(pipe, CANDIDATES, BOTH_ENDS) as scores:
        got = tiny.run(pipe)
    assert torch.equal(got, expected)
    assert pipe.sparse_attention is None and torch.equal(tiny.run(pipe), expected)
    layers = 3 if kind == "vace" else 2
    branches = {"cond_uncond"} if kind in ("cogvideox", "cogvideox15", "mochi", "ltx") else {"cond", "uncond"}
    branches = {"cond"} if kind == "hunyuan_video" else branches
    titles = {0: "transformer", 2: "transformer_2" if kind == "wan22" else "transformer"}
    seen = {(call.title, call.step, call.branch, call.layer) for call in scores.calls}
    assert seen == {(titles[s], s, b, layer) for s in (0, 2) for b in branches for layer in range(layers)}
    assert len(scores.calls) == len(seen) * (2 if kind == "mochi" else 1)  # which calls attention once per sample
    assert scores.num_steps == 3 and set(scores.shapes) == set(titles.values())
    assert scores.steps == (
        {"transformer": [0], "transformer_2": [1, 2]} if kind == "wan22" else {"transformer": [0, 1, 2]}
    )
    for call in scores.calls:
        for array in (call.error, call.head_error, call.recall, call.density):
            assert array.shape == (4, tiny.HEADS) and np.isfinite(array).all()
        assert call.mass.shape == (tiny.HEADS, scores.shapes[call.title].tokens.grid.frames)
        assert (call.mass.sum(1) > 0).all() and (call.mass.sum(1) < 1 + 1e-5).all()
        assert (call.error[[0, 2]] < 1e-5).all() and (call.error[1] > 0.01).all()
        assert (call.density[[0, 2]] == 1).all() and (call.density[1] < 0.6).all()
        assert (np.abs(call.recall[[0, 2]] - 1) < 1e-5).all() and (call.recall[1] < 0.9).all()


def test_scores_are_those_of_the_candidate_by_itself():
    model = tiny.transformer("wan")
    kept = []

    class Keep(tiny.Recorder):
        def forward(self, q, k, v, call, state):
            kept.append((q, k, v, call))
            return F.scaled_dot_product_attention(q, k, v)

    with torch.no_grad(), fastdit.sparse_attention(model, Keep()):
        model(**tiny.arguments("wan") | {"timestep": torch.full((1,), 1000.0)})
    pipe = tiny.pipeline("wan")
    model.requires_grad_(False)
    with capturing(pipe, CANDIDATES, FIRST) as scores, torch.no_grad():
        pipe.scheduler.set_timesteps(2)
        pipe.transformer(**tiny.arguments("wan") | {"timestep": pipe.scheduler.timesteps[:1]})
    q, k, v, call = kept[1]
    linear = model.blocks[1].attn1.to_out[0]
    whole = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ linear.weight.T
    scored = next(c for c in scores.calls if c.layer == 1)
    for index in (1, 3):
        state = MethodState()
        difference = CANDIDATES[index].forward(q, k, v, call, state) - F.scaled_dot_product_attention(q, k, v)
        for head in range(2):
            columns = linear.weight[:, head * tiny.HEAD_DIM : (head + 1) * tiny.HEAD_DIM]
            error = float((difference[:, head] @ columns.T).norm() / whole.norm())
            assert scored.error[index, head] == pytest.approx(error, rel=1e-3)
        assert scored.density[index].mean() == pytest.approx(float(state.kept), rel=1e-5)


def test_a_method_that_learns_from_a_dense_first_call_is_judged_by_its_second():
    class Late(AttentionMethod):
        name = "late"

        def pattern(self, q, k, call, state):
            raise NotImplementedError

        def forward(self, q, k, v, call, state):
            known = "known" in state.memory
            state.memory["known"] = True
            state.kept = torch.tensor(0.25 if known else 1.0)
            return 2 * v if known else F.scaled_dot_product_attention(q, k, v)

    pipe = tiny.pipeline("wan")
    with capturing(pipe, [CANDIDATES[0], Late()], FIRST) as scores:
        tiny.run(pipe, steps=1)
    for call in scores.calls:
        assert (call.density[1] == 0.25).all() and (call.error[1] > 0.1).all() and np.isnan(call.recall[1]).all()


def test_changes_are_those_of_one_sparse_layer():
    pipe = tiny.pipeline("wan22", layers=3)
    expected = tiny.run(pipe)
    with capturing(pipe, CANDIDATES, BOTH_ENDS, changes=True) as scores:
        got = tiny.run(pipe)
    assert torch.equal(got, expected)
    places = [(c.title, c.step, c.branch, c.layer) for c in scores.changes]
    assert places == [
        (title, step, "cond", layer) for title, step in (("transformer", 0), ("transformer_2", 2)) for layer in range(3)
    ]
    model, outputs = pipe.transformer, {}
    hook = model.register_forward_hook(lambda _, __, out: outputs.setdefault("first", out[0]))
    for change in scores.changes[:3]:
        assert change.candidate in (1, 3) and change.error > 0
        outputs.clear()
        others = tuple(layer for layer in range(3) if layer != change.layer)
        dense = fastdit.Schedule(dense_layers=others)
        with fastdit.sparse_attention(pipe, CANDIDATES[change.candidate], schedule=dense):
            tiny.run(pipe)
        sparse = outputs.pop("first")
        tiny.run(pipe)
        relative = metrics.relative_l2(sparse, outputs["first"])
        assert change.change == pytest.approx(float(relative), rel=1e-3)
    hook.remove()


class Largest(TorchDispatchMode):
    """Write down the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_nothing_of_the_size_of_a_map_is_made_and_nothing_of_a_call_is_kept():
    pipe = tiny.pipeline("wan")
    candidates = [*CANDIDATES, get_method("draft", density=0.2, tile=(4, 4, 4))]
    tokens = 7 * 20 * 20
    gc.collect()
    before = {id(x) for x in gc.get_objects() if type(x) is torch.Tensor}
    with capturing(pipe, candidates, FIRST, changes=True) as scores:
        with Largest() as largest:
            tiny.run(pipe, steps=1, size=(25, 320, 320), guidance=1.0)
        assert scores.shapes["transformer"].tokens.num_tokens == tokens and len(scores.calls) == 2
        gc.collect()
        left = [x for x in gc.get_objects() if type(x) is torch.Tensor and id(x) not in before]
        assert max((x.numel() for x in left if x.is_floating_point()), default=0) < tokens
    assert largest.numel < tokens * tokens / 2


def test_what_cannot_be_captured_says_so():
    pipe = tiny.pipeline("wan")
    fastdit.enable_sparse_attention(pipe, "radial")
    with pytest.raises(ValueError, match="enabled on this pipeline"), capturing(pipe, CANDIDATES, FIRST):
        pass
    assert pipe.sparse_attention is not None
    pipe.disable_sparse_attention()

    def fail(v):
        raise RuntimeError("no such kernel")

    failing = capturing(pipe, [CANDIDATES[0], Broken(fail)], FIRST)
    with pytest.raises(RuntimeError, match=r"Broken.* cannot run on this model: no such kernel; leave it out"), failing:
        tiny.run(pipe, steps=1)
    assert pipe.sparse_attention is None
    with pytest.raises(ValueError, match="number of denoising steps"), capturing(pipe.transformer, CANDIDATES, FIRST):
        pipe.transformer(**tiny.arguments("wan"))


def captured(changes=False):
    pipe = tiny.pipeline("wan")
    with capturing(pipe, [*CANDIDATES, Broken(lambda v: v * torch.nan)], FIRST, changes=changes) as scores:
        tiny.run(pipe, steps=1)
    return scores


def test_scores_survive_a_file(tmp_path):
    scores, path = captured(changes=True), tmp_path / "deep" / "scores.json"
    settings = {"prompt": "a \u2603 \U0001f3a5", "sizes": (1, 2.5, None)}
    scores.save(path, settings)
    again = Scores.load(path, settings)
    assert list(path.parent.iterdir()) == [path]
    assert again.shapes == scores.shapes and again.changes == scores.changes and again.steps == scores.steps
    assert again.num_steps == 1 and len(again.calls) == len(scores.calls) == 4
    for a, b in zip(again.calls, scores.calls, strict=True):
        assert (a.title, a.step, a.branch, a.layer) == (b.title, b.step, b.branch, b.layer)
        assert np.isnan(b.error[4]).all() and np.isnan(b.recall[4]).all()
        for name in ("error", "head_error", "recall", "density", "mass"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-5)


def test_scores_of_other_settings_or_damaged_ones_are_not_used(tmp_path):
    path = tmp_path / "scores.json"
    assert Scores.load(path, {}) is None
    captured().save(path, {"steps": 3})
    assert Scores.load(path, {"steps": 4}) is None
    text = path.read_text()
    content = json.loads(text)
    damaged = [
        text[:-20],
        "[]",
        "",
        "null",
        json.dumps({**content, "calls": [{}]}),
        json.dumps({**content, "shapes": 3}),
    ]
    for wrong in damaged:
        path.write_text(wrong)
        with pytest.warns(UserWarning, match="taken again"):
            assert Scores.load(path, {"steps": 3}) is None
    path.write_text(json.dumps({**content, "version": 0}))
    assert Scores.load(path, {"steps": 3}) is None


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path, scores = tmp_path / "scores.json", captured()
    scores.save(path, {"n": 1})
    before = path.read_bytes()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        scores.save(path, {"n": 2})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_digest_tells_settings_apart():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert len({digest({"a": 1}), digest({"a": 2}), digest({"b": 1})}) == 3


def test_the_typical_candidate_is_in_the_middle_of_those_that_leave_something_out():
    error = np.array([[0], [0.5], [0.1], [0.9], [1e-7], [np.nan]], np.float32)
    density = np.array([[1], [0.2], [0.5], [0.1], [1], [0.3]], np.float32)
    place, mass = ("transformer", 0, "cond", 0), np.ones((1, 1), np.float32)
    assert CallScores(*place, error, error, error, density, mass).typical_candidate() == 1
    assert CallScores(*place, error, error, error, np.ones_like(density), mass).typical_candidate() is None

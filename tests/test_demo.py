"""The demo model: its world, its scorer, the tricks of its training, and its weights."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdit.demo import DEFAULTS, WEIGHTS, DemoWeightsError, load_pipeline
from fastdit.demo.captions import (
    HELD_OUT_CAPTIONS,
    is_held_out,
    normalize_prompt,
    parse_caption,
    sample_attributes,
    write_caption,
)
from fastdit.demo.scorer import read_clip
from tools.train_demo.models import build_pipeline, build_text_encoder, build_tokenizer, build_transformer
from tools.train_demo.optim import load_checkpoint, lr_factor, save_checkpoint
from tools.train_demo.scenes import sample_scene
from tools.train_demo.subsets import (
    TEXT_TOKENS,
    PaddedTextProcessor,
    PlacedRope,
    Subset,
    gather_tokens,
    subset_training,
)
from tools.train_demo.train_dit import CaptionTable, train_dit

GRID = (4, 8, 8)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Captions


def test_captions_and_attributes_round_trip():
    rng = random.Random(0)
    for _ in range(200):
        attributes = sample_attributes(rng)
        assert parse_caption(write_caption(attributes)) == attributes
        assert parse_caption(write_caption(attributes, color_first=True)) == attributes


@pytest.mark.parametrize("caption", HELD_OUT_CAPTIONS)
def test_held_out_captions_are_written_as_captions(caption):
    assert write_caption(parse_caption(caption)) == caption
    assert is_held_out(parse_caption(caption))


@pytest.mark.parametrize(
    ("prompt", "means"),
    [
        ("A red ball bouncing over a striped floor!", "red circle bouncing on striped background"),
        ("the large violet box slides upwards", "big purple square moving up"),
        ("a grey cone, rising", "gray triangle moving up"),
    ],
)
def test_prompts_in_other_words(prompt, means):
    assert normalize_prompt(prompt) == means
    ids = build_tokenizer()(prompt).input_ids
    assert ids == build_tokenizer()(means).input_ids
    assert build_tokenizer().unk_token_id not in ids


def test_free_prompt_is_parsed():
    read = parse_caption("a red ball bouncing over a striped floor")
    assert (read.color, read.shape, read.motion) == ("red", "circle", "bouncing")
    assert (read.background, read.kind) == (None, "striped")


# Scenes and scorer


def test_scenes_are_seeded():
    first, again, other = (sample_scene(seed, num_frames=9) for seed in (3, 3, 4))
    assert first.caption == again.caption
    assert np.array_equal(first.render(32, 32), again.render(32, 32))
    assert not np.array_equal(first.render(32, 32), other.render(32, 32))


def test_a_part_of_a_scene_equals_the_part_of_the_whole():
    scene = sample_scene(5, num_frames=9)
    part = scene.render(64, 64, slice(2, 5), slice(8, 40), slice(16, 64))
    assert np.array_equal(part, scene.render(64, 64)[2:5, 8:40, 16:64])


def test_asked_attributes_are_shown():
    wanted = parse_caption("a big green circle moving up on a striped background")
    scene = sample_scene(0, attributes=wanted)
    assert scene.attributes == wanted
    assert scene.shown.background is not None


def test_scorer_reads_ground_truth():
    for seed in range(60):
        scene = sample_scene(seed)
        score = read_clip(scene.render(96, 96)).score(scene.shown)
        assert all(score.values()), (scene.caption, score)


def test_scorer_sees_what_is_wrong():
    wanted = parse_caption("a red circle moving left on a blue background")
    shown = parse_caption("a green square moving right on a blue background")
    score = read_clip(sample_scene(1, attributes=shown).render(96, 96)).score(wanted)
    expected = {"color": False, "shape": False, "motion": False, "background": True, "all": False}
    assert score == expected


def test_scorer_of_an_empty_clip():
    reading = read_clip(np.full((5, 16, 16, 3), 0.1, np.float32))
    assert reading.color is None and reading.motion is None and reading.background == "black"


# The tricks of training on subsets


@pytest.mark.parametrize("subset", [Subset((1, 4, 4)), Subset((2, 2, 2)), Subset((2, 3, 3), (2, 4, 4))])
def test_subset_places(subset):
    places = subset.draw(GRID, torch.Generator().manual_seed(0))
    assert len(places.unique(dim=0)) == len(places)
    assert (places >= 0).all() and (places < torch.tensor(GRID)).all()
    latents = torch.arange(4 * 8 * 8).view(1, 1, *GRID)
    flat = places @ torch.tensor([64, 8, 1])
    assert torch.equal(gather_tokens(latents, places)[0, 0], flat)


def test_placed_rope_equals_the_stock_rope():
    stock = build_transformer().rope
    placed = PlacedRope(stock)
    video = torch.zeros(1, 8, *GRID)
    places = Subset((2, 2, 2)).draw(GRID, torch.Generator().manual_seed(0))
    flat = places @ torch.tensor([64, 8, 1])
    placed.places = places
    for at_places, everywhere in zip(placed(video), stock(video), strict=True):
        assert torch.equal(at_places, everywhere[:, flat])


def test_all_tokens_as_a_subset_equal_the_stock_model():
    torch.manual_seed(0)
    model = build_transformer().eval()
    video, sigma = torch.randn(2, 8, *GRID), torch.tensor([0.7, 0.2])
    text = torch.randn(2, TEXT_TOKENS, 64)
    text[:, 9:] = 0
    long = torch.cat([text, torch.zeros(2, 512 - TEXT_TOKENS, 64)], 1)
    places = torch.ones(GRID, dtype=torch.bool).nonzero()
    with torch.no_grad():
        expected = model(video, sigma * 1000, long, return_dict=False)[0].flatten(2)
        with subset_training(model) as view:
            got = view(gather_tokens(video, places), places, sigma, text, 512)
        after = model(video, sigma * 1000, long, return_dict=False)[0].flatten(2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(after, expected)


def test_log_497_equals_497_zero_tokens():
    torch.manual_seed(0)
    attention = build_transformer().double().blocks[0].attn2
    hidden, text = torch.randn(1, 5, 128).double(), torch.randn(1, TEXT_TOKENS, 128).double()
    long = torch.cat([text, text[:, -1:].expand(-1, 496, -1)], 1)
    expected = attention(hidden, long, None, None)
    processor = PaddedTextProcessor()
    processor.repeats = 497
    attention.set_processor(processor)
    torch.testing.assert_close(attention(hidden, text, None, None), expected, rtol=0, atol=1e-12)


def test_captions_are_embedded_as_the_pipeline_does():
    pipeline = build_pipeline()
    caption = HELD_OUT_CAPTIONS[0]
    expected = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    assert expected.shape == (1, 512, 64)
    table = CaptionTable("cpu")
    torch.testing.assert_close(table([caption])[0], expected[0, :TEXT_TOKENS])
    assert not expected[0, TEXT_TOKENS - 1 :].any()
    with pytest.raises(ValueError, match="15 are allowed"):
        table(["red " * 20])


def test_words_keep_their_roles():
    encoder, tokenizer = build_text_encoder(), build_tokenizer()
    texts = [
        encoder(tokenizer(f"a {a} circle moving up on a {b} background", return_tensors="pt").input_ids)
        for a, b in (("red", "blue"), ("blue", "red"))
    ]
    first, second = (t.last_hidden_state for t in texts)
    assert (first - second).norm() > 0.1 * first.norm()


# Training and resuming


@pytest.fixture
def work(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 8, *GRID, generator=generator).half()
    captions = [sample_scene(i).caption for i in range(4)]
    save_checkpoint(tmp_path / "latents" / "00000.pt", latents=latents, captions=captions)
    save_checkpoint(tmp_path / "statistics.pt", mean=torch.zeros(8), std=torch.ones(8))
    return tmp_path


def test_training_resumes_where_it_was(work):
    def train(folder: Path, steps: int) -> None:
        train_dit(folder, steps, "cpu", 0, check_every=0)

    train(work, 2)
    (work / "dit.pt").rename(work / "whole.pt")
    train(work, 1)
    assert load_checkpoint(work / "dit.pt")["step"] == 1
    # in so short a run neither the learning rate nor the kinds of steps depend on the whole length
    train(work, 2)
    resumed, whole = (load_checkpoint(work / name) for name in ("dit.pt", "whole.pt"))
    assert resumed["step"] == whole["step"] == 2
    for part in ("model", "average", "optimizer"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
    lines = [json.loads(line) for line in (work / "dit.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="latents stage"):
        train_dit(tmp_path, 1, "cpu", 0)


def test_learning_rate_schedule():
    factors = [lr_factor(step, 1000) for step in range(1001)]
    assert max(factors) == 1.0 and factors[0] < 0.05 and factors[500] == 1.0
    assert factors[-1] == pytest.approx(0.02)


# The packaged weights


def test_weights_are_small():
    size = sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file())
    assert size <= 8_000_000


def test_pipeline_loads_and_denoises():
    pipeline = load_pipeline()
    assert pipeline.transformer.dtype == torch.float32
    clip = pipeline(
        "a red ball bouncing over a striped floor",
        num_frames=5,
        height=32,
        width=32,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames
    assert clip.shape == (1, 5, 32, 32, 3)
    assert np.isfinite(clip).all()


def test_default_clip_is_large_enough():
    tokens = (1 + (DEFAULTS.num_frames - 1) // 4) * (DEFAULTS.height // 8) * (DEFAULTS.width // 8)
    assert tokens >= 5000


def test_missing_weights_are_said(monkeypatch, tmp_path):
    monkeypatch.setattr("fastdit.demo.WEIGHTS", tmp_path)
    with pytest.raises(DemoWeightsError, match="weights are missing"):
        load_pipeline()


def test_damaged_weights_are_said(monkeypatch, tmp_path):
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").write_bytes(b"short")
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr("fastdit.demo.WEIGHTS", tmp_path)
    with pytest.raises(DemoWeightsError, match=r"model\.safetensors is not a whole .* 5 bytes|5 bytes"):
        load_pipeline()

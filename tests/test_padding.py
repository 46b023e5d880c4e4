"""Padded text: which masks are understood, and that no query attends to padding."""

from types import SimpleNamespace

import pytest
import tiny
import torch

import fastdit
from fastdit.pipelines import padding
from fastdit.pipelines.padding import Answer, PaddingReader

SPEC = fastdit.TokenSpec(fastdit.VideoGrid(1, 2, 2), 4)


def read(mask, batch=2):
    return PaddingReader().read(mask, SPEC, batch, "cond")


def test_key_padding_is_read_in_every_shape():
    keep = torch.ones(2, 8, dtype=torch.bool)
    keep[1, 6:] = False
    for mask in (keep, keep[:, None, None]):
        padding, reason = read(mask)
        assert reason is None and torch.equal(padding, ~keep)
    padding, reason = read(keep[1:, None, None])
    assert reason is None and torch.equal(padding, ~keep[1:].expand(2, -1))
    assert read(None) == (None, None)
    assert read(torch.ones(2, 8, dtype=torch.bool)) == (None, None)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.zeros(2, 1, 1, 8), "additive float32 mask"),
        (torch.ones(2, 1, 8, 8, dtype=torch.bool), r"shape \(2, 1, 8, 8\)"),
        (torch.ones(2, 7, dtype=torch.bool), r"shape \(2, 7\)"),
        (torch.ones(3, 8, dtype=torch.bool), r"shape \(3, 8\)"),
        (torch.tensor([[False] + [True] * 7] * 2), "masks video tokens"),
        (torch.tensor([[True] * 5 + [False, True, True]] * 2), "not at the end of the text"),
        (SimpleNamespace(), "SimpleNamespace of its own"),
    ],
)
def test_masks_that_no_pattern_honours(mask, reason):
    padding, objection = read(mask)
    assert padding is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(objection)


def test_masks_are_read_once_per_forward_and_source():
    reader = PaddingReader()
    keep = torch.ones(1, 8, dtype=torch.bool)
    keep[0, 7] = False
    first, _ = reader.read(keep, SPEC, 1, "cond")
    assert reader.read(keep.view(1, 8), SPEC, 1, "cond")[0] is first
    reader.end_forward()
    keep[0, 6] = False
    second, _ = reader.read(keep, SPEC, 1, "cond")
    assert torch.equal(second, ~keep)
    source = torch.ones(3)
    reader.end_forward()
    third, _ = reader.read(keep.clone(), SPEC, 1, "cond", source)
    reader.end_forward()
    assert reader.read(keep.clone(), SPEC, 1, "cond", source)[0] is third
    reader.end_forward()
    assert reader.read(keep.clone(), SPEC, 1, "uncond", source)[0] is not third
    source.add_(1)
    reader.end_forward()
    assert reader.read(keep.clone(), SPEC, 1, "cond", source)[0] is not third


def test_a_source_of_inference_mode_is_read_at_every_forward():
    """Its changes are not counted, so that nothing tells whether an earlier answer still holds."""
    reader = PaddingReader()
    with torch.inference_mode():
        source, keep = torch.ones(3), torch.ones(1, 8, dtype=torch.bool)
        for place in (7, 6):
            keep[0, place] = False
            found, _ = reader.read(keep, SPEC, 1, "cond", source)
            assert torch.equal(found, ~keep) and reader.read(keep.view(1, 8), SPEC, 1, "cond", source)[0] is found
            reader.end_forward()


def test_each_device_has_a_padding_of_its_own(monkeypatch):
    """Of layers spread over devices each gets a copy of the mask; one made before is found again at the next step."""
    monkeypatch.setattr(padding, "_convert", lambda mask, tokens, batch: Answer(mask.clone()))
    reader, source = PaddingReader(), torch.ones(3)
    masks = {device: torch.ones(1, 8, dtype=torch.bool, device=device) for device in ("cpu", "meta")}
    first = {}
    for step in range(2):
        for device, mask in masks.items():
            found, _ = reader.read(mask.clone(), SPEC, 1, "cond", source)
            assert found.device.type == device and found is first.setdefault(device, found), step
        reader.end_forward()


def test_padded_text_in_inference_mode():
    pipe = tiny.pipeline("hunyuan_video")
    pipe.enable_sparse_attention(**tiny.DRAFT, schedule=tiny.EVERY_STEP)
    expected = tiny.run(pipe)
    with torch.inference_mode():
        assert torch.equal(tiny.run(pipe), expected)
    assert pipe.sparse_attention.report()["totals"]["fallbacks"] == {}


def test_padding_is_the_same_tensor_at_every_step():
    pipe = tiny.pipeline("hunyuan_video")
    recorder = tiny.Recorder()
    pipe.enable_sparse_attention(recorder, schedule=tiny.EVERY_STEP)
    tiny.run(pipe)
    paddings = {id(call.key_padding) for call in recorder.calls}
    assert len(recorder.calls) == 6 and len(paddings) == 1 and recorder.calls[0].key_padding.sum() == 3


def test_hunyuan_video_padding_is_not_attended_to():
    model = tiny.transformer("hunyuan_video")
    arguments = tiny.arguments("hunyuan_video")
    with torch.no_grad():
        dense = model(**arguments).sample
        fastdit.enable_sparse_attention(model, "draft", density=1.0, tile=(1, 4, 4))
        torch.testing.assert_close(model(**arguments).sample, dense, rtol=1e-4, atol=1e-5)

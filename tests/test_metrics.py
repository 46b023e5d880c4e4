"""Metrics against scikit-image and against their definitions."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fastdit import metrics


def videos(frames=3, height=23, width=40, noise=0.1, seed=0):
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    clean = np.stack([0.5 + 0.4 * np.sin((rows + 2 * columns + 3 * f) / 7) for f in range(frames)])
    clean = np.repeat(clean[..., None], 3, -1)
    noisy = np.clip(clean + generator.normal(0, noise, clean.shape), 0, 1)
    return torch.from_numpy(clean), torch.from_numpy(noisy)


@pytest.mark.parametrize("noise", [0.002, 0.1, 0.5])
@pytest.mark.parametrize("size", [(11, 11), (23, 40), (64, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_psnr_and_ssim_equal_scikit_image(noise, size, dtype):
    clean, noisy = (x.to(dtype) for x in videos(height=size[0], width=size[1], noise=noise))
    expected = [
        structural_similarity(
            a.double().numpy(),
            b.double().numpy(),
            channel_axis=-1,
            data_range=1.0,
            gaussian_weights=True,
            use_sample_covariance=False,
        )
        for a, b in zip(noisy, clean, strict=True)
    ]
    assert metrics.ssim(noisy, clean, per_frame=True).tolist() == pytest.approx(expected, abs=1e-4)
    assert float(metrics.ssim(noisy, clean)) == pytest.approx(np.mean(expected), abs=1e-4)
    assert float(metrics.psnr(noisy, clean)) == pytest.approx(
        peak_signal_noise_ratio(clean.double().numpy(), noisy.double().numpy(), data_range=1.0), abs=1e-4
    )


def test_psnr_of_each_frame():
    clean, noisy = videos()
    each = metrics.psnr(noisy, clean, per_frame=True)
    assert each.shape == (3,)
    for f in range(3):
        assert float(each[f]) == pytest.approx(float(metrics.psnr(noisy[f : f + 1], clean[f : f + 1])))


def test_identical_videos():
    clean, _ = videos()
    assert math.isinf(float(metrics.psnr(clean, clean)))
    assert float(metrics.ssim(clean, clean)) == pytest.approx(1)


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
def test_videos_of_two_shapes_are_refused(metric):
    clean, noisy = videos()
    with pytest.raises(ValueError, match=r"\(3, 23, 40, 3\) and \(2, 23, 40, 3\)"):
        metric(clean, noisy[:2])
    with pytest.raises(ValueError, match=r"\(F, H, W, C\)"):
        metric(clean[0], noisy[0])


def test_frames_smaller_than_the_window_are_refused():
    clean, noisy = videos(height=10)
    with pytest.raises(ValueError, match="10 x 40"):
        metrics.ssim(clean, noisy)


def test_relative_errors():
    x, reference = torch.tensor([[1.0, 3.0], [0.0, 4.0]]), torch.tensor([[1.0, 1.0], [0.0, 5.0]])
    assert float(metrics.relative_l1(x, reference)) == pytest.approx(3 / 7)
    assert float(metrics.relative_l2(x, reference)) == pytest.approx(math.sqrt(5 / 27))
    assert metrics.relative_l1(x, reference, dim=1).tolist() == pytest.approx([1, 0.2])
    assert metrics.relative_l2(x, reference, dim=1).tolist() == pytest.approx([2 / math.sqrt(2), 0.2])
    with pytest.raises(ValueError, match="one shape"):
        metrics.relative_l1(x, reference[0])


@pytest.mark.parametrize("tokens", [32, 27], ids=["full", "ragged"])
def test_recall_equals_its_definition(tokens):
    q, k = torch.randn(2, 3, tokens, 8), torch.randn(2, 3, tokens, 8)
    blocks = torch.rand(1, 3, 4, 4) < 0.5
    kept = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :tokens, :tokens]
    expected = ((q @ k.mT * 0.3).softmax(-1) * kept).sum(-1).mean(-1)
    out = metrics.recall(q, k, blocks, block_q=8, block_k=8, scale=0.3)
    assert out.shape == (2, 3)
    torch.testing.assert_close(out, expected)


def test_recall_leaves_out_padding():
    q, k = torch.randn(1, 1, 16, 4), torch.randn(1, 1, 16, 4)
    lengths = torch.tensor([[[3, 8]]])
    blocks = torch.tensor([[True, False], [False, True]])[None, None]
    real = [0, 1, 2, *range(8, 16)]
    weights = (q[:, :, real] @ k[:, :, real].mT * 0.5).softmax(-1)
    expected = torch.cat([weights[:, :, :3, :3].sum(-1), weights[:, :, 3:, 3:].sum(-1)], -1).mean(-1)
    out = metrics.recall(q, k, blocks, block_q=8, block_k=8, lengths_q=lengths, lengths_k=lengths)
    torch.testing.assert_close(out, expected)


def test_recall_of_every_block_is_one():
    q = torch.randn(1, 2, 20, 4)
    out = metrics.recall(q, q, torch.ones(1, 1, 3, 3, dtype=torch.bool), block_q=8, block_k=8)
    torch.testing.assert_close(out, torch.ones(1, 2))


def test_recall_refuses_a_map_of_another_size():
    q = torch.randn(1, 1, 20, 4)
    with pytest.raises(ValueError, match=r"must be in \[25, 32\]"):
        metrics.recall(q, q, torch.ones(1, 1, 4, 4, dtype=torch.bool), block_q=8, block_k=8)

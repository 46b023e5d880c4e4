"""Linear attention in Triton, and the choice between it and eager code."""

import re
from types import SimpleNamespace

import pytest
import torch
from sla_cases import BF16, CASES, FP16, FP32, JOINED, check_joined, check_linear

from fastdit.attention import MethodState, get_method
from fastdit.attention.kernels.triton.linear import tiles as triton_sla_config
from fastdit.attention.methods.sla import linear, sla
from fastdit.attention.methods.sla.linear import choose_linear, linear_attention
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("case", [case for case, _ in CASES], ids=str)
def test_triton_on_a_gpu(case, dtype, poisoned_empty):
    check_linear(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("case", "kind"), [(case, kind) for case, _, kind in JOINED], ids=str)
def test_join_on_a_gpu(case, kind, dtype, poisoned_empty):
    check_joined(case, dtype, kind, "cuda")


@pytest.mark.parametrize("covered", ["some", "all"])
@pytest.mark.parametrize("features", ["softmax", "elu", "relu"])
def test_features_inside_the_operator(features, covered):
    q, k, v = torch.randn(3, 2, 2, 11, 3, dtype=torch.float64).unbind()
    blocks = None if covered == "all" else torch.rand(1, 2, 3, 3) < 0.5
    lengths = torch.tensor([4, 0, 2], dtype=torch.int32).view(1, 1, 3)
    arguments = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, blocks, lengths, 4, features), arguments)
    torch.library.opcheck(linear_attention, (*arguments, blocks, lengths, 4, features))
    out = linear_attention(*arguments, blocks, lengths, 4, features)
    mapped = [linear.feature_map(features, x) for x in (q, k)]
    torch.testing.assert_close(out, linear_attention(*mapped, v, blocks, lengths, 4))


def test_the_choice_is_seen(monkeypatch):
    """On a CPU eager code is what there is; on a GPU it is a warning, unless it was asked for."""
    q = v = torch.randn(1, 1, 32, 16)
    assert choose_linear(q, v, 16) == "eager"
    on_gpu = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(triton_sla_config, "linear_reason", lambda q, v, block: "it is Monday")
    with pytest.warns(UserWarning, match="linear attention runs without Triton: it is Monday"):
        assert choose_linear(on_gpu, on_gpu, 16) == "eager"
    assert choose_linear(on_gpu, on_gpu, 16, "reference") == "eager"
    monkeypatch.setattr(triton_sla_config, "linear_reason", lambda q, v, block: None)
    assert choose_linear(on_gpu, on_gpu, 16) == choose_linear(on_gpu, on_gpu, 16, "triton") == "triton"
    assert choose_linear(on_gpu, on_gpu, 16, gradients=False) == "fused"
    assert choose_linear(on_gpu, on_gpu, 16, "cpu", gradients=False) == "eager"


@pytest.mark.parametrize(
    ("enabled", "trained", "of_tokens", "expected"),
    [(False, True, True, False), (True, False, False, False), (True, True, False, True), (True, False, True, True)],
)
@pytest.mark.parametrize("variant", ["paper", "full", "sla2"])
def test_only_wanted_gradients_keep_the_parts_apart(variant, enabled, trained, of_tokens, expected, monkeypatch):
    method, spec = get_method("sla", variant=variant, block_size=16), TokenSpec(VideoGrid(1, 6, 8))
    weights = method.make_weights(1, 8).requires_grad_(trained)
    q, k, v = torch.randn(3, 1, 1, spec.num_tokens, 8).unbind()
    seen = []
    monkeypatch.setattr(sla, "choose_linear", lambda *_, gradients: seen.append(gradients) or "eager")
    with torch.set_grad_enabled(enabled):
        out = method.forward(q, k.requires_grad_(of_tokens), v, AttentionCall(spec), MethodState(weights=weights))
    assert seen == [expected] and out.requires_grad == expected


@pytest.mark.parametrize(
    ("dim", "features", "dtype", "block", "reason"),
    [
        (16, 16, torch.float64, 16, "bf16, fp16 and fp32, got torch.float64"),
        (8, 16, FP32, 16, r"head dims in \[16, 128\] and up to 256 features, got 8 and 16"),
        (128, 512, FP32, 16, "got 128 and 512"),
        (16, 16, BF16, 24, "blocks of a multiple of 16 tokens, got 24"),
        (16, 16, BF16, 16, None),
    ],
)
def test_reasons(dim, features, dtype, block, reason, monkeypatch):
    q, v = torch.zeros(1, 1, 48, features, dtype=dtype), torch.zeros(1, 1, 48, dim, dtype=dtype)
    monkeypatch.setattr(triton_sla_config, "available", lambda: None)
    monkeypatch.setattr(triton_sla_config, "_interpreted", lambda: True)
    found = triton_sla_config.linear_reason(q, v, block)
    assert found is None if reason is None else re.search(reason, found)
    monkeypatch.setattr(triton_sla_config, "_interpreted", lambda: False)
    assert triton_sla_config.linear_reason(q, v, block) == "it needs CUDA tensors, got cpu"

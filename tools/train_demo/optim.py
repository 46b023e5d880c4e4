"""Optimiser, weight average, schedule and checkpoints of the demo's training loops."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrix ``(M, N)``, roughly, by Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


class MuonAdam(torch.optim.Optimizer):
    """Muon for the weights given as matrices, Adam for all the rest.

    Args:
        matrices: Weights of 2 or more dimensions; flattened to ``(out, rest)`` for the update.
        others: Biases, norms, embeddings, first and last layers.
        muon_lr: Step of the matrices, scaled by ``0.2 * sqrt(max(M, N))``.
        adam_lr: Step of the others.
    """

    def __init__(self, matrices: Iterable[Tensor], others: Iterable[Tensor], muon_lr: float, adam_lr: float):
        groups = [
            {"params": list(matrices), "lr": muon_lr, "base_lr": muon_lr, "muon": True},
            {"params": list(others), "lr": adam_lr, "base_lr": adam_lr, "muon": False},
        ]
        super().__init__(groups, {})

    def scale_lr(self, factor: float) -> None:
        """Set every learning rate to ``factor`` times its base value."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update the weights; ``closure`` is not used."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if group["muon"]:
                self._step_muon(params, group["lr"])
            else:
                self._step_adam(params, group["lr"])

    def _step_muon(self, params: list[Tensor], lr: float) -> None:
        for p in params:
            state = self.state[p]
            momentum = state.setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            update = p.grad.lerp(momentum, 0.95).reshape(p.shape[0], -1)
            scale = 0.2 * max(update.shape) ** 0.5
            p.add_(orthogonalize(update).reshape(p.shape), alpha=-lr * scale)

    def _step_adam(self, params: list[Tensor], lr: float) -> None:
        first, second = [], []
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["first"], state["second"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
            first.append(state["first"])
            second.append(state["second"])
        count = self.state[params[0]]["step"]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(first, grads, 0.1)
        torch._foreach_mul_(second, 0.99)
        torch._foreach_addcmul_(second, grads, grads, 0.01)
        denominator = torch._foreach_div(second, 1.0 - 0.99**count)
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, 1e-8)
        torch._foreach_addcdiv_(params, first, denominator, -lr / (1.0 - 0.9**count))


def build_optimizer(model: nn.Module, muon_lr: float, adam_lr: float) -> MuonAdam:
    """Give Muon the hidden weights and Adam the norms, biases, first and last layers."""
    edge = ("patch_embedding", "proj_out", "condition_embedder", "conv_in", "conv_out", "quant_conv")
    matrices, others = [], []
    for name, p in model.named_parameters():
        hidden = p.ndim >= 2 and min(p.shape[0], p[0].numel()) > 1 and "scale_shift" not in name
        (matrices if hidden and not any(e in name for e in edge) else others).append(p)
    return MuonAdam(matrices, others, muon_lr, adam_lr)


def lr_factor(step: int, total: int, warmup: int = 30, decay: float = 0.3) -> float:
    """Return the learning-rate factor: linear warm-up, flat, linear decay to 0.02 at ``total``."""
    left = max(total - step, 0) / max(decay * total, 1.0)
    return min((step + 1) / warmup, 1.0, 0.02 + 0.98 * min(left, 1.0))


class WeightAverage:
    """Exponential moving average of a model's parameters, warmed up over the first steps."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Blend the model's present weights in."""
        decay = min(self.decay, (1.0 + step) / (10.0 + step))
        live = model.state_dict()
        floats = [k for k, v in self.weights.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.weights[k] for k in floats], [live[k] for k in floats], 1 - decay)


def save_checkpoint(path: Path, **content: object) -> None:
    """Write ``content`` to ``path`` by way of a temporary file, so that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    torch.save(content, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, device: str = "cpu") -> dict | None:
    """Return what ``save_checkpoint`` wrote, or ``None`` if there is nothing."""
    if not path.exists():
        return None
    return torch.load(path, map_location=device, weights_only=True)

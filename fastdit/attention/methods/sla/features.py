"""Feature maps of linear attention, and the learned modules of SLA.

The modules compute in the dtype and on the device of what they are given: their own parameters stay in fp32, and may
lie elsewhere while a model is offloaded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter


def feature_map(name: str, x: Tensor) -> Tensor:
    """Map queries or keys to features that are at least 0, channel by channel or by their softmax.

    Args:
        name: ``"softmax"`` over the channels, ``"elu"`` (plus 1) or ``"relu"``.
        x: ``(B, H, S, D)`` queries or keys.

    Returns:
        ``(B, H, S, D)`` in the dtype of ``x``.

    Source: SLA (arXiv 2509.24006), section 4.
    """
    if name == "softmax":
        return x.softmax(-1)
    return F.elu(x) + 1 if name == "elu" else F.relu(x)


class Hedgehog(Module):
    """A learned feature map for each head: softmax over the channels of a projection, and of its negative.

    It starts with the identity as projection.

    Args:
        heads: Heads, at least 1.
        head_dim: Channels of a head, at least 1.

    Source: The Hedgehog & the Porcupine (arXiv 2402.04347), section 4.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = Parameter(torch.eye(head_dim, dtype=torch.float32).repeat(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map queries or keys to twice as many features.

        Args:
            x: ``(B, H, S, D)``.

        Returns:
            ``(B, H, S, 2 * D)`` in the dtype of ``x``.
        """
        x = x @ self.weight.to(x).mT
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


class Projection(Module):
    """A learned affine map of the channels of every head, initialised to 0.

    Args:
        head_dim: Channels of a head, at least 1.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = Parameter(torch.zeros(head_dim, head_dim, dtype=torch.float32))
        self.bias = Parameter(torch.zeros(head_dim, dtype=torch.float32))

    def forward(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight, ``(D, D)``, and the bias, ``(D,)``, as ``F.linear`` takes them.

        They are copies, which stay where they are when the module is offloaded.

        Args:
            like: ``(B, H, S, D)`` whose dtype and device are wanted.
        """
        return self.weight.to(like, copy=True), self.bias.to(like, copy=True)


class Router(Module):
    """A learned projection of pooled queries or keys before they are compared, initialised to the identity.

    Choosing blocks has no gradient, so a router is not trained along with the rest.

    Args:
        head_dim: Channels of a head, at least 1.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = Parameter(torch.eye(head_dim, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Project.

        Args:
            x: ``(B, H, M, D)``.

        Returns:
            ``(B, H, M, D)`` in the dtype of ``x``.
        """
        return F.linear(x, self.weight.to(x))


class Mix(Module):
    """The learned share of the second part of a mix, for each head and along the video; it starts at 0.7 %.

    Args:
        heads: Heads, at least 1.
        points: Values along the video, at least 1.
    """

    def __init__(self, heads: int, points: int) -> None:
        super().__init__()
        self.logits = Parameter(torch.full((heads, points), -5.0, dtype=torch.float32))

    def forward(self, count: int, like: Tensor) -> Tensor:
        """Return the share of the second part in (0, 1), its logits linear between the values: ``(H, count)``.

        Args:
            count: Blocks of the video, at least 1. Each value is in the middle of an equal part of them.
            like: ``(B, H, S, D)`` whose dtype and device are wanted.
        """
        logits = self.logits.to(like.device)[None]
        return F.interpolate(logits, size=count, mode="linear", align_corners=False)[0].sigmoid().to(like.dtype)

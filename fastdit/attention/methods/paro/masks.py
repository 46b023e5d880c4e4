"""The plan of PARO: an axis order for each head, and the blocks to compute in that order."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ....files import moved_when_complete
from ....schedule import check_edges
from ....tokens import TokenSpec
from ....validation import Part, describe_error
from ...method import check_block_size, check_density

AXIS_ORDERS = ("fhw", "fwh", "hwf", "hfw", "whf", "wfh")
"""The six orders of the axes, slowest first; files name an order by its place here."""

VERSION = 1


class _About(Part):
    version: Literal[1]
    tokens: TokenSpec
    block_size: int
    density: float
    edges: tuple[float, ...]


class ParoPlan:
    """The result of a calibration: an axis order and block maps for each layer and head.

    A plan never changes, and two plans of the same content are equal. Maps cover the blocks of the video; text is
    always computed.

    Args:
        tokens: The token spec of the sequence; the plan fits no other.
        block_size: Tokens per block, a power of two in [16, 256].
        density: Fraction of (query, key) pairs that the calibration was asked to keep, in (0, 1].
        orders: For each layer and head one of ``AXIS_ORDERS``.
        edges: Ends of the step buckets as fractions of the run, ascending, the last one 1.
        bits: ``(buckets, layers, heads, N, ceil(N / 8))`` uint8: the maps, rows packed by ``pack``.

    Raises:
        ValueError: A shape, index or number does not fit the others.
    """

    tokens: TokenSpec
    block_size: int
    density: float
    orders: tuple[tuple[str, ...], ...]
    edges: tuple[float, ...]
    _bits: Tensor
    _digest: bytes

    def __init__(
        self,
        *,
        tokens: TokenSpec,
        block_size: int,
        density: float,
        orders: Sequence[Sequence[str]],
        edges: Sequence[float],
        bits: Tensor,
    ) -> None:
        check_block_size("block_size", block_size)
        check_density(density)
        check_edges(edges)
        rows = math.ceil(tokens.grid.num_tokens / block_size)
        heads = len(orders[0]) if orders else 0
        shape = (len(edges), len(orders), heads, rows, math.ceil(rows / 8))
        if bits.dtype != torch.uint8 or tuple(bits.shape) != shape or 0 in shape:
            raise ValueError(
                f"bits of {len(edges)} buckets, {len(orders)} layers and {heads} heads over {rows} blocks must be "
                f"{shape} uint8, got {tuple(bits.shape)} {bits.dtype}; pack makes them"
            )
        if any(len(layer) != heads or not set(layer) <= set(AXIS_ORDERS) for layer in orders):
            raise ValueError(f"orders must be {', '.join(AXIS_ORDERS)} for each of {heads} heads, got {orders}")
        bits = bits.cpu().contiguous().clone()
        content = {
            "tokens": tokens,
            "block_size": block_size,
            "density": float(density),
            "orders": tuple(tuple(layer) for layer in orders),
            "edges": tuple(float(edge) for edge in edges),
            "_bits": bits,
            "_digest": hashlib.sha256(bits.numpy().data).digest(),
        }
        for name, value in content.items():
            object.__setattr__(self, name, value)

    @property
    def num_layers(self) -> int:
        """Count the layers."""
        return len(self.orders)

    @property
    def num_heads(self) -> int:
        """Count the heads of a layer."""
        return len(self.orders[0])

    def blocks(
        self, bucket: int, layer: int, heads: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return the maps of a layer: ``(heads, N, N)`` bool.

        Args:
            bucket: Index of the step bucket, from 0.
            layer: Index of the layer, from 0.
            heads: Indices of the heads; default: all of them.
            device: Device of the result.
        """
        bits = self._bits[bucket, layer]
        bits = (bits if heads is None else bits[list(heads)]).to(device)
        return unpack(bits, bits.shape[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a safetensors file.

        Args:
            path: The file.
        """
        places = [[AXIS_ORDERS.index(order) for order in layer] for layer in self.orders]
        about = _About(
            version=VERSION,
            tokens=self.tokens,
            block_size=self.block_size,
            density=self.density,
            edges=self.edges,
        )
        tensors = {"orders": torch.tensor(places, dtype=torch.uint8, device="cpu"), "blocks": self._bits}
        with moved_when_complete(Path(path)) as part:
            save_file(tensors, part, {"paro_plan": json.dumps(about.model_dump())})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ParoPlan:
        """Read a plan from a file that ``save`` wrote.

        Args:
            path: The file.

        Raises:
            ValueError: There is no such file, or it is no plan, one of another version, or a damaged one.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if "paro_plan" not in metadata:
                    raise ValueError(f"{path} is a safetensors file, but not a plan for 'paro'")
                about = dict(_About.model_validate_json(metadata["paro_plan"]))
                del about["version"]
                orders = [[AXIS_ORDERS[order] for order in layer] for layer in file.get_tensor("orders").tolist()]
                return cls(**about, orders=orders, bits=file.get_tensor("blocks"))
        except OSError as error:
            raise ValueError(f"the plan {path} cannot be read: {error}") from error
        except (SafetensorError, ValidationError, IndexError, TypeError) as error:
            fault = describe_error(error) if isinstance(error, ValidationError) else error
            what = f"{path} is not a plan for 'paro', or it is damaged: {fault}; calibrate it again"
            raise ValueError(what) from error

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a plan never changes: {name} cannot be set; make another one")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParoPlan) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    def __deepcopy__(self, memo: dict[int, Any]) -> ParoPlan:
        return self

    def __repr__(self) -> str:
        text = f" + {self.tokens.text_tokens} text tokens" if self.tokens.text_tokens else ""
        return (
            f"ParoPlan({self.tokens.grid}{text}, {self.num_layers} layers, {self.num_heads} heads, "
            f"density {self.density:g}, {len(self.edges)} step buckets)"
        )

    def _content(self) -> tuple[Any, ...]:
        return self.tokens, self.block_size, self.density, self.orders, self.edges, self._digest


def pack(blocks: Tensor) -> Tensor:
    """Pack maps of blocks, eight to a byte, the first in the lowest bit.

    Args:
        blocks: ``(..., N)`` bool.

    Returns:
        ``(..., ceil(N / 8))`` uint8.
    """
    eights = F.pad(blocks, (0, -blocks.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (eights.to(torch.uint8) << _shifts(blocks.device)).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, num_k: int) -> Tensor:
    """Unpack what ``pack`` packed.

    Args:
        bits: ``(..., ceil(N / 8))`` uint8.
        num_k: N, at least 1.

    Returns:
        ``(..., N)`` bool.
    """
    return (bits[..., None] >> _shifts(bits.device) & 1).bool().flatten(-2)[..., :num_k]


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)

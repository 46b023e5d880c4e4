"""Trainable weights of a method: attached to the transformer as one submodule, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module, ModuleDict

from ..attention import AttentionMethod
from ..files import moved_when_complete

ATTRIBUTE = "sparse_attention_weights"
VERSION = 1
_HEADER = "fastdit_weights"


@dataclass(frozen=True, eq=False)
class Weights:
    """The trainable weights of the layers of one transformer, and the model they belong to.

    Args:
        modules: One module per self-attention layer, by its number.
        model: Class of the transformer, number of layers, heads and head dim.
    """

    modules: ModuleDict
    model: dict[str, str | int]

    def __getitem__(self, layer: int) -> Module:
        return self.modules[str(layer)]


def make_weights(method: AttentionMethod, transformer: Module, layers: int) -> Weights | None:
    """Create the weights of a method on the device of the transformer; ``None`` if it has none.

    Args:
        method: The method.
        transformer: The model; nothing is attached to it yet.
        layers: Its self-attention layers, at least 1.

    Raises:
        ValueError: The config has no number of heads or head dim.
    """
    if not method.trained_for:
        return None
    config: Any = getattr(transformer, "config", None)
    heads, head_dim = (getattr(config, name, None) for name in ("num_attention_heads", "attention_head_dim"))
    if heads is None or head_dim is None:
        raise ValueError(
            f"method {method.name!r} has weights, which need num_attention_heads and attention_head_dim in the "
            f"config of {type(transformer).__name__}"
        )
    with torch.device("cpu"):  # regardless of the default device
        modules = ModuleDict({str(layer): method.make_weights(heads, head_dim) for layer in range(layers)})
    device = next(transformer.parameters()).device
    if device.type != "meta":  # not offloaded; otherwise the weights follow the queries
        modules.to(device)
    model = {"class": type(transformer).__name__, "layers": layers, "heads": heads, "head_dim": head_dim}
    return Weights(modules, model)


def save_weights(path: str | Path, method: AttentionMethod, weights: Mapping[str, Weights | None]) -> None:
    """Save the weights of a method as a safetensors file.

    Args:
        path: The file; an existing one is replaced.
        method: The method.
        weights: The weights, by transformer name.

    Raises:
        ValueError: The method has no weights, or they are offloaded.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in _tensors(method, weights).items()}
    with moved_when_complete(Path(path)) as part:
        save_file(tensors, part, {_HEADER: json.dumps(_header(method, weights))})


def load_weights(path: str | Path, method: AttentionMethod, weights: Mapping[str, Weights | None]) -> None:
    """Load the weights of a method; if the file does not match, nothing changes.

    Args:
        path: The file.
        method: The method.
        weights: The weights to overwrite, by transformer name.

    Raises:
        ValueError: The method has no weights, they are offloaded, or the file is broken or belongs to another model or
            method.
        FileNotFoundError: The file does not exist.
    """
    wanted = _tensors(method, weights)
    header, tensors = _read(path)
    here = _header(method, weights)
    differences = [
        f"{what} is {header.get(what)!r} in the file, {here.get(what)!r} here"
        for what in dict.fromkeys([*here, *header])
        if header.get(what) != here.get(what)
    ]
    if differences:
        raise ValueError(f"the weights in {path} were made for something else: {'; '.join(differences)}")
    odd = sorted(wanted.keys() ^ tensors.keys())
    odd += [name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape]
    odd += [name for name, value in tensors.items() if not value.isfinite().all()]
    if odd:
        raise ValueError(
            f"the weights in {path} are broken: {odd[0]} is missing, too much, of the wrong shape or not finite"
            f"{f', as are {len(odd) - 1} others' if len(odd) > 1 else ''}; make the file anew with save_weights"
        )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(tensors[name])


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file of weights at {path}; pipe.sparse_attention.save_weights makes one")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    try:
        return dict(json.loads(metadata[_HEADER])), tensors
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was not made by save_weights: it does not say what it is for") from error


def _tensors(method: AttentionMethod, weights: Mapping[str, Weights | None]) -> dict[str, Tensor]:
    found = {
        f"{title}.{name}": value
        for title, each in weights.items()
        if each is not None
        for name, value in each.modules.state_dict(keep_vars=True).items()
    }
    if not found:
        raise ValueError(f"method {method.name!r} learns nothing, so it has no weights to save or load")
    if any(value.is_meta for value in found.values()):
        raise ValueError("the weights are offloaded, out of reach; save or load them before offload is enabled")
    return found


def _header(method: AttentionMethod, weights: Mapping[str, Weights | None]) -> dict[str, Any]:
    return {
        "version": VERSION,
        "method": method.name,
        **{name: getattr(method, name) for name in method.trained_for},
        **{title: each.model for title, each in weights.items() if each is not None},
    }

"""Base class and registry of model families, which hold all model-specific knowledge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch.nn import Module

from ...tokens import VideoGrid

_REGISTRY: dict[str, ModelFamily] = {}


@dataclass(frozen=True)
class Boundary:
    """The modules through which video tokens enter and leave the blocks of a transformer.

    Between them nothing but attention may depend on the order of the tokens; rotary embeddings are put in order, too.

    Args:
        entry: Path of the module that returns the tokens, ``(B, S, C)``, or ``(B, C, F, H, W)`` to be flattened next.
        rotary: Path of the module that returns the rotary embeddings, a tuple of ``(B or 1, S, ...)``.
        exit: Path of the module that returns the tokens after the blocks, ``(B, S, C)``.
        per_sample: Arguments of the forward that must not have a value for each token.
    """

    entry: str
    rotary: str
    exit: str
    per_sample: tuple[str, ...] = ("timestep",)


class ModelFamily(ABC):
    """Base class of model families: their self-attention modules and token grids."""

    name: ClassVar[str]
    transformers: ClassVar[tuple[str, ...]]
    """Names of the transformer classes; subclasses of them are known too."""
    text: ClassVar[Literal["none", "first", "last"]] = "none"
    """Where text sits in the sequence of a self-attention call: the tokens that are not video."""
    blocks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    """Names of the transformer's lists of blocks."""
    attention: ClassVar[str] = "attn1"
    """Name of the video self-attention in a block."""
    mask_argument: ClassVar[str | None] = None
    """The argument of the forward that the model makes its self-attention mask from, if it makes one."""

    def self_attentions(self, transformer: Module) -> list[tuple[str, Module]]:
        """List the video self-attention modules by their path, in the order in which they are numbered.

        Args:
            transformer: The model.
        """
        return attentions_of_blocks(transformer, self.blocks, self.attention)

    @abstractmethod
    def grid(self, transformer: Module, arguments: Mapping[str, Any]) -> VideoGrid | str:
        """Read the grid off a forward call, or say why it is unknown.

        Args:
            transformer: The model.
            arguments: The arguments of its forward, by name.
        """

    def output_projection(self, transformer: Module, path: str) -> Module:
        """Return the linear layer that a self-attention's output goes through.

        Args:
            transformer: The model.
            path: Path of the self-attention.

        Returns:
            A layer with ``in_features``: the heads one after the other, then channels that are not attention.
        """
        attention: Any = transformer.get_submodule(path)
        return attention.to_out[0]

    def boundary(self, transformer: Module) -> Boundary | None:
        """Name the modules between which tokens may be in another order; ``None`` where there is no such place.

        Args:
            transformer: The model.
        """
        return None

    def calls(self, arguments: Mapping[str, Any]) -> int:
        """Count the attention calls each self-attention makes in one forward.

        Args:
            arguments: The arguments of the forward, by name.
        """
        return 1


def attentions_of_blocks(transformer: Module, lists: tuple[str, ...], attribute: str) -> list[tuple[str, Module]]:
    """List one attention module of every block.

    Args:
        transformer: The model.
        lists: Names of its lists of blocks.
        attribute: Name of the attention in a block.
    """
    return [
        (f"{blocks}.{index}.{attribute}", getattr(block, attribute))
        for blocks in lists
        for index, block in enumerate(getattr(transformer, blocks))
    ]


def patched(shape: tuple[int, ...], patch: tuple[int, int, int]) -> VideoGrid:
    """Divide ``(frames, height, width)`` of a latent by a patch, dropping what is cut off as a convolution does.

    Args:
        shape: Three sizes of the latent.
        patch: Three sizes of a patch.
    """
    frames, height, width = (size // step for size, step in zip(shape, patch, strict=True))
    return VideoGrid(frames, height, width)


def register_family(cls: type[ModelFamily]) -> type[ModelFamily]:
    """Make a family known.

    Args:
        cls: The family; it needs no arguments.

    Raises:
        ValueError: A family of that name exists.
    """
    if cls.name in _REGISTRY:
        raise ValueError(f"a family named {cls.name!r} is registered already: {type(_REGISTRY[cls.name]).__name__}")
    _REGISTRY[cls.name] = cls()
    return cls


def list_families() -> tuple[str, ...]:
    """List the names of the model families that can run sparse attention."""
    return tuple(_REGISTRY)


def find_family(transformer: Module) -> ModelFamily:
    """Find the family of a transformer by its class or a base class of it.

    Args:
        transformer: The model.

    Raises:
        ValueError: No family knows it.
    """
    for cls in type(transformer).__mro__:
        for family in _REGISTRY.values():
            if cls.__name__ in family.transformers:
                return family
    known = "; ".join(f"{name} ({', '.join(family.transformers)})" for name, family in _REGISTRY.items())
    raise ValueError(
        f"{type(transformer).__name__} is not a video transformer that fastdit supports. Supported families: {known}. "
        "A family is one short file: see CONTRIBUTING.md, or register your own with fastdit.register_family"
    )

"""Base classes and registry of methods, which choose the blocks of an attention call."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from ..tokens import AttentionCall, TokenSpec
from .fields import BlockSize, Density, check_fields, check_value
from .kernels.dispatch import block_sparse_attention
from .pattern import Pattern
from .reorder import lay_out, put_back
from .state import MethodState

_REGISTRY: dict[str, type[AttentionMethod]] = {}


@dataclass(frozen=True, kw_only=True)
class AttentionMethod(ABC):
    """Base class of methods, whose fields are their parameters in Python, JSON and the CLI.

    Subclasses are frozen dataclasses, registered by name, and keep nothing between calls but in ``state``. What a field
    may hold is in its annotation, with the types of ``fields.py`` where not every value of a type is allowed.

    Raises:
        ValueError: A field holds something else.
    """

    name: ClassVar[str]
    static: ClassVar[bool] = False
    """Whether the pattern depends on the token spec alone."""
    stock: ClassVar[bool] = False
    """Whether the method is the model's own attention call, which then is left untouched."""
    empty: ClassVar[bool] = False
    """Whether the output is zeros, for which nothing is computed."""
    trained_for: ClassVar[tuple[str, ...]] = ()
    """The fields that weights are trained for, without which they mean nothing; empty if the method has no weights."""

    def __post_init__(self) -> None:
        check_fields(self)

    def make_weights(self, heads: int, head_dim: int) -> Module:
        """Make what one layer learns, in fp32; only called for a method that has ``trained_for``.

        It is fp32 whatever the default dtype is. It is attached to the model, and comes to the method as
        ``state.weights``. Such a method also has a field ``weights``, the path of a file that they are loaded from, or
        ``None``.

        Args:
            heads: Heads of the layer, at least 1.
            head_dim: Channels of a head, at least 1.
        """
        return Module()

    def shared_order(self, tokens: TokenSpec) -> Tensor | None:
        """Return the order that video tokens may come in from the start, or ``None``: ``(n,)`` int64, on the CPU.

        It is the order of all layers, heads and steps, and has no gaps: calls with ``tokens.ordered`` copy nothing.

        Args:
            tokens: The token spec of the sequence, in raster order.
        """
        return None

    def describe(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        return asdict(self)

    @abstractmethod
    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        """Choose order and blocks.

        Args:
            q: ``(B, H, S, D)`` queries, after normalisation and rotary embedding.
            k: ``(B, H, S, D)`` keys, likewise.
            call: The call.
            state: Memory of this layer.
        """

    def resolve(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        """Return the pattern of a call: the cached static one, the one of an earlier step, or a new one.

        Arguments as for ``pattern``.
        """
        if self.static:
            key = (self, call.tokens, q.device)
            build = partial(state.measure, "choice", q.device, lambda: self.pattern(q, k, call, state))
            return state.cache.static(key, build)
        known = state.tokens == call.tokens and state.batch in (None, len(q))
        if state.refresh or state.pattern is None or not known or not _fits(state.pattern, q):
            with torch.no_grad():
                pattern = state.measure("choice", q.device, lambda: self.pattern(q, k, call, state))
            state.pattern, state.tokens, state.batch = pattern, call.tokens, len(q)
            return pattern
        return state.pattern

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState) -> Tensor:
        """Compute the attention, and leave the fraction of pairs computed in ``state.kept``.

        Args:
            q: ``(B, H, S, D)`` queries, after normalisation and rotary embedding.
            k: ``(B, H, S, D)`` keys, likewise.
            v: ``(B, H, S, D)`` values.
            call: The call.
            state: Memory of this layer.

        Returns:
            ``(B, H, S, D)``, in the dtype of ``q``.
        """


@dataclass(frozen=True, kw_only=True)
class BlockMethod(AttentionMethod):
    """Base class of block-sparse methods, with optional compensation of skipped blocks.

    Args:
        compensate: ``"mean"`` adds one mean key and value per skipped block to the softmax, weighted by its size
            (SVG-EAR, arXiv 2603.08982); ``None`` drops skipped blocks.
    """

    compensate: Literal["mean"] | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState) -> Tensor:
        pattern = self.resolve(q, k, call, state)
        pattern = replace(pattern, mask=state.mask(pattern, call))
        state.kept = pattern.mask.kept
        layout = pattern.layout
        if state.precision is None or layout.identity or not self._takes_any_order(q, k, v):
            q, k, v = state.measure("order", q.device, lambda: lay_out(layout, q, k, v))
            out = self.attend(q, k, v, pattern, call, state)
        else:
            out = self._attend_blocks(q, k, v, pattern, call, state, laid_out=False)
        return state.measure("order", q.device, lambda: put_back(layout, out))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: AttentionCall, state: MethodState
    ) -> Tensor:
        """Compute the attention of laid out tokens; a method with a second branch adds it here.

        Args:
            q: ``(B, H, S_padded, D)`` queries, in the order of the pattern.
            k: ``(B, H, S_padded, D)`` keys, likewise.
            v: ``(B, H, S_padded, D)`` values, likewise.
            pattern: Order and blocks, padded keys taken out.
            call: The call.
            state: Memory of this layer.

        Returns:
            ``(B, H, S_padded, D)``, in the dtype of ``q``.
        """
        return self._attend_blocks(q, k, v, pattern, call, state, laid_out=True)

    def _takes_any_order(self, *tensors: Tensor) -> bool:
        """Say whether tokens may be left where they are: a second branch needs them laid out, and so do odd strides."""
        return type(self).attend is BlockMethod.attend and all(x.stride(-1) == 1 for x in tensors)

    def _attend_blocks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        call: AttentionCall,
        state: MethodState,
        *,
        laid_out: bool,
    ) -> Tensor:
        """Compute the attention of the pattern; low precision lets the kernel lay tokens out, as it rounds them."""
        layout, mask, compensate, index = pattern.layout, pattern.mask, self.compensate, None
        precision = state.precision_of(q, k, v, mask, compensate)
        if not laid_out and precision is not None:
            index = layout.index
        elif not laid_out:
            q, k, v = state.measure("order", q.device, lambda: lay_out(layout, q, k, v))
        how = {"kernel": state.kernel, "compensate": compensate, "precision": precision, "index": index}
        return block_sparse_attention(q, k, v, mask, scale=call.scale, **how)[0]


Method = TypeVar("Method", bound=type[AttentionMethod])


def register(name: str) -> Callable[[Method], Method]:
    """Make a method known by a name.

    Args:
        name: Lower case, as in ``get_method(name)``.

    Raises:
        ValueError: The name is taken.
    """

    def add(cls: Method) -> Method:
        if name in _REGISTRY:
            raise ValueError(f"a method named {name!r} is registered already: {_REGISTRY[name].__name__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def list_methods() -> tuple[str, ...]:
    """List the names of all methods, in the order in which they were registered."""
    return tuple(_REGISTRY)


def method_class(name: str) -> type[AttentionMethod]:
    """Return the class of a method.

    Args:
        name: One of ``list_methods()``.

    Raises:
        ValueError: There is no such method.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown method {name!r}{_suggest(name, _REGISTRY)}; methods are: {', '.join(_REGISTRY)}")
    return _REGISTRY[name]


def get_method(name: str, **parameters: Any) -> AttentionMethod:
    """Make a method.

    Args:
        name: One of ``list_methods()``.
        **parameters: Fields of the method, such as ``density``.

    Raises:
        ValueError: There is no such method, or a value is out of range.
        TypeError: The method has no such field.
    """
    cls = method_class(name)
    known = [f.name for f in fields(cls)]
    for field_name in parameters:
        if field_name not in known:
            has = f"it has: {', '.join(known)}" if known else "it has none"
            raise TypeError(f"method {name!r} has no field {field_name!r}{_suggest(field_name, known)}; {has}")
    return cls(**parameters)


def check_density(density: float) -> None:
    """Check a fraction of blocks to keep.

    Args:
        density: In (0, 1].

    Raises:
        ValueError: It is outside (0, 1].
    """
    check_value("density", density, Density)


def check_block_size(name: str, value: int) -> None:
    """Check a number of tokens per block.

    Args:
        name: Its name, for the error.
        value: A power of two in [16, 256].

    Raises:
        ValueError: It is none.
    """
    check_value(name, value, BlockSize)


def _suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _fits(pattern: Pattern, q: Tensor) -> bool:
    batch, heads = q.shape[:2]
    shape = pattern.mask.indices.shape
    return shape[0] in (1, batch) and shape[1] in (1, heads) and pattern.mask.device == q.device

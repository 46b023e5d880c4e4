"""Token reordering once per forward pass, at the boundary of the transformer, instead of in every layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..tokens import TokenSpec
from .families.family import ModelFamily
from .runtime import Runtime
from .strangers import watched

PLACES = ("rotary", "entry", "exit")


class Crossing:
    """A hook on one of three modules that reorders the tokens of a forward pass, or restores their order.

    In a compiled graph it does nothing, and each layer reorders its own tokens.

    Args:
        runtime: Runtime of the transformer.
        place: One of ``PLACES``.
    """

    def __init__(self, runtime: Runtime, place: str) -> None:
        self.runtime = runtime
        self.place = place

    def __deepcopy__(self, memo: dict[int, Any]) -> Crossing:
        return Crossing(copy.deepcopy(self.runtime, memo), self.place)

    def __reduce__(self) -> Any:
        return _nobody, ()

    def __call__(self, module: Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the output in another order, or ``None`` to leave it alone.

        Args:
            module: Not used.
            args: Not used.
            output: ``(B, S, C)`` or ``(B, C, F, H, W)`` tokens, or a tuple of ``(B or 1, S, ...)`` rotary embeddings.
        """
        if torch.compiler.is_compiling():
            return None
        forward = self.runtime.forward
        if forward is None or forward.ordered is None:
            return None
        size = forward.ordered.num_tokens
        if self.place == "rotary" and any(x.shape[1] != size for x in output):
            forward.ordered = None  # the grid differs from the arguments
            return None
        forward.crossed.append(self.place)
        if self.place == "rotary":
            return tuple(self._take(x, forward.ordered) for x in output)
        return self._take(output, forward.ordered)

    def _take(self, x: Tensor, tokens: TokenSpec) -> Tensor:
        back, order = self.place == "exit", self.runtime.shared_order(tokens)
        assert order is not None, "a forward is ordered where there is an order"
        key = ("crossing", back, tokens, x.device)
        index = self.runtime.cache.static(key, lambda: (order.argsort() if back else order).to(x.device))
        axis, rows = (2, x.flatten(2)) if x.ndim == 5 else (1, x)  # the model flattens a latent next
        if rows.shape[axis] != len(index):
            raise RuntimeError(
                f"the {self.runtime.title} has {rows.shape[axis]} tokens at its {self.place} and rotary embeddings for "
                f"{len(index)}: something else changes its forward. Remove it, or call disable_sparse_attention()"
            )
        return rows.index_select(axis, index).view(x.shape)


def crossing_modules(family: ModelFamily, transformer: Module) -> dict[str, Module]:
    """Return the modules at the boundary of a transformer, by place; empty if there are none.

    Args:
        family: Its family.
        transformer: The model.

    Raises:
        RuntimeError: The family names a module that does not exist.
    """
    boundary = family.boundary(transformer)
    if boundary is None:
        return {}
    try:
        return {place: transformer.get_submodule(getattr(boundary, place)) for place in PLACES}
    except AttributeError as error:
        raise RuntimeError(
            f"family {family.name!r} names a boundary that {type(transformer).__name__} does not have: {error}"
        ) from error


def add_crossings(transformer: Module, runtime: Runtime) -> list[Any]:
    """Hook the modules at the boundary of a transformer; return the handles.

    Args:
        transformer: The model.
        runtime: Its runtime.
    """
    modules = crossing_modules(runtime.family, transformer)
    return [module.register_forward_hook(Crossing(runtime, place)) for place, module in modules.items()]


def order_once(runtime: Runtime, transformer: Module, arguments: Mapping[str, Any]) -> None:
    """Reorder tokens once for all layers in the forward pass that begins, if that is safe.

    It is safe if all sparse layers share one order without gaps, and only the blocks see tokens in between: there are
    no per-token arguments and no third-party code inside the transformer.

    Args:
        runtime: Runtime of the transformer.
        transformer: The model.
        arguments: The arguments of its forward, by name.
    """
    forward, boundary = runtime.forward, runtime.family.boundary(transformer)
    if forward is None or boundary is None or isinstance(forward.grid, str) or torch.is_grad_enabled():
        return
    tokens = TokenSpec(forward.grid)
    reasons = (runtime.dense_reason(layer.index, forward.position) for layer in runtime.layers)
    if runtime.shared_order(tokens) is None or all(reason is not None for reason in reasons):
        return
    attentions: list[Any] = [module for _, module in runtime.family.self_attentions(transformer)]
    if any(getattr(module.processor, "_parallel_config", None) is not None for module in attentions):
        return  # these calls remain the model's own
    if any(getattr(arguments.get(name), "ndim", 0) > 1 for name in boundary.per_sample):
        return
    modules = crossing_modules(runtime.family, transformer).values()
    hooked = (any(isinstance(hook, Crossing) for hook in module._forward_hooks.values()) for module in modules)
    if all(hooked) and not watched(transformer, Crossing):  # adapters wrap modules and keep the hook inside
        forward.ordered = tokens


def check_crossed(runtime: Runtime) -> None:
    """Check that reordered tokens were restored in the forward pass that ends.

    Args:
        runtime: Runtime of the transformer.

    Raises:
        RuntimeError: A place was skipped, or passed twice.
    """
    crossed = [] if runtime.forward is None else runtime.forward.crossed
    if crossed and sorted(crossed) != sorted(PLACES):
        raise RuntimeError(
            f"the tokens of the {runtime.title} were put into order by {', '.join(crossed)}, not once by each of "
            f"{', '.join(PLACES)}: something else changes its forward. Remove it, or call disable_sparse_attention()"
        )


def _nobody() -> Callable[[Module, tuple[Any, ...], Any], None]:
    return _leave_alone


def _leave_alone(module: Module, args: tuple[Any, ...], output: Any) -> None:
    return None

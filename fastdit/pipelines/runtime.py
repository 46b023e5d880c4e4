"""Execution and accounting of the attention calls of a transformer."""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..attention import AttentionMethod, MethodState, PatternCache
from ..schedule import Schedule
from ..tokens import AttentionCall, TokenSpec, VideoGrid
from .families.family import ModelFamily
from .forward import Forward, Memory, Recall
from .run_tracker import Position, Run, RunTracker
from .stats import LayerStats
from .strangers import replaced
from .weights import Weights

LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
"""Live layers by number; a compiled graph identifies a layer by a tensor with its number."""

_numbers = itertools.count()


@dataclass(frozen=True)
class Settings:
    """The user's choices for all transformers of a pipeline.

    Args:
        method: The method.
        schedule: Which steps and layers stay dense.
        kernel: Name of the kernel; ``None`` chooses.
        precision: ``"int8"`` or ``"int8_fp8"`` for products in low precision; ``None`` for that of the model.
    """

    method: AttentionMethod
    schedule: Schedule
    kernel: str | None = None
    precision: str | None = None


class Layer:
    """The runtime of one self-attention module.

    Args:
        name: Path of the module.
        index: Number of the layer, from 0.
        runtime: The transformer it belongs to.
    """

    def __init__(self, name: str, index: int, runtime: Runtime) -> None:
        self.name = name
        self.index = index
        self.runtime = runtime
        self.stats = LayerStats()
        self.number = torch.tensor(next(_numbers), device="cpu")
        LAYERS[int(self.number)] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        return copy.deepcopy(self.runtime, memo).layers[self.index]

    @property
    def memories(self) -> list[Memory]:
        """List the memory of the layer, over all runs."""
        return self.runtime.memories(self.index)

    def entered(self) -> None:
        """Record a call of the layer's processor."""
        forward = self.runtime.forward
        if forward is not None:
            forward.entered[self.index] += 1

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None, obstacle: str | None
    ) -> AttentionCall | None:
        """Return the call to run sparse, or count a dense one with its reason and return ``None``.

        Args:
            q: ``(B, H, S, D)`` queries.
            k: ``(B, H, S, D)`` keys.
            v: ``(B, H, S, D)`` values.
            mask: The mask the model passes.
            scale: The softmax scale the model passes.
            obstacle: Why this call has to remain the model's own, or ``None``.
        """
        runtime, stats = self.runtime, self.stats
        forward = runtime.forward
        if forward is not None:
            forward.reached[self.index] += 1
        if runtime.settings.method.stock:
            stats.count_scheduled(f"method {runtime.settings.method.name!r}")
            return None
        reason = None if forward is None else runtime.dense_reason(self.index, forward.position)
        if reason is not None:
            stats.count_scheduled(reason)
            return None
        obstacle = _mixture(q, k, v) if obstacle is None else obstacle
        call = self._sparse_call(forward, q, k, mask, scale) if obstacle is None else obstacle
        if isinstance(call, str):
            stats.count_fallback(call)
            runtime.warn(call)
            return None
        return call

    def _sparse_call(
        self, forward: Forward | None, q: Tensor, k: Tensor, mask: Any, scale: float | None
    ) -> AttentionCall | str:
        if forward is None:
            return "the attention was called outside of a forward of its transformer"
        if q.shape[2] != k.shape[2]:
            return f"there are {q.shape[2]} queries but {k.shape[2]} keys: this is no self-attention"
        runtime = self.runtime
        tokens = runtime.spec(forward, q.shape[2])
        if isinstance(tokens, str):
            return tokens
        position = forward.position
        reader = forward.recall.padding
        padding, objection = reader.read(mask, tokens, q.shape[0], position.branch, forward.mask_source)
        if objection is not None:
            return objection
        return AttentionCall(
            tokens=tokens,
            layer=self.index,
            num_layers=len(runtime.layers),
            step=position.step,
            num_steps=position.num_steps,
            branch=position.branch,
            scale=scale,
            key_padding=padding,
        )

    def run_sparse(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """Run a call with the method: ``(B, H, S, D)``.

        Args:
            q: ``(B, H, S, D)`` queries.
            k: ``(B, H, S, D)`` keys.
            v: ``(B, H, S, D)`` values.
            call: What ``plan`` returned.
        """
        memory = self._memory(q, call)
        state, method = memory.state, self.runtime.settings.method
        state.kept = None
        memory.excuses.clear()
        # autocast would select blocks and accumulate in the model's precision
        with torch.autocast(q.device.type, enabled=False):
            out = self.stats.sparse_time.time(q.device, lambda: method.forward(q, k, v, call, state))
        self._forget(state, call)
        self.stats.count_sparse(state.kept, memory.excuses)
        for reason in memory.excuses:
            self.runtime.warn(reason, f"products are not in {state.precision}")
        return out

    def _forget(self, state: MethodState, call: AttentionCall) -> None:
        """Drop memory that no later call uses; for all layers of a large model it takes gigabytes."""
        if torch.is_grad_enabled():
            return  # checkpointing may recompute this call
        if call.num_steps is not None and call.step + 1 >= call.num_steps:
            state.reset()
        elif self.runtime.settings.schedule.refreshes(call.step + 1, call.num_steps):
            state.forget_pattern()

    def run_dense(self, stock: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Run the model's own attention call.

        Args:
            stock: The call.
            device: Where it computes.

        Returns:
            The call's result, ``(B, H, S, D)`` or ``(B, S, H, D)`` as in the model.
        """
        return self.stats.dense_time.time(device, stock)

    def _memory(self, q: Tensor, call: AttentionCall) -> Memory:
        runtime = self.runtime
        forward = runtime.forward
        assert forward is not None
        position, memories = forward.position, forward.recall.memories
        key = (self.index, call.branch, position.turn, (forward.reached[self.index] - 1) % forward.calls)
        shape = (q.shape, q.device, call.tokens)
        memory = memories.get(key)
        if memory is None:
            settings = runtime.settings
            excuses: set[str] = set()
            state = MethodState(
                cache=runtime.cache,
                kernel=settings.kernel,
                precision=settings.precision,
                excuse=excuses.add,
                weights=None if runtime.weights is None else runtime.weights[self.index],
                measure=lambda part, device, run: self.stats.parts[part].time(device, run),
            )
            memory = memories[key] = Memory(state, position.video, shape, excuses=excuses)
        elif memory.video != position.video or memory.shape != shape:
            memory.state.reset()
            memory.video, memory.shape, memory.step = position.video, shape, -1
        schedule = runtime.settings.schedule
        memory.state.refresh = memory.step != call.step and schedule.refreshes(call.step, call.num_steps)
        memory.step = call.step
        return memory


class Runtime:
    """The runtime of the self-attention of one transformer.

    Args:
        family: Its model family.
        settings: The user's choices.
        tracker: Tracker of runs, shared by all transformers of a pipeline.
        names: Paths of its self-attention modules.
        title: Name of the transformer in reports.
        weights: Trainable weights of the method; ``None`` if it has none.
    """

    def __init__(
        self,
        family: ModelFamily,
        settings: Settings,
        tracker: RunTracker,
        names: Sequence[str],
        title: str,
        weights: Weights | None = None,
    ) -> None:
        self.family = family
        self.settings = settings
        self.tracker = tracker
        self.title = title
        self.weights = weights
        self.cache = PatternCache()
        self.complete = False
        self._recalls: weakref.WeakKeyDictionary[Run, Recall] = weakref.WeakKeyDictionary()
        self._thread = threading.local()
        self._recomputed: Forward | None = None
        self._lock = threading.Lock()
        self.layers = [Layer(name, index, self) for index, name in enumerate(names)]
        self._warned: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        names = [layer.name for layer in self.layers]
        tracker, weights = copy.deepcopy((self.tracker, self.weights), memo)
        memo[id(self)] = copied = Runtime(self.family, self.settings, tracker, names, self.title, weights)
        return copied

    def begin(self, transformer: Module, arguments: Mapping[str, Any]) -> None:
        """Record the start of a forward pass.

        Args:
            transformer: The model.
            arguments: The arguments of its forward, by name.
        """
        run, position = self.tracker.begin(transformer, arguments.get("timestep"))
        with self._lock:
            recall = self._recalls.setdefault(run, Recall())
        recall.padding.end_forward()
        family, count = self.family, len(self.layers)
        source = None if family.mask_argument is None else arguments.get(family.mask_argument)
        grid = family.grid(transformer, arguments)
        forward = Forward(position, recall, grid, family.calls(arguments), [0] * count, [0] * count, source)
        self._thread.forward = forward
        self._recomputed = forward if torch.is_grad_enabled() else None

    @property
    def forward(self) -> Forward | None:
        """Return the forward pass of the calling thread; an autograd thread recomputes the latest with gradients."""
        return getattr(self._thread, "forward", self._recomputed)

    def end(self, transformer: Module, failed: bool = False) -> None:
        """Record the end of a forward pass; after the first, check that every layer was reached.

        Args:
            transformer: The model.
            failed: Whether it ended with an error.

        Raises:
            RuntimeError: An attention call was not intercepted.
        """
        forward = self.forward
        if forward is None:
            return
        forward.recall.padding.end_forward()
        forward.ordered = None
        if failed:
            return
        if not self.complete:
            self._check_reached(transformer, forward)
            self.complete = True

    def _check_reached(self, transformer: Module, forward: Forward) -> None:
        missing = [layer for layer in self.layers if forward.reached[layer.index] < forward.calls]
        names = ", ".join(layer.name for layer in missing[:4]) + (", ..." if len(missing) > 4 else "")
        what = f"{len(missing)} of {len(self.layers)} self-attention layers of the {self.title}: {names}"
        if len(missing) == len(self.layers) or any(
            forward.entered[layer.index] or replaced(transformer.get_submodule(layer.name)) for layer in missing
        ):
            raise RuntimeError(
                f"sparse attention did not reach {what}. Something else replaces "
                "their attention call: another add-on, context parallelism under torch.compile, or a diffusers version "
                "whose processors work differently. Remove it, or call disable_sparse_attention()"
            )
        if missing:
            warnings.warn(
                f"the first forward pass left out {what}. Where layers are skipped on purpose, as by skip-layer "
                "guidance, this is right; where something else computes their attention, it is not sparse",
                stacklevel=3,
            )

    def dense_reason(self, layer: int, position: Position) -> str | None:
        """Return why the schedule keeps a layer dense in a step, or ``None``.

        Args:
            layer: Index of the layer, from 0.
            position: The place in the run.
        """
        return self.settings.schedule.dense_reason(layer, len(self.layers), max(position.step, 0), position.num_steps)

    def shared_order(self, tokens: TokenSpec) -> Tensor | None:
        """Return the token order that a whole forward pass can use, ``(n,)`` int64 on the CPU, or ``None``.

        Args:
            tokens: What the sequence is made up of, in raster order.
        """
        method = self.settings.method
        return self.cache.static(("shared order", tokens), lambda: method.shared_order(tokens))

    def spec(self, forward: Forward, length: int) -> TokenSpec | str:
        """Return the make-up of a sequence of a forward pass, or why it is unknown.

        Args:
            forward: The forward pass.
            length: Tokens in the sequence.
        """
        if length not in forward.specs:
            spec = self._spec(forward.grid, length)
            ordered = "entry" in forward.crossed and not isinstance(spec, str)
            forward.specs[length] = replace(spec, ordered=True) if ordered else spec
        return forward.specs[length]

    def _spec(self, grid: VideoGrid | str, length: int) -> TokenSpec | str:
        if isinstance(grid, str):
            return grid
        text = length - grid.num_tokens
        if text < 0 or (text > 0 and self.family.text == "none"):
            return f"the sequence has {length} tokens, but a video of {grid} has {grid.num_tokens}"
        return TokenSpec(grid, text, self.family.text == "first")

    def warn(self, reason: str, what: str = "attention runs dense") -> None:
        """Warn about a fallback, once per reason.

        Args:
            reason: Why it happened.
            what: What happened to a call.
        """
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"{self.title}: {what}, because {reason}", stacklevel=3)

    def forget(self) -> None:
        """Clear counts, patterns and memory."""
        self.release()
        self._warned.clear()
        for layer in self.layers:
            layer.stats = LayerStats()

    def memories(self, layer: int) -> list[Memory]:
        """List the memory of a layer, over all runs.

        Args:
            layer: Index of the layer, from 0.
        """
        with self._lock:
            recalls = list(self._recalls.values())
        return [memory for recall in recalls for key, memory in list(recall.memories.items()) if key[0] == layer]

    def release(self) -> None:
        """Clear patterns and memory, but keep the counts."""
        self.cache.clear()
        with self._lock:
            for recall in self._recalls.values():
                recall.clear()


def _mixture(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.dtype == k.dtype == v.dtype and q.device == k.device == v.device:
        return None
    kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
    return f"queries, keys and values are of different kinds: {kinds}"

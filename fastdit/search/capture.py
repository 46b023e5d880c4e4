"""Score candidates on the live attention calls of a pipeline, which goes on with its dense results."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from queue import Queue
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..attention import AttentionMethod, BlockMethod, MethodState, Pattern, PatternCache
from ..attention.methods.dense import Dense
from ..pipelines.families.family import ModelFamily, find_family
from ..pipelines.interception.install import install, uninstall
from ..pipelines.interception.installation import installed
from ..pipelines.run_tracker import RunTracker
from ..pipelines.runtime import Runtime, Settings
from ..pipelines.targets import require_transformers
from ..schedule import Schedule
from ..tokens import AttentionCall
from .scores import CallScores, Change, Scores, Shape
from .scoring import Reference, frame_mass, head_density, known_pattern, naming, sampled_recall

_DENSE = Dense()

Sample = tuple[Tensor, Tensor, AttentionCall]


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe(AttentionMethod):
    """Attend to everything, and score every candidate on the same queries, keys and values.

    One candidate runs at a time and its result is dropped, so beside the tensors of the call there are ever only the
    dense output, what one sparse call of the candidate needs, and ``S x D`` fp32 of one head. Of queries, keys, values
    and outputs nothing outlives the call.

    Args:
        title: The transformer.
        candidates: The candidates; the first is dense, and not run.
        projections: The output projection of each layer.
        scores: Where the scores go.
        caches: What each candidate keeps from call to call, its static patterns.
        kernel: Name of the kernel to use; ``None`` chooses.
        precision: ``"int8"`` or ``"int8_fp8"`` for products in low precision; ``None`` for that of the model.
        advance: Called with 1 after each candidate.
        left_out: Indices of candidates that are not run, because they cannot be chosen anyhow; their scores are NaN.
        alone: Index of the layer that runs sparse by itself, and with which candidate; empty while scores are taken.
    """

    title: str
    candidates: Sequence[AttentionMethod]
    projections: Sequence[Module]
    scores: Scores
    caches: Sequence[PatternCache]
    kernel: str | None = None
    precision: str | None = None
    advance: Callable[[int], None] = lambda count: None
    left_out: frozenset[int] = frozenset()
    alone: dict[int, int] = field(default_factory=dict)

    name = "probe"

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        return _DENSE.pattern(q, k, call, state)

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState) -> Tensor:
        """Return the dense result, and score every candidate beside it."""
        if call.layer in self.alone:
            return self._run(self.alone[call.layer], q, k, v, call)[0]
        out = _DENSE.forward(q, k, v, call, state)
        if not self.alone:
            self._score(q, k, v, out, call)
        return out

    def _score(self, q: Tensor, k: Tensor, v: Tensor, dense: Tensor, call: AttentionCall) -> None:
        self.scores.note_shape(self.title, Shape.of(q, call))
        reference = Reference.of(dense, call, self.projections[call.layer])
        heads = q.shape[1]
        ones = torch.ones(heads, device=q.device)
        rows = [(0 * ones, 0 * ones, ones, ones)]
        for index in range(1, len(self.candidates)):
            if index in self.left_out:
                rows.append((torch.nan * ones, torch.nan * ones, torch.nan * ones, torch.nan * ones))
                continue
            method = self.candidates[index]
            out, state = self._run(index, q, k, v, call)
            pattern = known_pattern(method, q, k, call, state)
            recall = torch.nan * ones if pattern is None else sampled_recall(q, k, pattern, call)
            rows.append((*reference.errors(out), recall, head_density(pattern, call, state, heads)))
            del out, state, pattern
            self.advance(1)
        error, head_error, recall, density = (torch.stack(x).cpu().numpy() for x in zip(*rows, strict=True))
        mass = frame_mass(q, k, call).cpu().numpy()
        self.scores.calls.append(
            CallScores(self.title, call.step, call.branch, call.layer, error, head_error, recall, density, mass)
        )

    def _run(self, index: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, MethodState]:
        method = self.candidates[index]
        state = MethodState(cache=self.caches[index], kernel=self.kernel, precision=self.precision)
        with naming(method):
            out = method.forward(q, k, v, call, state)
            if not method.static and type(method).forward is not BlockMethod.forward:
                # its first call may be a dense one, from which it learns what later ones leave out
                state.refresh = False
                out = method.forward(q, k, v, call, state)
        return out, state


@contextmanager
def capturing(
    pipeline: Any,
    candidates: Sequence[AttentionMethod],
    schedule: Schedule,
    *,
    kernel: str | None = None,
    precision: str | None = None,
    left_out: frozenset[int] = frozenset(),
    changes: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[Scores]:
    """Score candidates while a pipeline makes one video with its own attention.

    Args:
        pipeline: A diffusers pipeline.
        candidates: The candidates, the first of which is dense.
        schedule: Which calls are scored: those that it does not call dense. ``SampledSteps`` picks steps.
        kernel: Name of the kernel to use; ``None`` chooses.
        precision: ``"int8"`` or ``"int8_fp8"`` for products in low precision; ``None`` for that of the model.
        left_out: Indices of candidates that are not run.
        changes: Whether to measure also what one sparse layer changes of a transformer's output; this takes as many
            more forward passes as there are layers, at the first pass of each sampled step.
        advance: Called with 1 after each attention call of a candidate, and with the number of layers after each
            forward pass.

    Returns:
        The scores, which fill up.

    Raises:
        ValueError: Sparse attention is enabled already, or the model is of no family that is known.
    """
    scores = Scores()
    watches: list[_Watch] = []
    hooks: list[Any] = []

    def probe(title: str, family: ModelFamily, transformer: Module) -> Probe:
        return Probe(
            title=title,
            candidates=candidates,
            projections=[
                family.output_projection(transformer, path) for path, _ in family.self_attentions(transformer)
            ],
            scores=scores,
            caches=[PatternCache() for _ in candidates],
            kernel=kernel,
            precision=precision,
            advance=advance,
            left_out=left_out,
        )

    with probing(pipeline, probe, schedule) as installed_probes:
        try:
            for transformer, runtime in installed_probes:
                watch = _Watch(runtime, changes)
                watches.append(watch)
                outside: Any = torch.compiler.disable  # never part of a graph
                hooks.append(transformer.register_forward_pre_hook(outside(watch.before_forward)))
                hooks.append(transformer.register_forward_hook(outside(watch.after_forward), with_kwargs=True))
            yield scores
        finally:
            for hook in hooks:
                hook.remove()
    scores.seconds = sum(watch.seconds for watch in watches)
    scores.attention_seconds = sum(watch.attention_seconds for watch in watches)


@contextmanager
def probing(
    pipeline: Any, method: Callable[[str, ModelFamily, Module], AttentionMethod], schedule: Schedule
) -> Iterator[list[tuple[Module, Runtime]]]:
    """Lead the self-attention of a pipeline's transformers to methods that look at it.

    Args:
        pipeline: A diffusers pipeline.
        method: From a transformer's title, family and model to its method.
        schedule: Which calls are led there: those that it does not call dense.

    Raises:
        ValueError: Sparse attention is enabled already, or the model is of no family that is known.
    """
    transformers = require_transformers(pipeline)
    if any(installed(transformer) is not None for transformer in transformers.values()):
        raise ValueError(
            "sparse attention is enabled on this pipeline; call disable_sparse_attention() before a search"
        )
    tracker = RunTracker(pipeline)
    found = []
    try:
        for title, transformer in transformers.items():
            family = find_family(transformer)
            modules = family.self_attentions(transformer)
            settings = Settings(method(title, family, transformer), schedule)
            runtime = Runtime(family, settings, tracker, [path for path, _ in modules], title)
            install(transformer, runtime, modules)
            found.append((transformer, runtime))
        yield found
    finally:
        for transformer in transformers.values():
            uninstall(transformer)


class _Watch:
    """Follow the forward passes of a transformer: which steps there are, and what one sparse layer changes of them."""

    def __init__(self, runtime: Runtime, changes: bool) -> None:
        assert isinstance(runtime.settings.method, Probe)
        self.runtime = runtime
        self.probe = runtime.settings.method
        self.changes = changes
        self.measured: set[int] = set()
        self.seconds = 0.0
        self.attention_seconds = 0.0

    def before_forward(self, transformer: Any, args: tuple[Any, ...]) -> None:
        self.sparse_calls = sum(layer.stats.sparse_calls for layer in self.runtime.layers)
        self.attention = sum(layer.stats.dense_time.seconds for layer in self.runtime.layers)
        self.began = time.perf_counter()

    def after_forward(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        scores, forward = self.probe.scores, self.runtime.forward
        assert forward is not None
        position = forward.position
        layers = self.runtime.layers
        if sum(layer.stats.sparse_calls for layer in layers) == self.sparse_calls:
            # waits for the device, so that both times are of the same work
            self.attention_seconds += sum(layer.stats.dense_time.seconds for layer in layers) - self.attention
            self.seconds += time.perf_counter() - self.began
        scores.note_step(self.probe.title, position.step, position.num_steps)
        self.probe.advance(len(self.runtime.layers))
        if not self.changes or position.step in self.measured:
            return
        self.measured.add(position.step)
        mine = (self.probe.title, position.step, position.branch)
        # a layer may make several calls in one pass, one for each sample: the first stands for all
        calls = {c.layer: c for c in reversed(scores.calls) if (c.title, c.step, c.branch) == mine}
        for layer, call in sorted(calls.items()):
            candidate = call.typical_candidate()
            if candidate is not None:
                self.probe.alone[layer] = candidate
                # not the module itself: its hooks would take this for a pass of the pipeline
                changed = _relative_change(transformer.forward(*args, **kwargs)[0], output[0])
                del self.probe.alone[layer]
                scores.changes.append(Change(*mine, layer, candidate, call.layer_error(candidate), changed))
                self.probe.advance(len(self.runtime.layers))


@torch.no_grad()
def _relative_change(output: Tensor, reference: Tensor) -> float:
    difference = torch.linalg.vector_norm(output.float() - reference.float())
    return float(difference / torch.linalg.vector_norm(reference.float()))


class LiveSamples:
    """Give queries and keys of a transformer's attention calls, each time from a new run of the pipeline.

    The pipeline runs in a thread of its own and waits while a sample is looked at, so that no more than one call's
    tensors are ever held.

    Args:
        pipeline: A diffusers pipeline.
        title: The transformer whose calls are wanted.
        schedule: Which calls are given: those that it does not call dense.
        generate: Runs the pipeline; the same video every time.
    """

    def __init__(self, pipeline: Any, title: str, schedule: Schedule, generate: Callable[[], Any]) -> None:
        self.pipeline = pipeline
        self.title = title
        self.schedule = schedule
        self.generate = generate

    def any(self) -> bool:
        """Say whether there are samples; where there are, the pipeline runs no further than to the first."""
        with closing(iter(self)) as samples:
            return next(samples, None) is not None

    def __iter__(self) -> Generator[Sample, None, None]:
        """Run the pipeline and yield ``(q, k, call)``, with ``(B, H, S, D)`` queries and keys."""
        window = _Window()
        thread = Thread(target=self._run, args=(window,), daemon=True)
        thread.start()
        outcome: Sample | BaseException | None = None
        try:
            while isinstance(outcome := window.given.get(), tuple):
                yield outcome
                window.wanted.put(True)
        finally:
            window.wanted.put(False)
            thread.join()
        if outcome is not None:
            raise outcome

    def _run(self, window: _Window) -> None:
        def method(title: str, family: ModelFamily, transformer: Module) -> AttentionMethod:
            return window if title == self.title else _DENSE

        try:
            with probing(self.pipeline, method, self.schedule):
                self.generate()
            window.given.put(None)
        except _Closed:
            return
        except BaseException as error:  # noqa: BLE001 - it is raised again where the samples are looked at
            window.given.put(error)


class _Closed(BaseException):
    """Nobody looks at samples any more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Window(AttentionMethod):
    """Attend to everything, and wait while somebody looks at queries and keys."""

    given: Queue[Any] = field(default_factory=Queue)
    wanted: Queue[bool] = field(default_factory=Queue)

    name = "window"

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        return _DENSE.pattern(q, k, call, state)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState) -> Tensor:
        self.given.put((q, k, call))
        if not self.wanted.get():
            raise _Closed
        return _DENSE.forward(q, k, v, call, state)

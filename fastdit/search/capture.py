"""Scores of candidates on the live attention calls of a pipeline, which goes on with its dense results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..attention import AttentionMethod, BlockMethod, MethodState, PatternCache
from ..metrics import relative_l2
from ..pipelines.observe import ObservedCall, observe
from ..pipelines.runtime import Runtime
from ..schedule import Schedule
from .scores import CallScores, Change, Scores, Shape
from .scoring import Reference, frame_mass, head_density, known_pattern, naming, sampled_recall


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

    One candidate runs at a time and its result is dropped, so beside the tensors of the call there are only the dense
    output, what one sparse call of the candidate needs, and ``S x D`` fp32 of one head.

    Args:
        pipeline: A diffusers pipeline.
        candidates: The candidates, the first of which is dense.
        schedule: Which calls are scored: those that it does not call dense. ``SampledSteps`` picks steps.
        kernel: Name of the kernel to use; ``None`` chooses.
        precision: ``"int8"`` or ``"int8_fp8"`` for products in low precision; ``None`` for that of the model.
        left_out: Indices of candidates that are not run; their scores are NaN.
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
    scorers: dict[str, _Scorer] = {}
    with (
        observe(pipeline, lambda seen: scorers[seen.title].look(seen), schedule=schedule) as observed,
        ExitStack() as hooks,
    ):
        for transformer, runtime in observed:
            scorer = _Scorer(scores, transformer, runtime, candidates, kernel, precision, left_out, changes, advance)
            scorers[runtime.title] = scorer
            outside: Any = torch.compiler.disable  # never part of a graph
            before = transformer.register_forward_pre_hook(outside(scorer.before_forward))
            after = transformer.register_forward_hook(outside(scorer.after_forward), with_kwargs=True)
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        yield scores


class _Scorer:
    """The candidates beside the calls of one transformer, and what its forward passes tell."""

    def __init__(
        self,
        scores: Scores,
        transformer: Module,
        runtime: Runtime,
        candidates: Sequence[AttentionMethod],
        kernel: str | None,
        precision: str | None,
        left_out: frozenset[int],
        changes: bool,
        advance: Callable[[int], None],
    ) -> None:
        self.scores, self.runtime, self.candidates = scores, runtime, candidates
        self.kernel, self.precision, self.left_out = kernel, precision, left_out
        self.changes, self.advance = changes, advance
        self.projections = [runtime.family.output_projection(transformer, layer.name) for layer in runtime.layers]
        self.caches = [PatternCache() for _ in candidates]
        self.measured: set[int] = set()
        self.alone: tuple[int, int] | None = None  # the layer that runs sparse by itself, and with which candidate

    @torch.no_grad()
    def look(self, seen: ObservedCall) -> Tensor | None:
        """Score every candidate, or run the one whose change of the transformer's output is measured."""
        if self.alone is None:
            self._score(seen)
        elif self.alone[0] == seen.call.layer:
            return self._run(self.alone[1], seen)[0]
        return None

    def _score(self, seen: ObservedCall) -> None:
        title, q, k, _, dense, call = seen
        self.scores.shapes.setdefault(title, Shape.of(q, call))
        reference = Reference.of(dense, call, self.projections[call.layer])
        heads = q.shape[1]
        ones = torch.ones(heads, device=q.device)
        unknown = torch.nan * ones
        rows = [(0 * ones, 0 * ones, ones, ones)]
        for index, method in enumerate(self.candidates[1:], start=1):
            if index in self.left_out:
                rows.append((unknown, unknown, unknown, unknown))
                continue
            out, state = self._run(index, seen)
            pattern = known_pattern(method, q, k, call, state)
            recall = unknown if pattern is None else sampled_recall(q, k, pattern, call)
            rows.append((*reference.errors(out), recall, head_density(pattern, call, state, heads)))
            del out, state, pattern
            self.advance(1)
        error, head_error, recalls, density = (torch.stack(x).cpu().numpy() for x in zip(*rows, strict=True))
        mass = frame_mass(q, k, call).cpu().numpy()
        place = (title, call.step, call.branch, call.layer)
        self.scores.calls.append(CallScores(*place, error, head_error, recalls, density, mass))

    def _run(self, index: int, seen: ObservedCall) -> tuple[Tensor, MethodState]:
        method, (_, q, k, v, _, call) = self.candidates[index], seen
        state = MethodState(cache=self.caches[index], kernel=self.kernel, precision=self.precision)
        with naming(method):
            out = method.forward(q, k, v, call, state)
            if not method.static and type(method).forward is not BlockMethod.forward:
                # its first call may be a dense one, from which it learns what later ones leave out
                state.refresh = False
                out = method.forward(q, k, v, call, state)
        return out, state

    def before_forward(self, transformer: Any, args: tuple[Any, ...]) -> None:
        self.scored, self.attention = self._stats()
        self.began = time.perf_counter()

    @torch.no_grad()
    def after_forward(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        scores, runtime = self.scores, self.runtime
        assert runtime.forward is not None
        position, title, layers = runtime.forward.position, runtime.title, len(runtime.layers)
        scored, attention = self._stats()  # waits for the device, so that both times are of the same work
        if scored == self.scored:
            scores.attention_seconds += attention - self.attention
            scores.seconds += time.perf_counter() - self.began
        scores.num_steps = position.num_steps
        steps = scores.steps.setdefault(title, [])
        if position.step not in steps:
            steps.append(position.step)
        self.advance(layers)
        if not self.changes or position.step in self.measured:
            return
        self.measured.add(position.step)
        mine = (title, position.step, position.branch)
        # a layer may make several calls in one pass, one for each sample: the first stands for all
        calls = {c.layer: c for c in reversed(scores.calls) if (c.title, c.step, c.branch) == mine}
        for layer, call in sorted(calls.items()):
            candidate = call.typical_candidate()
            if candidate is not None:
                self.alone = layer, candidate
                # not the module itself: its hooks would take this for a pass of the pipeline
                changed = float(relative_l2(transformer.forward(*args, **kwargs)[0], output[0]))
                self.alone = None
                scores.changes.append(Change(*mine, layer, candidate, call.layer_error(candidate), changed))
                self.advance(layers)

    def _stats(self) -> tuple[int, float]:
        stats = [layer.stats for layer in self.runtime.layers]
        return sum(each.sparse_calls for each in stats), sum(each.dense_time.seconds for each in stats)

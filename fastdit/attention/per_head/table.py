"""A method for every step bucket, layer and head: how a searched plan runs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...schedule import check_edges, step_bucket
from ...tokens import AttentionCall
from ..method import AttentionMethod
from ..pattern import Group, Heads, Pattern, merge_heads
from ..state import MethodState, PatternCache
from .head_groups import HeadGroups, SharedPatterns

MAX_SIZES = 2
"""Sizes of video whose patterns are kept: those of all layers together are large."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Table(AttentionMethod):
    """A method for each head, by step bucket and layer.

    Heads of one method run together, and so do methods that order tokens alike, in blocks of one size. Empty methods
    compute nothing. Patterns that depend on the token spec alone are built once for all layers.

    Args:
        edges: Ends of the step buckets as fractions of the run, ascending, the last one 1.
        methods: What there is to choose from.
        choices: For each bucket, layer and head the index of its method.

    Raises:
        ValueError: Edges, methods and choices do not fit each other.
        TypeError: A method is none, or a table itself.
    """

    name: ClassVar[str] = "plan"

    edges: tuple[float, ...]
    methods: tuple[AttentionMethod, ...]
    choices: tuple[tuple[Heads, ...], ...]

    def __post_init__(self) -> None:
        check_edges(self.edges)
        for method in self.methods:
            if not isinstance(method, AttentionMethod) or isinstance(method, Table):
                raise TypeError(f"methods must be methods other than a table, got {method!r}")
        shapes = {(len(bucket), len(row)) for bucket in self.choices for row in bucket}
        if len(self.choices) != len(self.edges) or len(shapes) != 1 or 0 in min(shapes):
            raise ValueError(
                f"choices must name a method for each of {len(self.edges)} buckets, and as many layers and heads in "
                f"each, got {len(self.choices)} buckets with (layers, heads) {sorted(shapes)}"
            )
        wrong = {i for bucket in self.choices for row in bucket for i in row} - set(range(len(self.methods)))
        if wrong:
            raise ValueError(f"choices must be indices of {len(self.methods)} methods, got {sorted(wrong)[:4]}")

    @property
    def num_layers(self) -> int:
        """Count the layers."""
        return len(self.choices[0])

    @property
    def num_heads(self) -> int:
        """Count the heads of a layer."""
        return len(self.choices[0][0])

    def describe(self) -> dict[str, Any]:
        """Return the size of the table, and which methods have which share of it, as values that JSON can hold."""
        count = Counter(i for bucket in self.choices for row in bucket for i in row)
        total = sum(count.values())
        return {
            "buckets": len(self.edges),
            "layers": self.num_layers,
            "heads": self.num_heads,
            "methods": {method_label(self.methods[i]): round(n / total, 4) for i, n in count.most_common()},
        }

    def groups(self, call: AttentionCall, heads: int) -> tuple[Group, ...]:
        """Return which methods a call runs, and for which of its heads.

        Args:
            call: The call.
            heads: Heads that it has, at least 1.

        Raises:
            ValueError: The table is for another number of layers or heads, or the bucket cannot be known.
        """
        if (call.num_layers, heads) != (self.num_layers, self.num_heads):
            raise ValueError(
                f"the table is for {self.num_layers} layers of {self.num_heads} heads, got a call of a model with "
                f"{call.num_layers} layers of {heads} heads; it runs the model that it was searched for"
            )
        return self._groups[step_bucket(self.edges, call.step, call.num_steps)][call.layer]

    @cached_property
    def _groups(self) -> tuple[tuple[tuple[Group, ...], ...], ...]:
        def group(row: Heads) -> tuple[Group, ...]:
            return tuple((i, tuple(head for head, j in enumerate(row) if i == j)) for i in dict.fromkeys(row))

        return tuple(tuple(group(row) for row in bucket) for bucket in self.choices)

    @cached_property
    def _hash(self) -> int:
        return hash((self.edges, self.methods, self.choices))

    def __hash__(self) -> int:
        return self._hash  # asked for in every call

    def __repr__(self) -> str:
        about = self.describe()
        shares = ", ".join(f"{share:.0%} {label}" for label, share in about["methods"].items())
        return f"Table({len(self.edges)} buckets, {self.num_layers} layers, {self.num_heads} heads: {shares})"

    def patterns(
        self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState
    ) -> tuple[tuple[Heads, Pattern], ...]:
        """Choose order and blocks of each group of heads.

        Arguments as for ``pattern``.

        Returns:
            Heads and their pattern. That of an empty method is not run.
        """
        heads = self._heads(q, k, call, state)
        return tuple((group[1], heads.pattern(group)) for group in self.groups(call, q.shape[1]))

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        """Choose order and blocks, where all heads of the layer have the same order.

        Raises:
            ValueError: Heads have different orders, so that there is no one pattern.
        """
        patterns = self.patterns(q, k, call, state)
        shared = self._shared(q, call, state)
        if len({shared.kind(pattern) for _, pattern in patterns}) > 1:
            raise ValueError(
                "heads of this layer have different orders or block sizes; use patterns, which returns all"
            )
        return merge_heads(patterns)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState) -> Tensor:
        """Compute the attention of all heads, in as few launches as their methods allow."""
        heads = q.shape[1]
        launches = self._heads(q, k, call, state).launches(self.groups(call, heads))
        if len(launches) == 1 and len(launches[0].heads) == heads:
            out = launches[0].run(q, k, v, call)
            state.kept = launches[0].state.kept
            return out
        out = torch.zeros_like(q) if sum(len(launch.heads) for launch in launches) < heads else torch.empty_like(q)
        kept: Tensor | None = torch.zeros((), dtype=torch.float32, device=q.device)
        for launch in launches:
            own = state.measure("order", q.device, lambda launch=launch: [launch.select(x) for x in (q, k, v)])
            part = launch.run(own[0], own[1], own[2], call)
            state.measure("order", q.device, lambda launch=launch, part=part: launch.write(out, part))
            share = launch.state.kept
            kept = None if kept is None or share is None else kept + share * (len(launch.heads) / heads)
        state.kept = kept
        return out

    def _heads(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> HeadGroups:
        return HeadGroups(self.methods, q, k, call, state, self._shared(q, call, state))

    def _shared(self, q: Tensor, call: AttentionCall, state: MethodState) -> SharedPatterns:
        lock = state.cache.lock
        sizes = state.cache.static((self, q.device), lambda: PatternCache(limit=MAX_SIZES, lock=lock))
        return sizes.static(call.tokens, lambda: SharedPatterns(lock=lock))


def method_label(method: AttentionMethod) -> str:
    """Return name and parameters of a method in short: those that are not the default.

    Args:
        method: The method.
    """
    known = ((f.name, f.default, getattr(method, f.name)) for f in dataclasses.fields(method))
    changed = ", ".join(f"{name}={value}" for name, default, value in known if value != default)
    return f"{method.name}({changed})" if changed else method.name

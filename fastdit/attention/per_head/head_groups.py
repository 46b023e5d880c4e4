"""Groups of heads with a method each, computed in as few launches as their patterns allow."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Literal, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...layout import TokenLayout
from ...tokens import AttentionCall
from ..method import AttentionMethod, BlockMethod
from ..pattern import Group, Heads, Pattern, merge_heads
from ..state import MethodState, PatternCache

MAX_MERGED = 1 << 20
"""Entries of a list of blocks up to which launches are merged: heads with longer lists fill a device by themselves."""


@dataclass(frozen=True, eq=False)
class Launch:
    """One method on some of the heads.

    Args:
        method: The method.
        heads: Its heads, ascending.
        index: ``(n,)`` int64, the heads; ``None`` if they follow each other, so that nothing has to be copied.
        state: Memory of the method.
    """

    method: AttentionMethod
    heads: Heads
    index: Tensor | None
    state: MethodState

    def run(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """Compute the attention of the heads: ``(B, n, S, D)``.

        Args:
            q: ``(B, n, S, D)`` queries.
            k: ``(B, n, S, D)`` keys.
            v: ``(B, n, S, D)`` values.
            call: The call of the whole layer.
        """
        return self.method.forward(q, k, v, replace(call, heads=self.heads), self.state)

    def select(self, x: Tensor) -> Tensor:
        """Return the heads of a tensor: ``(B, n, S, D)``.

        Args:
            x: ``(B, H, S, D)``.
        """
        return x[:, self.heads[0] : self.heads[-1] + 1] if self.index is None else x.index_select(1, self.index)

    def write(self, out: Tensor, part: Tensor) -> None:
        """Put the heads into a tensor.

        Args:
            out: ``(B, H, S, D)``.
            part: ``(B, n, S, D)``.
        """
        if self.index is None:
            out[:, self.heads[0] : self.heads[-1] + 1] = part
        else:
            out.index_copy_(1, self.index, part)


@dataclass(frozen=True, eq=False)
class Merged:
    """One pattern for several groups.

    Args:
        sources: The patterns that it is made of.
        heads: The heads, ascending.
        pattern: The pattern.
        compensate: That of their methods.
    """

    sources: tuple[Pattern, ...]
    heads: Heads
    pattern: Pattern
    compensate: Literal["mean"] | None


@dataclass(eq=False)
class SharedPatterns(PatternCache):
    """Patterns that all layers share; their number is bounded by the methods, and none is evicted.

    Args:
        limit: ``None``.
        numbers: A number for each order of the tokens, by the layouts that have it. None is given twice, so that no
            layout is taken for one that is gone.
        unused: The numbers that are left.
    """

    limit: int | None = None
    numbers: WeakKeyDictionary[TokenLayout, int] = field(default_factory=WeakKeyDictionary)
    unused: Iterator[int] = field(default_factory=count)

    def kind(self, pattern: Pattern) -> Hashable:
        """Return a key of patterns that one launch can compute: their order and block sizes.

        Args:
            pattern: The pattern.
        """
        layout, mask = pattern.layout, pattern.mask
        if layout.index.shape[0] > 1:
            return layout
        with self.lock:
            if layout not in self.numbers:
                one_of_each = {number: other for other, number in self.numbers.items()}
                same = (number for number, other in one_of_each.items() if _same_order(layout, other))
                number = next(same, None)
                self.numbers[layout] = next(self.unused) if number is None else number
            return self.numbers[layout], mask.block_q, mask.block_k


@dataclass(eq=False)
class Memory:
    """The memory of a layer for its groups.

    Args:
        shape: Shape and device of the queries, and the token spec; all of it is for these.
        states: What each group remembers.
        merged: Patterns of groups that depend on queries and keys.
    """

    shape: tuple[Any, ...]
    states: dict[Group, MethodState] = field(default_factory=dict)
    merged: dict[tuple[Group, ...], Merged] = field(default_factory=dict)

    def forget_pattern(self) -> None:
        """Forget the patterns of all groups."""
        self.merged.clear()
        for state in self.states.values():
            state.forget_pattern()


class HeadGroups:
    """The launches of one call.

    Args:
        methods: What groups name by index.
        q: ``(B, H, S, D)`` queries.
        k: ``(B, H, S, D)`` keys.
        call: The call.
        state: Memory of the layer.
        shared: What all layers share.
    """

    def __init__(
        self,
        methods: Sequence[AttentionMethod],
        q: Tensor,
        k: Tensor,
        call: AttentionCall,
        state: MethodState,
        shared: SharedPatterns,
    ) -> None:
        self.methods, self.q, self.k, self.call, self.state, self.shared = methods, q, k, call, state, shared
        shape = (q.shape, q.device, call.tokens)
        memory = state.memory.get("groups")
        if memory is None or memory.shape != shape:
            memory = state.memory["groups"] = Memory(shape)
        self.memory: Memory = memory
        if state.refresh:
            memory.forget_pattern()  # also those of groups that other step buckets run
        for known in memory.states.values():
            known.refresh = state.refresh

    def launches(self, groups: Sequence[Group]) -> list[Launch]:
        """Return what has to run; empty methods do not.

        Args:
            groups: The groups.
        """
        live = tuple(group for group in groups if not self.methods[group[0]].empty)
        if all(method.static for method in (self.methods[i] for i, _ in live) if _only_lists(method)):
            planned = self.shared.static(("launches", live), lambda: self._plan(live))
        else:
            planned = self._plan(live)
        launches = []
        for together, merged in planned:
            if merged is None:
                launches += [self._launch(self.methods[i], heads, self._state((i, heads))) for i, heads in together]
            else:
                state = self._new_state(refresh=False, pattern=merged.pattern, tokens=self.call.tokens)
                launches.append(self._launch(_Given(compensate=merged.compensate), merged.heads, state))
        return launches

    def pattern(self, group: Group) -> Pattern:
        """Return the pattern of a group. Heads are copied only where it chooses blocks anew.

        Args:
            group: The group.
        """
        method, heads, state = self.methods[group[0]], group[1], self._state(group)
        if method.static or not (state.refresh or state.pattern is None):
            q = k = self.q[:, :1].expand(-1, len(heads), -1, -1)
        else:
            launch = self._launch(method, heads, state)
            q, k = launch.select(self.q), launch.select(self.k)
        pattern = method.resolve(q, k, replace(self.call, heads=heads), state)
        state.refresh = False
        return pattern

    def _plan(self, groups: Sequence[Group]) -> list[tuple[tuple[Group, ...], Merged | None]]:
        """Put groups together that one launch can compute, and merge their patterns."""
        listed = [group for group in groups if _only_lists(self.methods[group[0]])]
        if len(listed) < 2:
            return [((group,), None) for group in groups]
        kinds: dict[Hashable, list[Group]] = {}
        for group in groups:
            method = self.methods[group[0]]
            kind = group
            if _only_lists(method):
                kind = method.compensate, self.shared.kind(self.pattern(group))
            kinds.setdefault(kind, []).append(group)
        alike = [tuple(kind) for kind in kinds.values()]
        return [(together, self._merge(together) if len(together) > 1 else None) for together in alike]

    def _merge(self, groups: tuple[Group, ...]) -> Merged | None:
        """Return one pattern for groups, made where one of theirs is new; ``None`` if it would be too large."""
        patterns = tuple(self.pattern(group) for group in groups)
        lists = [pattern.mask.indices.shape for pattern in patterns]
        batch, width = (max(shape[axis] for shape in lists) for axis in (0, 3))
        if batch * sum(len(heads) for _, heads in groups) * lists[0][2] * width > MAX_MERGED:
            return None

        def merge() -> Merged:
            parts = [(heads, pattern) for (_, heads), pattern in zip(groups, patterns, strict=True)]
            pattern = self.state.measure("choice", self.q.device, lambda: merge_heads(parts))
            heads = tuple(sorted(head for heads, _ in parts for head in heads))
            return Merged(patterns, heads, pattern, getattr(self.methods[groups[0][0]], "compensate", None))

        if all(self.methods[i].static for i, _ in groups):
            return self.shared.static(("merged", groups), merge)
        merged = self.memory.merged.get(groups)
        if merged is None or any(a is not b for a, b in zip(merged.sources, patterns, strict=True)):
            merged = self.memory.merged[groups] = merge()
        return merged

    def _launch(self, method: AttentionMethod, heads: Heads, state: MethodState) -> Launch:
        if heads[-1] - heads[0] + 1 == len(heads):
            return Launch(method, heads, None, state)
        device = self.q.device
        index = self.shared.static(("heads", heads), lambda: torch.tensor(heads, device=device))
        return Launch(method, heads, index, state)

    def _state(self, group: Group) -> MethodState:
        states = self.memory.states
        if group not in states:
            states[group] = self._new_state(refresh=self.state.refresh)
        return states[group]

    def _new_state(self, **own: Any) -> MethodState:
        known = self.state
        names = ("kernel", "precision", "excuse", "measure")
        return MethodState(cache=self.shared, **{name: getattr(known, name) for name in names}, **own)


@dataclass(frozen=True, kw_only=True)
class _Given(BlockMethod):
    """A method whose pattern is set in its state."""

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        raise AssertionError("the pattern is given")


def _only_lists(method: AttentionMethod) -> TypeGuard[BlockMethod]:
    """Tell whether a method is its pattern and nothing more."""
    own = (getattr(type(method), name, None) for name in ("forward", "attend"))
    return isinstance(method, BlockMethod) and tuple(own) == (BlockMethod.forward, BlockMethod.attend)


def _same_order(a: TokenLayout, b: TokenLayout) -> bool:
    alike = a.block == b.block and a.video_blocks == b.video_blocks and a.index.shape == b.index.shape
    return alike and torch.equal(a.index, b.index)

"""Enable, inspect and disable sparse attention on a pipeline or a transformer."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.nn import Module

from .attention import AttentionMethod
from .attention.kernels.dispatch import explain_kernels, list_precisions
from .defaults import choose
from .pipelines.families.family import find_family
from .pipelines.interception.install import check_modules, install, uninstall
from .pipelines.interception.installation import installed
from .pipelines.run_tracker import RunTracker
from .pipelines.runtime import Layer, Runtime, Settings
from .pipelines.targets import find_transformers, require_transformers
from .pipelines.weights import load_weights, make_weights, save_weights
from .plans.plan import Plan
from .report import summary
from .schedule import Schedule


class SparseAttention:
    """Show and control the sparse attention of a pipeline; ``enable_sparse_attention`` returns one.

    Args:
        transformers: The models, kept by weak reference.
        runtimes: What runs their attention.
    """

    def __init__(self, transformers: Sequence[Module], runtimes: Sequence[Runtime]) -> None:
        self._transformers = [weakref.ref(transformer) for transformer in transformers]
        self._runtimes = list(runtimes)

    @property
    def method(self) -> AttentionMethod:
        """Return the method, that of the first transformer where a plan has one for each; ``report()`` has them all."""
        return self._runtimes[0].settings.method

    @property
    def schedule(self) -> Schedule:
        """Return which steps and layers stay dense."""
        return self._runtimes[0].settings.schedule

    @property
    def density(self) -> float | None:
        """Return the mean measured density of the sparse calls, in [0, 1]; ``None`` before the first."""
        return _density(self._layers())

    @property
    def overall_density(self) -> float | None:
        """Return the mean density of all calls, dense ones counted as 1; ``None`` before the first."""
        return _density(self._layers(), overall=True)

    @property
    def attention_seconds(self) -> float:
        """Return the time of all self-attention calls in seconds, waiting for the device."""
        return sum(_seconds(layer) for layer in self._layers())

    def summary(self) -> str:
        """Describe as a table what ran in each layer: calls, measured density, time, dense calls and why."""
        return summary(self.report())

    def report(self) -> dict[str, Any]:
        """Return everything ``summary()`` shows, as plain values that JSON can hold."""
        layers = [
            {"transformer": runtime.title, **_layer_report(layer)}
            for runtime in self._runtimes
            for layer in runtime.layers
        ]
        return {
            "method": _method_report(self._runtimes[0]),
            "methods": {runtime.title: _method_report(runtime) for runtime in self._runtimes},
            "schedule": asdict(self.schedule),
            "kernel": self._runtimes[0].settings.kernel,
            "precision": self._runtimes[0].settings.precision,
            "density": self.density,
            "overall_density": self.overall_density,
            "attention_seconds": self.attention_seconds,
            "totals": _totals(layers),
            "layers": layers,
        }

    def reset(self) -> None:
        """Forget counts, cached patterns and what methods remember; sparse attention stays enabled."""
        for runtime in self._runtimes:
            runtime.forget()

    def save_weights(self, path: str | Path) -> None:
        """Write what the method has learned as a safetensors file, for its field ``weights`` or ``load_weights``.

        Args:
            path: The file; one that is there is replaced.

        Raises:
            ValueError: The method learns nothing, or its weights are out of reach.
        """
        save_weights(path, self.method, {runtime.title: runtime.weights for runtime in self._runtimes})

    def load_weights(self, path: str | Path) -> None:
        """Read what the method has learned; if the file does not fit, nothing changes.

        Args:
            path: The file.

        Raises:
            ValueError: The method learns nothing, or the file is broken, or was made for something else.
            FileNotFoundError: There is no such file.
        """
        load_weights(path, self.method, {runtime.title: runtime.weights for runtime in self._runtimes})

    def disable(self) -> None:
        """Restore the stock attention, as ``disable_sparse_attention`` does; counts can still be read."""
        for reference, runtime in zip(self._transformers, self._runtimes, strict=True):
            transformer = reference()
            if transformer is None:
                continue
            found = installed(transformer)
            if found is not None and found.runtime is runtime:
                uninstall(transformer)
            runtime.release()

    def _layers(self) -> list[Layer]:
        return [layer for runtime in self._runtimes for layer in runtime.layers]

    def __repr__(self) -> str:
        return f"SparseAttention({self.method!r}, {self.schedule!r}, {len(self._layers())} layers)"


def enable_sparse_attention(
    target: Any,
    method: str | Path | AttentionMethod | Plan | None = None,
    *,
    schedule: Schedule | None = None,
    kernel: str | None = None,
    precision: str | None = None,
    **fields: Any,
) -> SparseAttention:
    """Run the video self-attention of a pipeline or transformer sparse, from its next call on.

    Sizes, steps and guidance passes are read from each call. Enabling again replaces what was enabled before.

    Args:
        target: A diffusers pipeline, whose ``transformer`` and ``transformer_2`` are both meant, or a transformer.
        method: Name of a method, a method, a plan that a search made, the path of its file, which ends in ``.json``, or
            ``None`` for the model's default: a plan that comes with fastdit for its configuration, or its preset.
        schedule: Which steps and layers stay dense; default: the plan's or the preset's. A bare transformer does not
            know how many steps there will be, so without a plan by default all of its calls are sparse.
        kernel: One of ``list_kernels()``; default: the fastest that can run.
        precision: One of ``list_precisions()``; default: the plan's or that of the model. Calls that it cannot speed up
            run in that of the model, with a warning and in ``summary()``.
        **fields: Fields of the method, such as ``density``, of the preset's without a name; the others are those
            published for the model (``fastdit.defaults``), or the method's defaults.

    Raises:
        ValueError: Model, method, kernel or precision is unknown, or a value is out of range or does not fit the
            model; nothing has changed then.
        FileNotFoundError: A file that the method needs is not there; nothing has changed then.
        TypeError: The method has no such field, or a method object is given together with fields.
        RuntimeError: The kernel asked for cannot run on this machine, or the attention processors of the model cannot
            be intercepted; nothing has changed then.
    """
    transformers = require_transformers(target)
    families = [find_family(transformer) for transformer in transformers.values()]
    choice = choose(target, method, **fields)
    precision = choice.precision if precision is None else precision
    _check_kernel(kernel, transformers.values())
    if precision is not None and precision not in list_precisions():
        raise ValueError(f"unknown precision {precision!r}; precisions are: {', '.join(list_precisions())}")
    schedule = choice.schedule if schedule is None else schedule
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a fastdit.Schedule, got {type(schedule).__name__}")
    tracker = RunTracker(None if isinstance(target, Module) else target)
    prepared = []
    for (title, transformer), family in zip(transformers.items(), families, strict=True):
        modules = family.self_attentions(transformer)
        _check_layers(schedule, len(modules))
        check_modules(transformer, family, modules)
        chosen = choice.methods[title]
        weights = make_weights(chosen, transformer, len(modules))
        settings = Settings(chosen, schedule, kernel, precision)
        runtime = Runtime(family, settings, tracker, [name for name, _ in modules], title, weights)
        prepared.append((transformer, runtime, modules))
    handle = SparseAttention(list(transformers.values()), [runtime for _, runtime, _ in prepared])
    path = getattr(handle.method, "weights", None)
    if path is not None:
        handle.load_weights(path)
    disable_sparse_attention(target)
    for transformer, runtime, modules in prepared:
        install(transformer, runtime, modules).owner = handle
    return handle


def disable_sparse_attention(target: Any) -> None:
    """Restore the stock attention exactly; without sparse attention nothing happens.

    Args:
        target: A diffusers pipeline or a transformer.

    Raises:
        ValueError: ``target`` has no transformer.
    """
    for transformer in require_transformers(target).values():
        found = installed(transformer)
        if found is not None:
            uninstall(transformer)
            found.runtime.release()


@contextmanager
def sparse_attention(
    target: Any,
    method: str | Path | AttentionMethod | Plan | None = None,
    *,
    schedule: Schedule | None = None,
    kernel: str | None = None,
    precision: str | None = None,
    **fields: Any,
) -> Iterator[SparseAttention]:
    """Enable sparse attention for the length of a ``with`` block.

    Args:
        target: As for ``enable_sparse_attention``.
        method: Likewise.
        schedule: Likewise.
        kernel: Likewise.
        precision: Likewise.
        **fields: Likewise.

    Raises:
        ValueError: As for ``enable_sparse_attention``.
        FileNotFoundError: Likewise.
        TypeError: Likewise.
        RuntimeError: Likewise.
    """
    handle = enable_sparse_attention(target, method, schedule=schedule, kernel=kernel, precision=precision, **fields)
    try:
        yield handle
    finally:
        handle.disable()


def find_sparse_attention(target: Any) -> SparseAttention | None:
    """Return the handle of a pipeline or transformer, or ``None`` where sparse attention is not enabled.

    Args:
        target: A diffusers pipeline or a transformer.
    """
    found = [(transformer, installed(transformer)) for transformer in find_transformers(target).values()]
    enabled = [(transformer, installation) for transformer, installation in found if installation is not None]
    if not enabled:
        return None
    owner = enabled[0][1].owner
    if owner is None:
        # a deep copy: it runs sparse like the original, and has counts of its own
        owner = SparseAttention([transformer for transformer, _ in enabled], [found.runtime for _, found in enabled])
        for _, installation in enabled:
            installation.owner = owner
    return owner


def _check_kernel(kernel: str | None, transformers: Iterable[Module]) -> None:
    if kernel is None:
        return
    reasons = explain_kernels()
    if kernel not in reasons:
        raise ValueError(f"unknown kernel {kernel!r}; kernels are: {', '.join(reasons)}")
    # a model without data may go to another machine before it runs
    meant_for_here = any(x.device.type != "meta" for transformer in transformers for x in transformer.parameters())
    if reasons[kernel] is not None and meant_for_here:
        raise RuntimeError(f"kernel {kernel!r} cannot run: {reasons[kernel]}; leave kernel out")


def _check_layers(schedule: Schedule, count: int) -> None:
    wrong = [index for index in schedule.dense_layers if not -count <= index < count]
    if wrong:
        raise ValueError(f"dense_layers names layers {wrong}, but the transformer has {count} self-attention layers")


def _seconds(layer: Layer) -> float:
    return layer.stats.sparse_time.seconds + layer.stats.dense_time.seconds


def _density(layers: Sequence[Layer], overall: bool = False) -> float | None:
    dense = sum(layer.stats.dense_calls for layer in layers) if overall else 0
    calls = sum(layer.stats.measured for layer in layers) + dense
    return (sum(layer.stats.kept for layer in layers) + dense) / calls if calls else None


def _method_report(runtime: Runtime) -> dict[str, Any]:
    method = runtime.settings.method
    return {"name": method.name, **method.describe()}


def _layer_report(layer: Layer) -> dict[str, Any]:
    stats = layer.stats
    return {
        "layer": layer.name,
        "calls": stats.calls,
        "sparse_calls": stats.sparse_calls,
        "density": _density([layer]),
        "sparse_seconds": stats.sparse_time.seconds,
        "dense_seconds": stats.dense_time.seconds,
        "choice_seconds": stats.parts["choice"].seconds,
        "order_seconds": stats.parts["order"].seconds,
        "dense": dict(stats.scheduled),
        "fallbacks": dict(stats.fallbacks),
        "precision_fallbacks": dict(stats.precision_fallbacks),
    }


def _totals(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sums = ("calls", "sparse_calls", "sparse_seconds", "dense_seconds", "choice_seconds", "order_seconds")
    reasons = ("dense", "fallbacks", "precision_fallbacks")
    totals: dict[str, Any] = {name: sum(layer[name] for layer in layers) for name in sums}
    totals |= {name: dict(sum((Counter(layer[name]) for layer in layers), Counter())) for name in reasons}
    return totals

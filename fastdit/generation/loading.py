"""Loading a pipeline and placing it on a device."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .sources import ModelSource

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "float16", "bfloat16")
OFFLOADS = ("none", "model", "sequential", "group")


def choose_device(asked: str) -> str:
    """Return the device to run on.

    Args:
        asked: ``"auto"`` or a torch device.

    Raises:
        InputError: The device does not exist or cannot be used.
    """
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise InputError(f"unknown device {asked!r}; give auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        raise InputError(f"--device {asked}: no CUDA device is available ({built}); leave it out to run on the CPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {asked}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise InputError(f"--device {asked} cannot be used: {error}") from error
    return asked


def device_name(device: str) -> str:
    """Name a device for a report: the GPU's own name, or the number of threads a CPU is used with.

    Args:
        device: Where a pipeline runs.
    """
    import torch

    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device == "cpu" else device


def choose_dtype(asked: str, device: str) -> torch.dtype:
    """Return the dtype to load weights in.

    Args:
        asked: One of ``DTYPES``; ``"auto"`` is bfloat16 on CUDA and float32 elsewhere.
        device: Where the pipeline will run.
    """
    import torch

    if asked == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    return getattr(torch, asked)


def check_offload(offload: str, device: str) -> None:
    """Check that a kind of offload can work.

    Args:
        offload: One of ``OFFLOADS``.
        device: Where the pipeline will run.

    Raises:
        InputError: It needs an accelerator and the device is a CPU.
    """
    if offload in ("model", "sequential") and device == "cpu":
        raise InputError(f"--offload {offload} needs an accelerator, got device {device}; leave it out on a CPU")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Turn off the progress bars and logging of diffusers and transformers; fastdit shows its own."""
    import diffusers.utils.logging
    import transformers.utils.logging
    from huggingface_hub.utils.tqdm import progress_bar_states

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    of_hub = dict(progress_bar_states)  # transformers turns those of the hub off and on with its own
    try:
        for library in libraries:
            library.disable_progress_bar()
            library.set_verbosity_error()
        yield
    finally:
        for library, verbosity, shown in before:
            library.set_verbosity(verbosity)
            if shown:
                library.enable_progress_bar()
        progress_bar_states.clear()
        progress_bar_states.update(of_hub)


def load_model(source: ModelSource, *, device: str, dtype: torch.dtype, offload: str, compiled: bool) -> Any:
    """Load a pipeline and put it on its device.

    Args:
        source: Where it is.
        device: Where it runs.
        dtype: Dtype of its weights.
        offload: One of ``OFFLOADS``.
        compiled: Whether the transformers are compiled, at their first call.

    Raises:
        InputError: The weights are damaged, missing or of another model.
    """
    from ..pipelines.targets import find_transformers

    pipeline = _read_weights(source, dtype)
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        import torch

        pipeline.enable_group_offload(torch.device(device), offload_type="leaf_level")
    else:
        pipeline.to(device)
    transformers: list[Any] = list(find_transformers(pipeline).values()) if compiled else []
    for transformer in transformers:
        if getattr(transformer, "_repeated_blocks", None):
            transformer.compile_repeated_blocks()
        else:
            transformer.compile()
    return pipeline


def outline(source: ModelSource) -> SimpleNamespace:
    """Make the transformers of a pipeline on the meta device, from their configurations alone.

    Args:
        source: Where the pipeline is.

    Returns:
        ``transformer``, and ``transformer_2`` where there is one, as attributes.

    Raises:
        InputError: A configuration is missing or damaged.
    """
    import diffusers
    import torch

    from ..demo import WEIGHTS

    place, found = source.place or WEIGHTS, SimpleNamespace()
    try:
        index: Any = diffusers.DiffusionPipeline.load_config(place, local_files_only=source.local)
        for title in ("transformer", "transformer_2"):
            _, name = index.get(title) or (None, None)
            if name is not None:
                cls = getattr(diffusers, name)
                config = cls.load_config(place, subfolder=title, local_files_only=source.local)
                with torch.device("meta"):
                    setattr(found, title, cls.from_config(config))
    except Exception as error:
        raise InputError(f"the configuration of {source.name} cannot be read: {error}") from error
    return found


def _read_weights(source: ModelSource, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    from ..demo import DemoWeightsError, load_pipeline

    if source.place is None:
        try:
            return load_pipeline(dtype=dtype)
        except DemoWeightsError as error:
            raise InputError(str(error)) from error
    try:
        pipeline = DiffusionPipeline.from_pretrained(source.place, torch_dtype=dtype, local_files_only=source.local)
    except Exception as error:
        raise InputError(f"the model {source.name} cannot be loaded: {error}") from error
    if source.local and Path(source.place).is_dir():
        _check_complete(pipeline, Path(source.place))
    _check_callable(pipeline)
    return pipeline


def _check_callable(pipeline: Any) -> None:
    parameters = inspect.signature(pipeline.__call__).parameters.values()
    plain = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [p.name for p in plain if p.default is p.empty and p.name != "prompt"]
    if needed:
        raise InputError(
            f"{type(pipeline).__name__} needs {' and '.join(needed)} in addition to a prompt, which the command line "
            "cannot pass; use it from Python with pipe.enable_sparse_attention()"
        )


def _check_complete(pipeline: Any, folder: Path) -> None:
    from diffusers import ModelMixin
    from safetensors import safe_open

    for name, part in pipeline.components.items():
        files = sorted((folder / name).glob("*.safetensors"))
        if not isinstance(part, ModelMixin) or not files:
            continue
        stored: set[str] = set()
        for file in files:
            with safe_open(file, framework="pt") as opened:
                stored.update(opened.keys())
        missing = sorted(set(part.state_dict()) - stored)
        if missing:
            raise InputError(
                f"{folder / name} does not hold the weights of a {type(part).__name__}: "
                f"{len(missing)} of {len(part.state_dict())} are missing, such as {missing[0]}"
            )

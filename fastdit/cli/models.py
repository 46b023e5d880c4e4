"""Where a pipeline comes from: the demo, a folder or the hub; checked as far as possible before it is loaded."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, as_input_error

if TYPE_CHECKING:
    import torch

DEMO = "demo"
DTYPES = ("auto", "float32", "float16", "bfloat16")
OFFLOADS = ("none", "model", "sequential", "group")


@dataclass(frozen=True)
class ModelSource:
    """Say where a pipeline is loaded from.

    Args:
        name: What the user asked for.
        place: A folder or hub id for diffusers; ``None`` for the demo.
        local: Whether nothing is to be downloaded.
        defaults: Keywords of the pipeline's call that differ from its own defaults.
        fps: Frames per second of its videos; ``None`` if the model does not say.
    """

    name: str
    place: str | None
    local: bool = True
    defaults: dict[str, Any] = field(default_factory=dict)
    fps: float | None = None


def find_model(name: str) -> ModelSource:
    """Look for a model, without loading its weights.

    Args:
        name: ``"demo"``, a folder made by ``save_pretrained``, or a hub id.

    Raises:
        InputError: There is no such model, it is no diffusers pipeline, or its class is not known.
    """
    if name == DEMO:
        from ..demo import DEFAULTS

        defaults = asdict(DEFAULTS)
        return ModelSource(name, None, fps=defaults.pop("fps"), defaults=defaults)
    path = Path(name).expanduser()
    if path.exists():
        _check_folder(path)
        return ModelSource(name, str(path))
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        return ModelSource(name, name, local=_find_on_hub(name))
    raise InputError(
        f"there is no model {name!r}: give demo, a folder of a diffusers pipeline, or a hub id (owner/name)"
    )


def choose_device(asked: str) -> str:
    """Return the device to run on.

    Args:
        asked: ``"auto"`` or a torch device.

    Raises:
        InputError: There is no such device here.
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
        raise InputError(f"--device {asked}: no CUDA device can be used here ({built}); leave it out to run on the CPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {asked}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise InputError(f"--device {asked} cannot be used here: {error}") from error
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
        InputError: It needs an accelerator and the device is none.
    """
    if offload in ("model", "sequential") and device == "cpu":
        raise InputError(
            f"--offload {offload} moves weights between an accelerator and the CPU, and there is only a CPU"
        )


def silence_libraries() -> None:
    """Turn off the progress bars and the chatter of diffusers and transformers; fastdit shows its own."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def load_model(source: ModelSource, *, device: str, dtype: torch.dtype, offload: str, compiled: bool) -> Any:
    """Load a pipeline and put it on its device.

    Args:
        source: Where it is.
        device: Where it runs.
        dtype: Of its weights.
        offload: One of ``OFFLOADS``.
        compiled: Whether the transformers are compiled, at their first call.

    Raises:
        InputError: The weights are damaged, missing or of another model.
    """
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
    for transformer in transformers_of(pipeline) if compiled else []:
        if getattr(transformer, "_repeated_blocks", None):
            transformer.compile_repeated_blocks()
        else:
            transformer.compile()
    return pipeline


def transformers_of(pipeline: Any) -> list[Any]:
    """Return the transformers of a pipeline, one or two.

    Args:
        pipeline: The pipeline.
    """
    both = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
    return [transformer for transformer in both if transformer is not None]


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
            f"{type(pipeline).__name__} needs {' and '.join(needed)} beside a prompt, which fastdit generate "
            "cannot give; use it from Python with pipe.enable_sparse_attention()"
        )


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise InputError(f"{path} is a file; give the folder of a diffusers pipeline, as save_pretrained writes it")
    if not (path / "model_index.json").is_file():
        raise InputError(f"{path} is no diffusers pipeline: it has no model_index.json")
    _check_index(str(path), path / "model_index.json")


def _check_index(model: str, index: Path) -> None:
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        pipeline_class = parts["_class_name"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{index} is damaged: it does not say of which class the pipeline is") from error
    named = [parts.get(name) for name in ("transformer", "transformer_2")]
    classes = [part[1] for part in named if isinstance(part, list) and len(part) == 2 and isinstance(part[1], str)]
    if not classes:
        raise InputError(f"{model} is a {pipeline_class}, which has no transformer; fastdit speeds up video DiTs only")
    _find_class(model, "pipeline", pipeline_class)
    cls = _find_class(model, "transformer", classes[0])
    from ..pipelines import find_family

    with as_input_error():
        find_family(cls.__new__(cls))  # looks at nothing but the class


def _find_class(model: str, what: str, name: str) -> Any:
    import diffusers

    cls = getattr(diffusers, name, None)
    if not isinstance(cls, type):
        raise InputError(
            f"{model} has a {what} of class {name}, which diffusers {diffusers.__version__} does not know; "
            "a newer diffusers may"
        )
    return cls


def _find_on_hub(name: str) -> bool:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        files = {sibling.rfilename for sibling in HfApi().model_info(name, timeout=10).siblings or []}
        if "model_index.json" not in files:
            raise InputError(f"{name} is no diffusers pipeline: it has no model_index.json")
        _check_index(name, Path(hf_hub_download(name, "model_index.json")))
    except InputError:
        raise
    except GatedRepoError as error:
        raise InputError(f"{name} asks you to accept its terms on the hub first; then: hf auth login") from error
    except (RepositoryNotFoundError, HfHubHTTPError) as error:
        raise InputError(
            f"there is no folder {name}, and the hub has no such model, or it is private ({error}); "
            "check the name, or log in with: hf auth login"
        ) from error
    except Exception as error:
        cached = try_to_load_from_cache(name, "model_index.json")
        if not isinstance(cached, str):
            raise InputError(
                f"there is no folder {name}, the hub cannot be reached ({error}), and its cache here holds no copy; "
                "--model demo needs no network"
            ) from error
        _check_index(name, Path(cached))
        return True
    return False


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

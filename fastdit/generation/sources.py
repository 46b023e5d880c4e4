"""Sources of pipelines: the demo, a folder or the hub; checked without loading weights."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError, as_input_error

DEMO = "demo"


@dataclass(frozen=True)
class ModelSource:
    """Where a pipeline is loaded from.

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

    def files(self) -> list[Path]:
        """Return what a folder holds of the pipeline: its index and the folders of its parts; nothing of the hub's."""
        if self.place is None:
            from ..demo import WEIGHTS

            return [WEIGHTS]
        index = Path(self.place) / "model_index.json"
        if not index.is_file():
            return []
        parts = json.loads(index.read_text(encoding="utf-8"))
        return [index, *(index.parent / name for name in parts if not name.startswith("_"))]


def find_model(name: str) -> ModelSource:
    """Look for a model, without loading its weights.

    Args:
        name: ``"demo"``, a folder made by ``save_pretrained``, or a hub id.

    Raises:
        InputError: The model does not exist, is not a diffusers pipeline, or has an unknown class.
    """
    if name == DEMO:
        from ..demo import DEFAULTS

        defaults = asdict(DEFAULTS)
        return ModelSource(name, None, fps=defaults.pop("fps"), defaults=defaults)
    path = Path(name).expanduser()
    if os.path.exists(path):
        _check_folder(path)
        return ModelSource(name, str(path))
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        return ModelSource(name, name, local=_find_on_hub(name))
    raise InputError(
        f"no model {name!r} was found; pass demo, the folder of a diffusers pipeline, or a hub id (owner/name)"
    )


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise InputError(f"{path} is a file; pass the folder of a diffusers pipeline, as written by save_pretrained")
    if not (path / "model_index.json").is_file():
        raise InputError(f"{path} is not a diffusers pipeline: it has no model_index.json")
    _check_index(str(path), path / "model_index.json")


def _check_index(model: str, index: Path) -> None:
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        pipeline_class = parts["_class_name"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{index} is damaged: it does not name the class of the pipeline") from error
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
            raise InputError(f"{name} is not a diffusers pipeline: it has no model_index.json")
        _check_index(name, Path(hf_hub_download(name, "model_index.json")))
    except InputError:
        raise
    except GatedRepoError as error:
        raise InputError(f"{name} asks you to accept its terms on the hub first; then: hf auth login") from error
    except (RepositoryNotFoundError, HfHubHTTPError) as error:
        raise InputError(
            f"there is no folder {name}, and the hub has no such model or it is private ({error}); "
            "check the name, or log in with: hf auth login"
        ) from error
    except Exception as error:
        cached = try_to_load_from_cache(name, "model_index.json")
        if not isinstance(cached, str):
            raise InputError(
                f"there is no folder {name}, the hub cannot be reached ({error}), and the local cache holds no copy; "
                "--model demo needs no network"
            ) from error
        _check_index(name, Path(cached))
        return True
    return False

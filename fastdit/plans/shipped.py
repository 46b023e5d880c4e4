"""Plans that come with the package, for models that a search was run on."""

from __future__ import annotations

from pathlib import Path

from .plan import Plan

_FOLDER = Path(__file__).parent / "data"


def find_shipped_plan(config_hash: str) -> Plan | None:
    """Return the plan for models of a configuration, or ``None`` if there is none; weights are not looked at.

    The hash stands in the name of the file, so plans of other configurations are not read.

    Args:
        config_hash: What ``config_hash`` returns for the configuration of the pipeline's first transformer.

    Raises:
        PlanError: The file is damaged.
    """
    for path in _FOLDER.glob("*.json"):
        if path.stem.rpartition("-")[2] == config_hash:
            return Plan.load(path)
    return None

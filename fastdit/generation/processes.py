"""The processes that share the work of one run."""

from __future__ import annotations

import os
from typing import Any, TypeVar

Work = TypeVar("Work")


class Team:
    """Divide work among the processes of ``accelerate launch``; alone, one process does it all.

    Args:
        device: What the user asked for.
    """

    def __init__(self, device: str) -> None:
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch
            from accelerate import PartialState

            # without being told so, accelerate takes processes without an accelerator for single ones
            self._state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())

    @property
    def is_first(self) -> bool:
        """Return whether this process is the one that reports."""
        return self._state is None or self._state.is_main_process

    @property
    def device(self) -> str | None:
        """Return the device that is this process's own, ``None`` if it is alone."""
        if self._state is None:
            return None
        return "cpu" if self._state.device.type == "cpu" else str(self._state.device)

    def share(self, jobs: list[Work]) -> list[Work]:
        """Return the jobs of this process.

        Args:
            jobs: The jobs of all.
        """
        if self._state is None:
            return jobs
        with self._state.split_between_processes(jobs) as mine:
            return list(mine)

    def gather(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the results of all processes, in the order of the jobs.

        Args:
            results: Those of this process.
        """
        if self._state is None:
            return results
        from accelerate.utils import gather_object

        return gather_object(results)

    def close(self) -> None:
        """Leave the group of processes, all at once: one that leaves while another still talks to it may abort."""
        if self._state is not None:
            self._state.wait_for_everyone()
            self._state.destroy_process_group()

"""State of a forward pass, and memory between the forward passes of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..attention import MethodState
from ..tokens import TokenSpec, VideoGrid
from .padding import PaddingReader
from .run_tracker import Position


@dataclass
class Forward:
    """The running forward pass of a thread, or its latest, which checkpointing may recompute.

    Args:
        position: Its position in the denoising run.
        recall: Memory of its run.
        grid: The video tokens, or why they are unknown.
        calls: Attention calls of each layer.
        entered: How often the processor of each layer was called so far; not counted in compiled graphs.
        reached: Attention calls so far, per layer.
        mask_source: The argument that the model derives its attention mask from, if any.
        specs: Make-up of a sequence, or why it is unknown, by its length.
        ordered: Its tokens, if they are reordered once for all layers.
        crossed: Places where tokens were reordered or restored.
    """

    position: Position
    recall: Recall
    grid: VideoGrid | str
    calls: int
    entered: list[int]
    reached: list[int]
    mask_source: Any = None
    specs: dict[int, TokenSpec | str] = field(default_factory=dict)
    ordered: TokenSpec | None = None
    crossed: list[str] = field(default_factory=list)


@dataclass
class Memory:
    """The state of a method for one layer, guidance pass, turn and sample group.

    Args:
        state: State of the method.
        video: Number of the video.
        shape: Shape and device of the queries, and the make-up of the tokens.
        step: The denoising step of the latest call, -1 before the first.
        excuses: Why the running call is not in low precision.
    """

    state: MethodState
    video: int
    shape: tuple[Any, ...]
    step: int = -1
    excuses: set[str] = field(default_factory=set)


@dataclass(eq=False)
class Recall:
    """The memory of the layers of a transformer, for the videos of one run.

    Args:
        padding: Reader of the masks of its calls.
        memories: By layer, guidance pass, turn and sample group.
    """

    padding: PaddingReader = field(default_factory=PaddingReader)
    memories: dict[tuple[int, str, int, int], Memory] = field(default_factory=dict)

    def clear(self) -> None:
        """Clear all memory."""
        self.padding.clear()
        self.memories.clear()

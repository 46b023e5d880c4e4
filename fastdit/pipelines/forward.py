"""What is known during a forward pass, and what a transformer remembers from one to the next of the same run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..attention import MethodState
from ..tokens import TokenSpec, VideoGrid
from .padding import PaddingReader
from .run_tracker import Position


@dataclass
class Forward:
    """A forward pass of one thread: the running one, or its latest, which checkpointing may recompute.

    Args:
        position: Its place in the denoising run.
        recall: What its run remembers.
        grid: The video tokens, or the reason why they are unknown.
        calls: Attention calls that each layer makes in it.
        entered: How often the processor of each layer was called so far; not counted in compiled graphs.
        reached: Attention calls so far, per layer.
        mask_source: The argument that the model makes its attention mask from, if there is one.
        specs: What a sequence is made up of, or why that is unknown, by its length.
        ordered: Its tokens, if they are put into the order of the method once for all layers.
        crossed: Where they were put into it, or back.
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
    """A method's state for one layer, guidance pass, turn and sample group, and what it was made for.

    Args:
        state: What the method remembers.
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
    """What the layers of a transformer remember of the videos of one run.

    Args:
        padding: Reads the masks of its calls.
        memories: By layer, guidance pass, turn and sample group.
    """

    padding: PaddingReader = field(default_factory=PaddingReader)
    memories: dict[tuple[int, str, int, int], Memory] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget everything."""
        self.padding.clear()
        self.memories.clear()

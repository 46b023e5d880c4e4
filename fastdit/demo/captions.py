"""The words of the demo world: attributes, captions, and how a free prompt is read."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

OBJECT_COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.10, 0.10),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.95, 0.10),
    "green": (0.10, 0.90, 0.15),
    "blue": (0.10, 0.30, 1.00),
    "purple": (0.75, 0.15, 0.95),
    "white": (0.98, 0.98, 0.98),
}
BACKGROUND_COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.42, 0.07, 0.09),
    "green": (0.06, 0.34, 0.12),
    "blue": (0.06, 0.14, 0.46),
    "purple": (0.30, 0.07, 0.40),
    "gray": (0.32, 0.32, 0.32),
    "black": (0.03, 0.03, 0.03),
}
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "", "big")
MOTIONS = ("left", "right", "up", "down", "bouncing", "growing")
KINDS = ("", "gradient", "striped")

SYNONYMS: tuple[tuple[str, str], ...] = (
    ("ball|balls|disc|disk|dot|sphere|round|bubble", "circle"),
    ("box|block|cube", "square"),
    ("pyramid|cone", "triangle"),
    ("large|huge|giant|wide", "big"),
    ("little|tiny", "small"),
    ("violet|magenta|pink", "purple"),
    ("crimson|scarlet", "red"),
    ("golden|gold", "yellow"),
    ("grey|silver", "gray"),
    ("dark", "black"),
    ("rising|rises|climbing|climbs|ascending", "moving up"),
    ("falling|falls|dropping|drops|sinking|sinks|descending", "moving down"),
    (
        "moves|move|going|goes|sliding|slides|flying|flies|rolling|rolls|drifting|drifts|floating"
        "|floats|travelling|traveling|travels|running|runs",
        "moving",
    ),
    ("bounces|bounce|jumping|jumps|hopping|hops", "bouncing"),
    ("grows|grow|expanding|expands|swelling", "growing"),
    ("upwards|upward", "up"),
    ("downwards|downward", "down"),
    ("leftwards|leftward", "left"),
    ("rightwards|rightward", "right"),
    ("stripes|stripy|stripey|banded", "striped"),
    ("shaded|fading", "gradient"),
    ("floor|ground|wall|backdrop|sky|surface|field|table", "background"),
    ("over|against|above|across|upon", "on"),
)
"""Words that mean a word of the world: ``(alternatives, word)``; the tokenizer applies them."""

FILLERS = "a|an|the|one|to|plain|bright|vivid|with|its|is|of|in|front"
"""Words without a meaning here; the tokenizer drops them."""


@dataclass(frozen=True)
class Attributes:
    """The attributes of a caption. An empty ``size`` is the middle size, an empty ``kind`` a plain background.

    ``color``, ``shape``, ``motion`` and ``background`` are ``None`` where the caption is silent.
    """

    color: str | None
    shape: str | None
    motion: str | None
    background: str | None
    size: str = ""
    kind: str = ""


def normalize_prompt(prompt: str) -> str:
    """Return ``prompt`` in the words of the world: lower case, synonyms replaced, fillers dropped.

    Words that mean nothing here are kept as they are.
    """
    text = re.sub(r"[^a-z ]+", " ", prompt.lower())
    for alternatives, word in SYNONYMS:
        text = re.sub(rf"\b(?:{alternatives})\b", word, text)
    text = re.sub(rf"\b(?:{FILLERS})\b", " ", text)
    return re.sub(r"\s+", " ", text).strip()


def parse_caption(prompt: str) -> Attributes:
    """Read the attributes that ``prompt`` names.

    The colour in front of the shape is the object's, the one after ``on`` is the background's.
    """
    words = normalize_prompt(prompt).split()
    shape_at = next((i for i, word in enumerate(words) if word in SHAPES), None)
    on_at = next((i for i, word in enumerate(words) if word == "on"), len(words))
    front, back = words[:on_at], words[on_at:]
    if shape_at is not None and shape_at > on_at:
        front, back = words[on_at:], words[:on_at]

    def find(choices: tuple[str, ...] | dict[str, tuple[float, float, float]], where: list[str]):
        return next((word for word in where if word in choices), None)

    return Attributes(
        color=find(OBJECT_COLORS, front),
        shape=find(SHAPES, words),
        motion=find(MOTIONS, front) or find(MOTIONS, back),
        background=find(BACKGROUND_COLORS, back),
        size=find(SIZES, front) or "",
        kind=find(KINDS, back) or "",
    )


def write_caption(attributes: Attributes, color_first: bool = False) -> str:
    """Write a caption, e.g. "a big red circle moving up on a striped blue background".

    Args:
        attributes: What to say; what is ``None`` or empty is left out.
        color_first: Say "blue striped", not "striped blue".
    """
    a = attributes
    motion = a.motion if a.motion in ("bouncing", "growing", None) else f"moving {a.motion}"
    subject = " ".join(word for word in (a.size, a.color, a.shape, motion) if word)
    ground = (a.background, a.kind) if color_first else (a.kind, a.background)
    place = " ".join(word for word in (*ground, "background") if word)
    return f"{_article(subject)} {subject} on {_article(place)} {place}"


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def sample_attributes(rng: random.Random) -> Attributes:
    """Draw the attributes of one scene; object and background never share their colour."""
    color = rng.choice(tuple(OBJECT_COLORS))
    backgrounds = [name for name in BACKGROUND_COLORS if name != color]
    return Attributes(
        color=color,
        shape=rng.choice(SHAPES),
        motion=rng.choice(MOTIONS),
        background=rng.choice(backgrounds),
        size=rng.choice(SIZES),
        kind=rng.choices(KINDS, weights=(2, 1, 1))[0],
    )


HELD_OUT_CAPTIONS = (
    "a green square moving up on a blue background",
    "a red circle moving left on a black background",
    "a yellow triangle moving right on a purple background",
    "a white circle moving down on a red background",
    "a blue square bouncing on a gray background",
    "an orange circle growing on a green background",
    "a purple circle moving up on a gradient gray background",
    "a white triangle moving left on a striped blue background",
    "an orange square moving right on a gradient black background",
    "a green triangle moving down on a striped purple background",
    "a red circle bouncing on a striped blue background",
    "a yellow square growing on a gradient red background",
    "a big orange triangle moving up on a black background",
    "a small blue square moving left on a green background",
    "a big purple circle moving right on a gray background",
    "a small red triangle moving down on a blue background",
    "a yellow circle bouncing on a purple background",
    "a white square growing on a gray background",
    "a red square moving up on a striped green background",
    "a green circle moving left on a gradient purple background",
    "a blue circle moving right on a striped gray background",
    "a purple square moving down on a gradient blue background",
    "an orange triangle bouncing on a gradient red background",
    "a purple triangle growing on a striped black background",
)
"""Never trained on: no training clip has such a colour, shape, motion and background together."""


def is_held_out(shown: Attributes) -> bool:
    """Tell whether a scene is one of ``HELD_OUT_CAPTIONS``, whatever its size and pattern."""
    return _combination(shown) in {_combination(parse_caption(c)) for c in HELD_OUT_CAPTIONS}


def _combination(a: Attributes) -> tuple[str | None, ...]:
    return (a.color, a.shape, a.motion, a.background)

"""Prompts to search with, where the user has none: many subjects, motions, cameras and kinds of light."""

from __future__ import annotations

CALIBRATION_PROMPTS = (
    "A golden retriever runs along a beach at sunset, waves breaking behind it, the camera following from the side.",
    "A slow aerial shot over a mountain lake in autumn, mist drifting between the trees.",
    "A chef chops vegetables in a bright kitchen, close-up of hands and knife, steam rising in the background.",
    "Rain falls on a neon-lit street at night, people with umbrellas walk past, reflections in the puddles.",
    "A paper boat floats down a small stream, turning slowly, leaves passing by.",
    "An astronaut walks across a red desert, dust blowing, a static camera far away.",
    "A ballet dancer spins on a dark stage under a single spotlight.",
    "Time lapse of clouds moving over a city skyline from day to night.",
    "A macro shot of a bee landing on a purple flower, its wings moving fast.",
    "Two children build a sand castle, laughing, hand-held camera, midday sun.",
    "A steam train crosses a stone bridge in the snow, smoke trailing behind.",
    "An old man reads a newspaper in a quiet cafe, almost motionless, warm light from the window.",
)
"""The first few are as unlike each other as can be, so that three or four of them already say a lot."""


def calibration_prompts(count: int) -> tuple[str, ...]:
    """Return built-in prompts.

    Args:
        count: How many, in [1, 12].

    Raises:
        ValueError: There are not as many.
    """
    if not 1 <= count <= len(CALIBRATION_PROMPTS):
        raise ValueError(
            f"there are {len(CALIBRATION_PROMPTS)} built-in prompts, got {count}; give prompts of your own"
        )
    return CALIBRATION_PROMPTS[:count]

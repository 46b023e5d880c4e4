"""Sparse-vDiT's own rule: for each head the mode of the least error and work, dense where all are bad."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

PENALTY = 0.5
"""Weight of the work left to do, in the paper's notation lambda."""

THRESHOLD = 0.5
"""Loss above which a sparse mode is not taken, epsilon: what dense attention itself loses by its work."""


def choose_modes(
    mse: ArrayLike, density: ArrayLike, *, penalty: float = PENALTY, threshold: float = THRESHOLD
) -> NDArray[np.int64]:
    """Choose for every head the sparse mode with the least loss, or dense where every loss is above a threshold.

    The loss is the squared error of the head's output plus ``penalty * density``. The paper takes the plain mean
    squared error, with a penalty of 0.5 and a threshold of 1 for one model; here it is relative to the mean square of
    the head's dense output, as the scale of activations differs between models, layers and heads. Then a head that is
    left out always loses 1, and a threshold of 1 would keep no head dense.

    Args:
        mse: ``(..., modes)`` relative squared errors, at least 0; the first mode is dense; NaN: cannot be used.
        density: ``(..., modes)`` fraction of pairs that a mode computes, in [0, 1].
        penalty: Weight of the work, at least 0.
        threshold: Largest loss of a sparse mode, at least 0.

    Returns:
        ``(...)`` index of the mode.

    Source: Sparse-vDiT (arXiv 2506.03065), offline search.
    """
    loss = np.asarray(mse, np.float64) + penalty * np.asarray(density, np.float64)
    loss = np.where(np.isfinite(loss), loss, np.inf)[..., 1:]
    return np.where(loss.min(-1) <= threshold, loss.argmin(-1) + 1, 0)

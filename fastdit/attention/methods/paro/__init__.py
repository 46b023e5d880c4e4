"""PARO: reordered tokens, with masks that are calibrated offline."""

from .calibration import calibrate
from .paro import Paro

__all__ = ["Paro", "calibrate"]

"""SLA: sparse attention beside a linear branch that is trained."""

from .sla import Sla

__all__ = ["Sla"]

"""What our kernels are compared with, and the check of each result; they live in the package."""

from fastdit.bench.contenders import Contender, Unavailable, contenders, prepare
from fastdit.bench.measure import Times, extra_memory, interleaved
from fastdit.bench.verify import fault

__all__ = ["Contender", "Times", "Unavailable", "contenders", "extra_memory", "fault", "interleaved", "prepare"]

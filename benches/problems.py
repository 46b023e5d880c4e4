"""Attention problems of real models; they live in the package, where ``fastdit bench`` finds them too."""

from fastdit.bench.problems import PROBLEMS, Problem, find_problems

__all__ = ["PROBLEMS", "Problem", "find_problems"]

"""The only door to the kernels: ``block_sparse_attention`` computes listed blocks and knows nothing else."""

from __future__ import annotations

from torch import Tensor

from ...mask import BlockMask


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, scale: float | None = None, kernel: str | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the attention of listed blocks.

    Args:
        q: ``(B, H, Sq, D)`` queries, in the order of the mask.
        k: ``(B, H, Sk, D)`` keys.
        v: ``(B, H, Sk, D)`` values.
        mask: The blocks.
        scale: Softmax scale; default ``D ** -0.5``.
        kernel: Name of a kernel; default: the fastest that can run.

    Returns:
        The output, ``(B, H, Sq, D)`` in the dtype of ``q``, and the log-sum-exp of each row in natural log,
        ``(B, H, Sq)`` fp32. A row without keys is 0 and -inf.
    """
    raise NotImplementedError

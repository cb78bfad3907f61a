"""DeepSpeed's Evoformer attention, under its name and with its arguments: change one import. ::

    from isoform.kernels.deepspeed import DS4Sci_EvoformerAttention

Unlike DeepSpeed's, it has no smallest length, no largest number of rows, takes float32, and gives
the gradients of the biases summed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from isoform.kernels.evoformer import evoformer_attention


def DS4Sci_EvoformerAttention(  # noqa: N802  (its name)
    Q: Any,
    K: Any,
    V: Any,
    biases: Sequence[Any],
) -> Any:
    """Attention over ``L`` with two biases, scaled by ``D**-0.5``.

    Args:
        Q: Queries ``[*, N, L, H, D]``; any number of leading axes, none included.
        K: Keys, like Q.
        V: Values, like Q.
        biases: At most two, either None: ``[*, N, 1, 1, L]``, by row and key, and
            ``[*, 1, H, L, L]``, shared by all rows.

    Returns:
        ``[*, N, L, H, D]``, in Q's dtype.

    Raises:
        TypeError: An operand's dtype is wrong.
        ValueError: An operand's shape is wrong, or there are more than two biases.
        Unsupported: No kernel does this call.

    Source:
        arXiv 2310.04610, section 3.1.
    """
    if len(biases) > 2:
        raise ValueError(f"biases must be at most 2, got {len(biases)}")
    for name, x in (("Q", Q), ("K", K), ("V", V)):
        if x.ndim < 4:
            raise ValueError(f"{name} must be [*, N, L, H, D], got shape {tuple(x.shape)}")
    row, pair = (*biases, None, None)[:2]
    out = evoformer_attention(
        _one_batch(Q),
        _one_batch(K),
        _one_batch(V),
        mask_bias=None if row is None else _one_batch(row),
        pair_bias=None if pair is None else _one_batch(pair),
    )
    return out.reshape(Q.shape)


def _one_batch(x: Any) -> Any:
    """``x`` with all leading axes but four made one: a view where its strides allow it."""
    return x.reshape(prod(x.shape[:-4]), *x.shape[-4:])

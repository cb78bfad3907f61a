r"""The Evoformer over P ranks (dynamic axial parallelism), as one program over a list of shards.

The Evoformer holds an MSA ``[B, S, R, C]`` and a pair representation ``[B, R, R, C]``. Each of its
layers mixes places along one axis and treats the other like a batch. So both are cut along the
axis that the layer at hand does not mix, and when the next layer mixes that one, they are cut anew
along the other: an all-to-all, like the transposition of a matrix whose rows lie on P ranks.
Between layers the MSA is cut by sequences and the pairs i→j by i (*at home*)::

    row attention             MSA cut by sequences      gathers the pair bias
    column attention          MSA cut by residues
    outer product mean        MSA cut by residues       gathers b
    multiplication outgoing   pairs cut by i            gathers b
    multiplication incoming   pairs cut by i            cuts a anew, gathers b
    attention, starting node  pairs cut by i            gathers the pair bias
    attention, ending node    pairs cut by j            gathers the pair bias
    transitions               however it is cut

Three movements of data are enough: :func:`recut`, :func:`gathered`, and a copy of the parameters on
every rank. The adjoint of each is the movement of gradients, backwards: of cutting anew, to cut as
before; of a gather, a sum over ranks of which each keeps its part (a *reduce-scatter*); of the
parameters' copies, the sum over ranks. To keep the own part of the own gradient, without the sum,
is the usual fault: it is right on one rank, and nearly right wherever ranks see alike.

The P ranks are the P entries of a list here, and sending is taking from another entry;
:mod:`isoform.parallel.axial` is the same for real ranks. A shard may have any length, 0 included.

Letters: B batch, S sequences, R residues, H heads, D head dim, C channels; S_r and R_r those of
rank r. All is computed in float64 (or wider) and rounded once.

Source:
    Cheng et al., arXiv 2203.00854 (FastFold), section 4.2. There the pairs are cut by j for the
    whole of the incoming multiplication; to cut its one factor anew moves half as much.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from isoform.reference.numpy.evoformer import (
    Array,
    evoformer_attention,
    evoformer_attention_backward,
    resolve_compute_dtype,
)

Shards = Sequence[Array]
"""One array per rank, rank 0 first."""


# --- the movements ---


def recut(x: Shards, joined: int, cut: int, lengths: Sequence[int]) -> list[Array]:
    """From shards of one axis to shards of another: what rank r has of rank q's part goes to q.

    Its adjoint, and its inverse, is to cut as before: ``recut(y, cut, joined, lengths_before)``.

    Args:
        x: By rank, of any shape ``[...]``.
        joined: The axis along which ``x`` is cut, and the result is whole.
        cut: The axis along which ``x`` is whole, and the result is cut.
        lengths: By rank, the result's length on the axis ``cut``.

    Returns:
        By rank, in the dtype of ``x``.
    """
    return _cut(np.concatenate(x, joined), cut, lengths)


def gathered(x: Shards, axis: int) -> list[Array]:
    """Everybody gets everybody's shard of ``x``, of any shape, joined along ``axis``: for each rank
    the same whole.
    """
    return [np.concatenate(x, axis)] * len(x)


def gathered_backward(dwhole: Shards, axis: int, lengths: Sequence[int]) -> list[Array]:
    """The adjoint of :func:`gathered`: the sum over ranks, of which each gets its own part.

    Args:
        dwhole: By rank, the gradient that this rank has found of the *whole*, in its shape.
        axis: Along which was gathered.
        lengths: By rank, the length of its shard on that axis.

    Returns:
        By rank, the gradient of its shard.
    """
    return _cut(np.sum(dwhole, axis=0), axis, lengths)


# --- the layers that mix places ---


class AttentionGradients(NamedTuple):
    """The gradients of a layer's attention, by rank, in the shape and dtype of each shard."""

    dq: list[Array]
    dk: list[Array]
    dv: list[Array]
    dpair_bias: list[Array] | None


def row_attention(
    q: Shards, k: Shards, v: Shards, pair_bias: Shards, mask: Shards | None = None
) -> list[Array]:
    """Each sequence attends along its residues, biased by all pairs, of which a rank has some.

    The same for the attention around the starting node, with pairs for the MSA; and for that around
    the ending node, with turned pairs that are cut by j.

    Args:
        q: By rank, ``[B, S_r, R, H, D]``, any float dtype.
        k: By rank, likewise.
        v: By rank, likewise.
        pair_bias: By rank, ``[B, 1, H, R_r, R]``, the queries' axis cut.
        mask: By rank, bool ``[B, S_r, R]``.

    Returns:
        By rank, ``[B, S_r, R, H, D]`` in q's dtype.

    Raises:
        TypeError: As :func:`~.numpy.evoformer.evoformer_attention`.
        ValueError: As :func:`~.numpy.evoformer.evoformer_attention`.

    Source:
        AF2 algorithms 7, 13 and 14.
    """
    biases = gathered(pair_bias, 3)
    return [
        evoformer_attention(*qkv, mask=mask_r, pair_bias=bias)
        for *qkv, bias, mask_r in zip(q, k, v, biases, _each(mask, q), strict=True)
    ]


def row_attention_backward(
    dout: Shards, q: Shards, k: Shards, v: Shards, pair_bias: Shards, mask: Shards | None = None
) -> AttentionGradients:
    """The gradients of :func:`row_attention`.

    Every rank's sequences read the whole bias, so each rank finds a part of the whole's gradient.

    Args:
        dout: By rank, gradient of the loss by the output, ``[B, S_r, R, H, D]``.
        q, k, v, pair_bias, mask: As in :func:`row_attention`.

    Returns:
        All four gradients by rank.

    Raises:
        As :func:`~.numpy.evoformer.evoformer_attention_backward`.
    """
    biases = gathered(_wide(pair_bias), 3)
    wide = zip(*map(_wide, (dout, q, k, v)), biases, _each(mask, q), strict=True)
    parts = [
        evoformer_attention_backward(*operands, mask=mask_r, pair_bias=bias)
        for *operands, bias, mask_r in wide
    ]
    dbias = [part.dpair_bias for part in parts if part.dpair_bias is not None]
    return AttentionGradients(
        _rounded((part.dq for part in parts), q),
        _rounded((part.dk for part in parts), k),
        _rounded((part.dv for part in parts), v),
        _rounded(gathered_backward(dbias, 3, _lengths(pair_bias, 3)), pair_bias),
    )


def column_attention(
    q: Shards, k: Shards, v: Shards, residues: Sequence[int], mask: Shards | None = None
) -> list[Array]:
    """Each residue attends along the sequences; so all sequences of some residues must be at hand.

    The real layer cuts the MSA anew and projects it after that, which moves less.

    Args:
        q: By rank, ``[B, S_r, R, H, D]``, any float dtype.
        k: By rank, likewise.
        v: By rank, likewise.
        residues: By rank, R_r: which residues it is to see all sequences of.
        mask: By rank, bool ``[B, S_r, R]``. It must be cut anew with what it masks.

    Returns:
        By rank, ``[B, S_r, R, H, D]`` in q's dtype.

    Raises:
        As :func:`~.numpy.evoformer.evoformer_attention`.

    Source:
        AF2 algorithm 8.
    """
    columns = [_columns(x, residues) for x in (q, k, v)]
    masks = None if mask is None else _columns(mask, residues)
    out = [
        evoformer_attention(*qkv, mask=mask_r)
        for *qkv, mask_r in zip(*columns, _each(masks, q), strict=True)
    ]
    return _rows(out, _lengths(q, 1))


def column_attention_backward(
    dout: Shards,
    q: Shards,
    k: Shards,
    v: Shards,
    residues: Sequence[int],
    mask: Shards | None = None,
) -> AttentionGradients:
    """The gradients of :func:`column_attention`: the same way there, and the same way back.

    Args:
        dout: By rank, gradient of the loss by the output, ``[B, S_r, R, H, D]``.
        q, k, v, residues, mask: As in :func:`column_attention`.

    Returns:
        The gradients of q, k and v by rank; there is no pair bias.

    Raises:
        As :func:`~.numpy.evoformer.evoformer_attention_backward`.
    """
    columns = [_columns(x, residues) for x in (dout, q, k, v)]
    masks = None if mask is None else _columns(mask, residues)
    parts = [
        evoformer_attention_backward(*operands, mask=mask_r)
        for *operands, mask_r in zip(*columns, _each(masks, q), strict=True)
    ]
    sequences = _lengths(q, 1)
    dq, dk, dv = (
        _rows([getattr(p, name) for p in parts], sequences) for name in ("dq", "dk", "dv")
    )
    return AttentionGradients(dq, dk, dv, None)


def outer_product(a: Shards, b: Shards) -> list[Array]:
    """The sum over sequences of all outer products of two residues' channels.

    Args:
        a: By rank, ``[B, S, R_r, C]``: all sequences of some residues i, masked places 0.
        b: By rank, ``[B, S, R_r, D]``.

    Returns:
        By rank, ``[B, R_r, R, C, D]``: pairs i→j cut by i.

    Source:
        AF2 algorithm 10, line 3, but for the division by how many sequences there are.
    """
    found = zip(_wide(a), gathered(_wide(b), 2), strict=True)
    return _rounded((np.einsum("bsic,bsjd->bijcd", *ab) for ab in found), a)


def outer_product_backward(dout: Shards, a: Shards, b: Shards) -> tuple[list[Array], list[Array]]:
    """The gradients ``da, db`` of :func:`outer_product`, by rank.

    Args:
        dout: By rank, gradient of the loss by the output, ``[B, R_r, R, C, D]``.
        a, b: As in :func:`outer_product`.
    """
    whole = gathered(_wide(b), 2)
    da = [np.einsum("bijcd,bsjd->bsic", *x) for x in zip(_wide(dout), whole, strict=True)]
    parts = [np.einsum("bijcd,bsic->bsjd", *x) for x in zip(_wide(dout), _wide(a), strict=True)]
    return _rounded(da, a), _rounded(gathered_backward(parts, 2, _lengths(b, 2)), b)


def multiplication_outgoing(a: Shards, b: Shards) -> list[Array]:
    """Σ_k a_ik ∘ b_jk: some i of a, all of b.

    Args:
        a: By rank, ``[B, R_r, R, C]``, cut by i; masked edges 0.
        b: By rank, ``[B, R_r, R, C]``, cut by its first residue j.

    Returns:
        By rank, ``[B, R_r, R, C]``: pairs i→j cut by i.

    Source:
        AF2 algorithm 11, line 4.
    """
    found = zip(_wide(a), gathered(_wide(b), 1), strict=True)
    return _rounded((np.einsum("bikc,bjkc->bijc", *ab) for ab in found), a)


def multiplication_outgoing_backward(
    dout: Shards, a: Shards, b: Shards
) -> tuple[list[Array], list[Array]]:
    """The gradients ``da, db`` of :func:`multiplication_outgoing`, by rank.

    Args:
        dout: By rank, gradient of the loss by the output, ``[B, R_r, R, C]``.
        a, b: As in :func:`multiplication_outgoing`.
    """
    whole = gathered(_wide(b), 1)
    da = [np.einsum("bijc,bjkc->bikc", *x) for x in zip(_wide(dout), whole, strict=True)]
    parts = [np.einsum("bijc,bikc->bjkc", *x) for x in zip(_wide(dout), _wide(a), strict=True)]
    return _rounded(da, a), _rounded(gathered_backward(parts, 1, _lengths(b, 1)), b)


def multiplication_incoming(a: Shards, b: Shards) -> list[Array]:
    """Σ_k a_ki ∘ b_kj: here the *second* residue of a is i, so a is cut anew; of b again all.

    Args:
        a: By rank, ``[B, R_r, R, C]``, cut by k; masked edges 0.
        b: By rank, ``[B, R_r, R, C]``, cut by k.

    Returns:
        By rank, ``[B, R_r, R, C]``: pairs i→j cut by i.

    Source:
        AF2 algorithm 12, line 4.
    """
    turned = recut(_wide(a), 1, 2, _lengths(a, 1))
    found = zip(turned, gathered(_wide(b), 1), strict=True)
    return _rounded((np.einsum("bkic,bkjc->bijc", *ab) for ab in found), a)


def multiplication_incoming_backward(
    dout: Shards, a: Shards, b: Shards
) -> tuple[list[Array], list[Array]]:
    """The gradients ``da, db`` of :func:`multiplication_incoming`, by rank.

    Args:
        dout: By rank, gradient of the loss by the output, ``[B, R_r, R, C]``.
        a, b: As in :func:`multiplication_incoming`.
    """
    residues = _lengths(a, 1)
    turned, whole = recut(_wide(a), 1, 2, residues), gathered(_wide(b), 1)
    da = [np.einsum("bijc,bkjc->bkic", *x) for x in zip(_wide(dout), whole, strict=True)]
    parts = [np.einsum("bijc,bkic->bkjc", *x) for x in zip(_wide(dout), turned, strict=True)]
    return (
        _rounded(recut(da, 2, 1, residues), a),
        _rounded(gathered_backward(parts, 1, residues), b),
    )


# --- lists of shards ---


def _cut(x: Array, axis: int, lengths: Sequence[int]) -> list[Array]:
    """Consecutive pieces of these lengths."""
    return np.split(x, np.cumsum(lengths)[:-1], axis)


def _lengths(x: Shards, axis: int) -> list[int]:
    return [part.shape[axis] for part in x]


def _columns(x: Shards, residues: Sequence[int]) -> list[Array]:
    """The MSA cut by residues, turned so that attention along the last-but-two axis is by column.

    From ``[B, S_r, R, ...]`` to ``[B, R_r, S, ...]``.
    """
    return [part.swapaxes(1, 2) for part in recut(x, 1, 2, residues)]


def _rows(x: Shards, sequences: Sequence[int]) -> list[Array]:
    """Undoes :func:`_columns`."""
    return recut([part.swapaxes(1, 2) for part in x], 2, 1, sequences)


def _each(mask: Shards | None, like: Shards) -> Sequence[Any]:
    """A mask, or None, for every rank."""
    return [None] * len(like) if mask is None else mask


def _wide(x: Shards) -> list[Array]:
    """In the arithmetic of the oracle."""
    return [part.astype(resolve_compute_dtype(part, None)) for part in x]


def _rounded(x: Iterable[Array], like: Shards) -> list[Array]:
    return [part.astype(other.dtype) for part, other in zip(x, like, strict=True)]

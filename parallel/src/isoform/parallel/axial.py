"""The Evoformer over many ranks: dynamic axial parallelism, forward and backward.

(Cheng et al., arXiv 2203.00854, section 4. The same as one program over a list of shards, and why
these movements: :mod:`isoform.reference.numpy.axial`.)

Each rank holds some sequences of the MSA, ``[B, S_r, R, c_m]``, and the pairs i→j of some residues
i, ``[B, R_r, R, c_z]``. The blocks are those of the reference
(:class:`isoform.reference.torch.evoformer_stack.EvoformerBlock`), with their parameters and their
attention function, equal on all ranks. The results are those of one rank with the whole, to
rounding: outputs, gradients of inputs, and gradients of parameters, which come out summed over
ranks.

The lines are numbered as in AF2 algorithm 6. While something travels, what does not depend on it is
computed, and in the backward likewise::

    travels                              meanwhile
    pair bias (lines 2, 8 and 9)         projections of queries, keys, values and the gate
    MSA, back to sequences (after 4)     lines 5 to 10: everything that is done to the pairs
    factors of products (lines 5 to 7)   the product with the piece that has come before
    factor a_ki (line 7)                 the other factor and the gate

The MSA on its way from sequences to residues (before line 3) and the turned pairs (line 9) hide
behind nothing: what follows depends on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isoform.parallel.communicator import Communicator
from isoform.parallel.gathered_product import gathered_product
from isoform.parallel.movements import (
    Flight,
    Movement,
    gather,
    joined,
    move,
    recut,
    replicated,
    start,
)
from isoform.parallel.sharding import Sharding
from isoform.reference.contract import dtype_name
from isoform.reference.torch.evoformer_stack import (
    EvoformerBlock,
    EvoformerStack,
    OuterProductMean,
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
)
from isoform.reference.torch.layers import (
    MSARowAttentionWithPairBias,
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
    check_mask,
    from_heads,
    to_heads,
    to_pair_bias,
)


def evoformer_block(
    block: EvoformerBlock,
    msa: Tensor,
    pair: Tensor,
    msa_mask: Tensor | None = None,
    pair_mask: Tensor | None = None,
    *,
    comm: Communicator,
    sequences: Sharding,
    residues: Sharding,
    pieces: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One block of the Evoformer: both representations, updated.

    Collective, and so is its backward: all ranks call both, with equal blocks and options, each
    with its own shards. What is differentiated is the sum of the losses that ranks make of their
    shards.

    Args:
        block: With the same parameters on all ranks. It is not changed.
        msa: This rank's sequences ``[B, S_r, R, c_m]``.
        pair: This rank's pairs ``[B, R_r, R, c_z]``, i→j for some i and all j.
        msa_mask: Bool ``[B, S_r, R]``; all True by default.
        pair_mask: Bool ``[B, R_r, R]``; all True by default.
        comm: The ranks.
        sequences: Which sequences each rank has; contiguous.
        residues: Which residues i; contiguous.
        pieces: In how many pieces of its channels the second factor of a product (lines 5 to 7)
            comes from all ranks. As many as ranks, by default: then a rank's memory falls as 1 / P.
            Fewer are larger messages.

    Returns:
        This rank's shards of the MSA ``[B, S_r, R, c_m]`` and the pairs ``[B, R_r, R, c_z]``.

    Raises:
        TypeError: A mask is not bool, or a sharding is none.
        ValueError: Shapes do not fit, or a sharding is not contiguous or for other ranks.
        MismatchError: Ranks have come with different calls; raised on all of them.

    Source:
        AF2 algorithm 6, lines 2 to 10 (algorithm 18 where the block is one of the extra MSA stack).
    """
    axes = _Axes(comm, sequences, residues, comm.size if pieces is None else pieces)
    _check_on_all_ranks(block, msa, pair, msa_mask, pair_mask, axes)
    masks = _masks(msa_mask, pair_mask, axes)
    rows, _, pair = _block(block, msa, pair, masks, axes)
    msa, pair = joined(rows.wait(), pair)
    return msa, pair


def evoformer_stack(
    stack: EvoformerStack,
    msa: Tensor,
    pair: Tensor,
    msa_mask: Tensor | None = None,
    pair_mask: Tensor | None = None,
    *,
    comm: Communicator,
    sequences: Sharding,
    residues: Sharding,
    pieces: int | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Evoformer: both representations after all blocks, and the single representation.

    Args:
        stack: With the same parameters on all ranks. It is not changed.
        msa: As in :func:`evoformer_block`, of at least one sequence; the first is the one to be
            folded.
        pair, msa_mask, pair_mask, comm, sequences, residues, pieces: As in :func:`evoformer_block`.
        recompute: Keep of each block only what goes in, and compute it again in the backward, which
            then moves all of the forward again too.

    Returns:
        This rank's shards of the MSA ``[B, S_r, R, c_m]``, of the pairs ``[B, R_r, R, c_z]`` and of
        the single representation ``[B, R_r, c_s]``, which is cut by residues.

    Raises:
        As :func:`evoformer_block`.

    Source:
        AF2 algorithm 6.
    """
    axes = _Axes(comm, sequences, residues, comm.size if pieces is None else pieces)
    _check_on_all_ranks(stack, msa, pair, msa_mask, pair_mask, axes)
    masks = _masks(msa_mask, pair_mask, axes)

    def run(block: EvoformerBlock, msa: Tensor, pair: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns, pair = _block(block, msa, pair, masks, axes)
        return rows.wait(), columns, pair

    if recompute:  # to the end, since what has been begun must be waited for
        run = partial(checkpoint, run, use_reentrant=False, early_stop=False)
    for block in stack.blocks:
        msa, columns, pair = run(cast(EvoformerBlock, block), msa, pair)
    last = replicated(stack.single, comm)
    single = last(columns[:, 0])  # line 12: all ranks have the first sequence, of some residues
    msa, pair, single = joined(msa, pair, single)
    return msa, pair, single


# --- the block ---


@dataclass(frozen=True)
class _Axes:
    """How both representations are cut, and the movements that this takes."""

    comm: Communicator
    sequences: Sharding
    residues: Sharding
    pieces: int

    @property
    def to_columns(self) -> Movement:
        """The MSA, from some sequences of all residues to all sequences of some residues."""
        S, R = self.sequences.lengths, self.residues.lengths
        return recut(self.comm, joined=1, lengths=S, cut=2, into=R)

    @property
    def to_rows(self) -> Movement:
        """Undoes it."""
        S, R = self.sequences.lengths, self.residues.lengths
        return recut(self.comm, joined=2, lengths=R, cut=1, into=S)

    @property
    def to_ends(self) -> Movement:
        """Pairs i→j, from some i and all j to all i and some j."""
        R = self.residues.lengths
        return recut(self.comm, joined=1, lengths=R, cut=2, into=R)

    @property
    def to_starts(self) -> Movement:
        """Undoes it."""
        R = self.residues.lengths
        return recut(self.comm, joined=2, lengths=R, cut=1, into=R)

    def whole(self, axis: int) -> Movement:
        """All residues, from some on that axis."""
        return gather(self.comm, axis=axis, lengths=self.residues.lengths)

    def product(self, equation: str, a: Tensor, b: Tensor, axis: int) -> Tensor:
        """A product with all residues of ``b``, of which this rank has some on that axis."""
        return gathered_product(equation, a, b, self.whole(axis), pieces=self.pieces)


@dataclass(frozen=True)
class _Masks:
    """The masks, cut as what they mask is cut; None for all True."""

    rows: Tensor | None  # [B, S_r, R]
    columns: Tensor | None  # [B, S, R_r]
    together: Tensor | None  # float32 [B, R_r, R]: how many sequences have both, at least 1
    starts: Tensor | None  # [B, R_r, R]
    ends: Tensor | None  # [B, R, R_r]


def _masks(msa_mask: Tensor | None, pair_mask: Tensor | None, axes: _Axes) -> _Masks:
    """Both masks in every cut that a block needs. Collective."""
    columns = together = ends = None
    if msa_mask is not None:
        columns = move(axes.to_columns, msa_mask)
        everywhere = move(axes.whole(2), columns)
        # Float32 counts to 2²⁴ exactly, and is what a matrix product is fast in.
        together = torch.einsum("bsi,bsj->bij", columns.float(), everywhere.float()).clamp(min=1)
    if pair_mask is not None:
        ends = move(axes.to_ends, pair_mask)
    return _Masks(msa_mask, columns, together, pair_mask, ends)


def _block(
    block: EvoformerBlock, msa: Tensor, pair: Tensor, masks: _Masks, axes: _Axes
) -> tuple[Flight, Tensor, Tensor]:
    """The MSA on its way to be cut by sequences, the MSA cut by residues, and the pairs."""
    block = cast(EvoformerBlock, replicated(block, axes.comm))
    msa = msa + _row_attention(block.msa_row, msa, pair, masks, axes)  # line 2
    columns = move(axes.to_columns, msa)
    columns = columns + block.msa_column(columns, masks.columns)  # line 3
    columns = columns + block.msa_transition(columns)  # line 4
    rows = start(axes.to_rows, columns)
    pair = pair + _outer_product_mean(block.outer_product_mean, columns, masks, axes)  # line 5
    pair = pair + _multiplication(block.multiplication_outgoing, pair, masks, axes)  # line 6
    pair = pair + _multiplication(block.multiplication_incoming, pair, masks, axes)  # line 7
    pair = pair + _starting(block.triangle_starting, pair, masks, axes)  # line 8
    pair = pair + _ending(block.triangle_ending, pair, masks, axes)  # line 9
    pair = pair + block.pair_transition(pair)  # line 10
    return rows, columns, pair


def _row_attention(
    layer: MSARowAttentionWithPairBias, msa: Tensor, pair: Tensor, masks: _Masks, axes: _Axes
) -> Tensor:
    """AF2 algorithm 7, of the sequences at hand."""
    z = layer.norm_pair(pair)
    return _with_gathered_bias(layer, layer.norm(msa), z, masks.rows, axes)


def _starting(
    layer: TriangleAttentionStartingNode, pair: Tensor, masks: _Masks, axes: _Axes
) -> Tensor:
    """AF2 algorithm 13, of the edges i→j at hand, which are all that start at their i."""
    z = layer.norm(pair)
    return _with_gathered_bias(layer, z, z, masks.starts, axes)


def _ending(layer: TriangleAttentionEndingNode, pair: Tensor, masks: _Masks, axes: _Axes) -> Tensor:
    """AF2 algorithm 14: the starting node's, of turned pairs, which are cut by what was j."""
    turned = layer.norm(move(axes.to_ends, pair).transpose(1, 2))
    mask = None if masks.ends is None else masks.ends.transpose(1, 2)
    update = _with_gathered_bias(layer, turned, turned, mask, axes)
    return move(axes.to_starts, update.transpose(1, 2))


def _with_gathered_bias(
    layer: MSARowAttentionWithPairBias | TriangleAttentionStartingNode,
    x: Tensor,
    z: Tensor,
    mask: Tensor | None,
    axes: _Axes,
) -> Tensor:
    """Attention of ``x [B, rows, R, C]``, whose bias all ranks make from their ``z [B, R_r, R]``.

    Each of the rows at hand reads the whole bias; what they find of its gradient is summed over
    ranks.
    """
    bias = start(axes.whole(3), to_pair_bias(layer.pair_bias, z))
    q, k, v, gate = (
        to_heads(linear, x, layer.heads)
        for linear in (layer.query, layer.key, layer.value, layer.gate)
    )
    o = layer.attention(q, k, v, mask=mask, pair_bias=bias.wait(), gate=gate)
    return from_heads(layer.output, o)


def _outer_product_mean(
    layer: OuterProductMean, columns: Tensor, masks: _Masks, axes: _Axes
) -> Tensor:
    """AF2 algorithm 10: i among the residues at hand, all j."""
    m = layer.norm(columns)  # line 1
    a, b = (_kept(linear(m), masks.columns) for linear in (layer.left, layer.right))  # line 2
    total = axes.product("bsic,bsjd->bijcd", a, b, axis=2)  # line 3
    count = max(columns.shape[1], 1) if masks.together is None else masks.together[..., None, None]
    update: Tensor = layer.output((total / count).to(total.dtype).flatten(-2))  # line 4
    return update


def _multiplication(
    layer: TriangleMultiplicationOutgoing | TriangleMultiplicationIncoming,
    pair: Tensor,
    masks: _Masks,
    axes: _Axes,
) -> Tensor:
    """AF2 algorithms 11 and 12: i among the residues at hand, all j.

    Outgoing, a_ik is here for these i. Incoming, a_ki is here for some k and must be cut anew.
    """
    z = layer.norm(pair)  # line 1
    a = _kept(torch.sigmoid(layer.gate_left(z)) * layer.left(z), masks.starts)  # line 2
    incoming = isinstance(layer, TriangleMultiplicationIncoming)
    own_a = start(axes.to_ends, a) if incoming else None
    b = _kept(torch.sigmoid(layer.gate_right(z)) * layer.right(z), masks.starts)
    g = torch.sigmoid(layer.gate(z))  # line 3
    a = a if own_a is None else own_a.wait()
    product = axes.product(layer.edges, a, b, axis=1)  # line 4
    update: Tensor = g * layer.output(layer.norm_product(product))
    return update


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x [..., C]`` with zeros where the mask is False."""
    return x if mask is None else torch.where(mask[..., None], x, 0.0)


# --- wrong calls ---


def _check_on_all_ranks(
    module: EvoformerBlock | EvoformerStack,
    msa: Tensor,
    pair: Tensor,
    msa_mask: Tensor | None,
    pair_mask: Tensor | None,
    axes: _Axes,
) -> None:
    """Raise unless the call is right here and the same everywhere.

    A rank that raised alone would leave the others waiting, so all are told what is wrong with one.
    """
    problem: Exception | None = None
    facts: dict[str, Any] = {}
    try:
        _check_here(module, msa, pair, msa_mask, pair_mask, axes)
    except (TypeError, ValueError) as error:
        problem = error
    else:
        facts = {"B": msa.shape[0], "pieces": axes.pieces, "gradients": torch.is_grad_enabled()}
        tensors = {"msa": msa, "pair": pair, **dict(module.named_parameters())}
        for name, x in tensors.items():
            shape = list(x.shape) if isinstance(x, nn.Parameter) else "its shard"
            facts[name] = f"{dtype_name(x)} {shape}, {'' if x.requires_grad else 'not '}trained"
        facts |= {"msa_mask given": msa_mask is not None, "pair_mask given": pair_mask is not None}
        facts |= {"sequences": str(axes.sequences), "residues": str(axes.residues)}
    try:
        axes.comm.agree(error=None if problem is None else str(problem), **facts)
    finally:
        if problem is not None:
            raise problem


def _check_here(
    module: EvoformerBlock | EvoformerStack,
    msa: Tensor,
    pair: Tensor,
    msa_mask: Tensor | None,
    pair_mask: Tensor | None,
    axes: _Axes,
) -> None:
    comm = axes.comm
    if axes.pieces < 1:
        raise ValueError(f"pieces must be at least 1, got {axes.pieces}")
    for name in ("sequences", "residues"):
        sharding = getattr(axes, name)
        if not isinstance(sharding, Sharding):
            raise TypeError(f"{name} must be a Sharding, got {type(sharding).__name__}")
        if sharding.kind != "contiguous":
            raise ValueError(f"the sharding of {name} must be contiguous, got {sharding.kind}")
        if sharding.ranks != comm.size:
            raise ValueError(
                f"the sharding of {name} is for {sharding.ranks} ranks, but there are {comm.size}"
            )
    for name, x in (("msa", msa), ("pair", pair)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a PyTorch tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 axes, got shape {tuple(x.shape)}")
    first: nn.Module = module
    if isinstance(module, EvoformerStack):
        if len(module.blocks) == 0 or axes.sequences.length == 0:
            raise ValueError(
                "there must be a block and a sequence at least, "
                f"got {len(module.blocks)} blocks and S={axes.sequences.length}"
            )
        first = module.blocks[0]
    layer = cast(EvoformerBlock, first).msa_row
    B, R = msa.shape[0], axes.residues.length
    S_r, R_r = axes.sequences.lengths[comm.rank], axes.residues.lengths[comm.rank]
    c_m, c_z = layer.query.in_features, layer.pair_bias.in_features
    for name, x, shape in (("msa", msa, (B, S_r, R, c_m)), ("pair", pair, (B, R_r, R, c_z))):
        if tuple(x.shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape} on rank {comm.rank}, got {tuple(x.shape)}"
            )
    check_mask("msa_mask", msa_mask, msa.shape[:3])
    check_mask("pair_mask", pair_mask, pair.shape[:3])

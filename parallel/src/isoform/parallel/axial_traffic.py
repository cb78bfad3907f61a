"""What an Evoformer block over ranks sends, in closed form: bytes by rank, forward and backward.

The counts of a :class:`~isoform.parallel.communicator.Communicator` equal these numbers exactly,
but for what ranks say to each other to find out whether they agree. Per rank of P, in numbers, and
with S sequences and R residues, an order of magnitude::

    recut       2 S R c_m / P  +  3 R² c_z / P                 the MSA twice, the pairs thrice
    gather      S R c_outer  +  2 R² c_multiplication          factors, each in pieces
                + R² (heads + 2 heads_triangle)                pair biases

The first line falls with P and the second does not: each rank needs a whole factor, whatever it
multiplies with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from isoform.parallel.movements import ALL_REDUCE, GATHER, RECUT, REDUCE_SCATTER
from isoform.parallel.sharding import Sharding
from isoform.reference.torch.evoformer_stack import EvoformerBlock

Bytes = Mapping[str, int]
"""By the operation's name, as :attr:`~isoform.parallel.communicator.Traffic.bytes_by` has it."""


def bytes_sent(
    block: EvoformerBlock,
    sequences: Sharding,
    residues: Sharding,
    rank: int,
    *,
    B: int = 1,
    msa_mask: bool = False,
    pair_mask: bool = False,
) -> tuple[Bytes, Bytes]:
    """The bytes that ``rank`` sends in the forward of a block, and in its backward.

    Args:
        block: Of which the sizes are taken; all its parameters are of one dtype and are trained.
        sequences: Which sequences each rank has.
        residues: Which residues.
        rank: Which rank.
        B: Batch.
        msa_mask: Whether there is one.
        pair_mask: Whether there is one.
    """
    P, S, R = residues.ranks, sequences.length, residues.length
    here_S, here_R = sequences.lengths[rank], residues.lengths[rank]
    away_S, away_R = S - here_S, R - here_R
    c_m, c_z = block.msa_row.query.in_features, block.msa_row.pair_bias.in_features
    c_multiplication = block.multiplication_outgoing.left.out_features

    there, back = here_S * away_R, away_S * here_R  # places of the MSA
    turned = here_R * away_R  # places of the pairs, either way
    recut = (there + back) * c_m + turned * (c_multiplication + 2 * c_z)

    # Of each place of a residue, what is gathered: for products, and for biases.
    factors = S * block.outer_product_mean.right.out_features + 2 * R * c_multiplication
    heads = block.msa_row.heads + block.triangle_starting.heads + block.triangle_ending.heads
    others = P - 1

    parameters = list(block.parameters())
    itemsize = parameters[0].dtype.itemsize
    count = sum(p.numel() for p in parameters)
    own = Sharding.contiguous(count, P).lengths[rank]

    forward = Counter(
        {
            RECUT: B * itemsize * recut + B * (there * msa_mask + turned * pair_mask),
            GATHER: B * itemsize * others * here_R * (factors + R * heads)
            + B * others * here_R * S * msa_mask,
        }
    )
    backward = Counter(
        {
            RECUT: B * itemsize * recut,
            GATHER: B * itemsize * others * here_R * factors,
            REDUCE_SCATTER: B * itemsize * away_R * (factors + R * heads),
            ALL_REDUCE: itemsize * (count - own + others * own),
        }
    )
    return forward, backward

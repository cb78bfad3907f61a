r"""A whole Evoformer, so that its attention can be run, and captured, in context.

The trunk of AlphaFold 2 holds two representations, an MSA ``[B, S, R, C_m]`` of S sequences and a
pair representation ``[B, R, R, C_z]`` of R residues, and lets them inform each other block by
block::

    MSA   →  row attention (biased by the pairs)  →  column attention  →  transition
                                                                              ↓ outer product mean
    pair  →  triangle multiplications  →  triangle attentions  →  transition

The attention layers are those of :mod:`.layers`; the rest is here, in the plainest form: nothing
is chunked, fused or recomputed. There is no dropout, which the published algorithm applies to some
of the updates during training: a reference is a deterministic function. It computes in the dtype of
its weights, float32 unless told otherwise.

Conventions (letters, masks, initialisation, what NaN in padding may do) are those of
:mod:`.layers`, and ``AF2`` is the supplement of Jumper et al., Nature 2021.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isoform.reference.torch.evoformer import evoformer_attention
from isoform.reference.torch.layers import (
    Attention,
    MSAColumnAttention,
    MSAColumnGlobalAttention,
    MSARowAttentionWithPairBias,
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
    check_mask,
)


class _Transition(nn.Module):
    """Two linear layers around a ReLU, place by place."""

    def __init__(self, channels: int, n: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, n * channels)
        self.output = nn.Linear(n * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The update of ``x [..., channels]``, in its shape."""
        x = self.norm(x)  # line 1
        a = self.expand(x)  # line 2
        update: Tensor = self.output(torch.relu(a))  # line 3
        return update


class MSATransition(_Transition):
    """The same two linear layers at every place of the MSA.

    ::

        1   m_si ← LayerNorm(m_si)
        2   a_si = Linear(m_si)                 n · c_m channels
        3   m̃_si = Linear(relu(a_si))

    Args:
        c_m: Channels of the MSA.
        n: Factor by which the hidden layer is wider.

    Source:
        AF2 algorithm 9.
    """

    def __init__(self, c_m: int = 256, n: int = 4) -> None:
        super().__init__(c_m, n)


class PairTransition(_Transition):
    """The same two linear layers at every place of the pair representation.

    ::

        1   z_ij ← LayerNorm(z_ij)
        2   a_ij = Linear(z_ij)                 n · c_z channels
        3   z̃_ij = Linear(relu(a_ij))

    Args:
        c_z: Channels of the pair representation.
        n: Factor by which the hidden layer is wider.

    Source:
        AF2 algorithm 15.
    """

    def __init__(self, c_z: int = 128, n: int = 4) -> None:
        super().__init__(c_z, n)


class OuterProductMean(nn.Module):
    """What two columns of the MSA have in common, as an update of their pair.

    ::

        1   m_si ← LayerNorm(m_si)
        2   a_si, b_si = Linear(m_si)
        3   o_ij = flatten(mean_s(a_si ⊗ b_sj))
        4   z̃_ij = Linear(o_ij)

    The mean is over the sequences that the mask leaves at both i and j (0 where there is none).

    Args:
        c_m: Channels of the MSA.
        c_z: Channels of the pair representation.
        c: Channels of a and of b.

    Source:
        AF2 algorithm 10.
    """

    def __init__(self, c_m: int = 256, c_z: int = 128, c: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c_m)
        self.left = nn.Linear(c_m, c)
        self.right = nn.Linear(c_m, c)
        self.output = nn.Linear(c * c, c_z)

    def forward(self, msa: Tensor, msa_mask: Tensor | None = None) -> Tensor:
        """The update of the pair representation.

        Args:
            msa: ``[B, S, R, c_m]``.
            msa_mask: Bool ``[B, S, R]``; all True by default.

        Returns:
            ``[B, R, R, c_z]``.

        Raises:
            TypeError: The mask is not bool.
            ValueError: The shape of the mask is not that of the MSA.
        """
        check_mask("msa_mask", msa_mask, msa.shape[:3])
        if msa_mask is None:
            msa_mask = msa.new_ones(msa.shape[:3], dtype=torch.bool)
        m = self.norm(msa)  # line 1
        a = torch.where(msa_mask[..., None], self.left(m), 0.0)  # line 2
        b = torch.where(msa_mask[..., None], self.right(m), 0.0)
        total = torch.einsum("bsic,bsjd->bijcd", a, b)  # line 3
        present = msa_mask.to(total.dtype)
        count = torch.einsum("bsi,bsj->bij", present, present).clamp(min=1)
        o = (total / count[..., None, None]).flatten(-2)
        update: Tensor = self.output(o)  # line 4
        return update


class _TriangleMultiplication(nn.Module):
    """What the two forms share; they differ in which edges of the triangle are multiplied."""

    edges: str

    def __init__(self, c_z: int = 128, c: int = 128) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c_z)
        self.left = nn.Linear(c_z, c)
        self.right = nn.Linear(c_z, c)
        self.gate_left = nn.Linear(c_z, c)
        self.gate_right = nn.Linear(c_z, c)
        self.gate = nn.Linear(c_z, c_z)
        self.norm_product = nn.LayerNorm(c)
        self.output = nn.Linear(c, c_z)

    def forward(self, pair: Tensor, pair_mask: Tensor | None = None) -> Tensor:
        """The update of the pair representation.

        Args:
            pair: ``[B, R, R, c_z]``.
            pair_mask: Bool ``[B, R, R]``; all True by default. Masked edges are left out of the
                sum.

        Returns:
            ``[B, R, R, c_z]``.

        Raises:
            TypeError: The mask is not bool.
            ValueError: The shape of the mask is not that of the pairs.
        """
        check_mask("pair_mask", pair_mask, pair.shape[:3])
        z = self.norm(pair)  # line 1
        a = torch.sigmoid(self.gate_left(z)) * self.left(z)  # line 2
        b = torch.sigmoid(self.gate_right(z)) * self.right(z)
        if pair_mask is not None:
            a = torch.where(pair_mask[..., None], a, 0.0)
            b = torch.where(pair_mask[..., None], b, 0.0)
        g = torch.sigmoid(self.gate(z))  # line 3
        product = torch.einsum(self.edges, a, b)  # line 4
        update: Tensor = g * self.output(self.norm_product(product))
        return update


class TriangleMultiplicationOutgoing(_TriangleMultiplication):
    """Every edge i→j is updated from the edges i→k and j→k that go out from its ends.

    ::

        1   z_ij ← LayerNorm(z_ij)
        2   a_ij = σ(Linear(z_ij)) ∘ Linear(z_ij),   b_ij likewise
        3   g_ij = σ(Linear(z_ij))
        4   z̃_ij = g_ij ∘ Linear(LayerNorm(Σ_k a_ik ∘ b_jk))

    Args:
        c_z: Channels of the pair representation.
        c: Channels of a and of b.

    Source:
        AF2 algorithm 11; AF3 algorithm 12.
    """

    edges = "bikc,bjkc->bijc"


class TriangleMultiplicationIncoming(_TriangleMultiplication):
    """Every edge i→j is updated from the edges k→i and k→j that come in at its ends.

    Lines 1 to 3 are those of the outgoing form, and ::

        4   z̃_ij = g_ij ∘ Linear(LayerNorm(Σ_k a_ki ∘ b_kj))

    Args:
        c_z: Channels of the pair representation.
        c: Channels of a and of b.

    Source:
        AF2 algorithm 12; AF3 algorithm 13.
    """

    edges = "bkic,bkjc->bijc"


class EvoformerBlock(nn.Module):
    """One block of the Evoformer, without dropout.

    ::

        2    m += MSARowAttentionWithPairBias(m, z)
        3    m += MSAColumnAttention(m)
        4    m += MSATransition(m)
        5    z += OuterProductMean(m)
        6    z += TriangleMultiplicationOutgoing(z)
        7    z += TriangleMultiplicationIncoming(z)
        8    z += TriangleAttentionStartingNode(z)
        9    z += TriangleAttentionEndingNode(z)
        10   z += PairTransition(z)

    Args:
        c_m: Channels of the MSA.
        c_z: Channels of the pair representation.
        c: Head dim of the MSA's attentions.
        heads: Heads of the MSA's attentions.
        c_triangle: Head dim of the triangle attentions.
        heads_triangle: Heads of the triangle attentions.
        c_outer: Channels of the outer product's factors.
        c_multiplication: Channels of the triangle multiplications.
        n: Factor by which the transitions' hidden layers are wider.
        extra_msa: Make it a block of the extra MSA stack, with global column attention on line 3
            (AF2 algorithm 18, where c_m = 64 and c = 8).
        attention: The attention function, for all four attentions.

    Source:
        AF2 algorithm 6, lines 2 to 10; dropout (lines 2 and 6 to 9) is left out.
    """

    def __init__(
        self,
        c_m: int = 256,
        c_z: int = 128,
        c: int = 32,
        heads: int = 8,
        *,
        c_triangle: int = 32,
        heads_triangle: int = 4,
        c_outer: int = 32,
        c_multiplication: int = 128,
        n: int = 4,
        extra_msa: bool = False,
        attention: Attention = evoformer_attention,
    ) -> None:
        super().__init__()
        column = MSAColumnGlobalAttention if extra_msa else MSAColumnAttention
        self.msa_row = MSARowAttentionWithPairBias(c_m, c_z, c, heads, attention)
        self.msa_column = column(c_m, c, heads, attention)
        self.msa_transition = MSATransition(c_m, n)
        self.outer_product_mean = OuterProductMean(c_m, c_z, c_outer)
        self.multiplication_outgoing = TriangleMultiplicationOutgoing(c_z, c_multiplication)
        self.multiplication_incoming = TriangleMultiplicationIncoming(c_z, c_multiplication)
        self.triangle_starting = TriangleAttentionStartingNode(
            c_z, c_triangle, heads_triangle, attention
        )
        self.triangle_ending = TriangleAttentionEndingNode(
            c_z, c_triangle, heads_triangle, attention
        )
        self.pair_transition = PairTransition(c_z, n)

    def forward(
        self,
        msa: Tensor,
        pair: Tensor,
        msa_mask: Tensor | None = None,
        pair_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both representations, updated.

        Args:
            msa: ``[B, S, R, c_m]``.
            pair: ``[B, R, R, c_z]``.
            msa_mask: Bool ``[B, S, R]``; all True by default.
            pair_mask: Bool ``[B, R, R]``; all True by default.

        Returns:
            The MSA ``[B, S, R, c_m]`` and the pair representation ``[B, R, R, c_z]``.

        Raises:
            TypeError: A mask is not bool.
            ValueError: Shapes do not fit.
        """
        msa = msa + self.msa_row(msa, pair, msa_mask)  # line 2
        msa = msa + self.msa_column(msa, msa_mask)  # line 3
        msa = msa + self.msa_transition(msa)  # line 4
        pair = pair + self.outer_product_mean(msa, msa_mask)  # line 5
        pair = pair + self.multiplication_outgoing(pair, pair_mask)  # line 6
        pair = pair + self.multiplication_incoming(pair, pair_mask)  # line 7
        pair = pair + self.triangle_starting(pair, pair_mask)  # line 8
        pair = pair + self.triangle_ending(pair, pair_mask)  # line 9
        pair = pair + self.pair_transition(pair)  # line 10
        return msa, pair


class EvoformerStack(nn.Module):
    """The Evoformer: blocks in a row, and the single representation from the first sequence.

    ::

        1    for all l in 1 … blocks:
        2-10     EvoformerBlock
        12   s_i = Linear(m_1i)

    Args:
        blocks: Number of blocks; each has weights of its own.
        c_m: Channels of the MSA.
        c_z: Channels of the pair representation.
        c_s: Channels of the single representation.
        block: Further arguments of :class:`EvoformerBlock`, ``attention`` among them.

    Source:
        AF2 algorithm 6.
    """

    def __init__(
        self, blocks: int = 48, c_m: int = 256, c_z: int = 128, c_s: int = 384, **block: Any
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EvoformerBlock(c_m, c_z, **block) for _ in range(blocks))
        self.single = nn.Linear(c_m, c_s)

    def forward(
        self,
        msa: Tensor,
        pair: Tensor,
        msa_mask: Tensor | None = None,
        pair_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both representations after all blocks, and the single representation.

        Args:
            msa: ``[B, S, R, c_m]``, S at least 1; the first sequence is the one to be folded.
            pair: ``[B, R, R, c_z]``.
            msa_mask: Bool ``[B, S, R]``; all True by default.
            pair_mask: Bool ``[B, R, R]``; all True by default.

        Returns:
            The MSA ``[B, S, R, c_m]``, the pair representation ``[B, R, R, c_z]`` and the single
            representation ``[B, R, c_s]``.

        Raises:
            TypeError: A mask is not bool.
            ValueError: Shapes do not fit.
        """
        for block in self.blocks:
            msa, pair = block(msa, pair, msa_mask, pair_mask)
        return msa, pair, self.single(msa[:, 0])

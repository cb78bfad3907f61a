r"""The attention layers of the AlphaFold papers, each a ``torch.nn.Module``.

AF2 is the supplement of Jumper et al., Nature 2021; AF3 that of Abramson et al., Nature 2024. Seven
of their algorithms are one operation, Evoformer attention, between linear projections. What differs
is which axes of the activations play which part:

========================================  =========  ====  ====  ====  ========  ================
layer                                     S          Q     K     G     mask      bias
========================================  =========  ====  ====  ====  ========  ================
:class:`MSARowAttentionWithPairBias`      sequences  R     R     H     msa       pair
:class:`MSAColumnAttention`               residues   S     S     H     msa       —
:class:`MSAColumnGlobalAttention`         residues   1     S     1     msa       —
:class:`TriangleAttentionStartingNode`    i          j     k     H     pair      pair
:class:`TriangleAttentionEndingNode`      j          i     k     H     pair      pair
:class:`TemplatePointwiseAttention`       pairs i,j  1     T     H     template  —
:class:`AttentionPairBias`                samples    R     R     H     token     pair, key
========================================  =========  ====  ====  ====  ========  ================

The heads of the table are the axes of the operation (:mod:`isoform.reference.contract`), and below
them stand those of the activations: ``msa [B, S, R, C_m]`` with S sequences of R residues,
``pair [B, R, R, C_z]``, ``templates [B, T, R, R, C_t]``. Where a letter could be either, the text
says which.

Each layer takes the operation as its argument ``attention``: any function with the signature of
:func:`.torch.evoformer.evoformer_attention`. Put in another implementation and the layer computes
the same thing, if that implementation is right. A gate g = σ(x) is passed as the operand ``gate``,
before its sigmoid, wherever it has the shape of the attention's output.

The layers return the update, as the algorithms do; the residual sum is the caller's (AF2
algorithm 6, :mod:`.evoformer_stack`).

Masks are bool, True where there is something. They only ever drop *keys*: outputs at masked places
are computed all the same and mean nothing. What a masked place holds, NaN included, reaches no
output elsewhere, given that a pair which touches a masked residue is masked too (the pair bias of a
query is made from one pair, which the mask of its row does not cover). For the gradient of the
*weights* padding must be finite: a linear layer's is a sum over all places, and 0 · NaN is NaN.

Weights start as PyTorch's layers do, so a fresh network already computes something. The papers
start theirs as the identity instead: :func:`init_as_published_`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from isoform.reference.contract import dtype_name
from isoform.reference.torch.evoformer import evoformer_attention

Attention = Callable[..., Any]
"""A function with the signature of :func:`.torch.evoformer.evoformer_attention`."""


class MSARowAttentionWithPairBias(nn.Module):
    """Every sequence of an MSA attends along its residues, biased by the pair representation.

    For sequence s, residues i and j, and in each head (h left out)::

        1   m_si ← LayerNorm(m_si)
        2   q_si, k_si, v_si = LinearNoBias(m_si)
        3   b_ij = LinearNoBias(LayerNorm(z_ij))
        4   g_si = σ(Linear(m_si))
        5   a_sij = softmax_j(q_si · k_sj / √c + b_ij)
        6   o_si = g_si ∘ Σ_j a_sij v_sj
        7   m̃_si = Linear(concat_h(o_si))

    Axes: S sequences, Q = K = R residues, G = H heads, D = c. This is where the operation has its
    pair bias from: b does not depend on s.

    Args:
        c_m: Channels of the MSA.
        c_z: Channels of the pair representation.
        c: Head dim.
        heads: Number of heads.
        attention: The attention function.

    Source:
        AF2 algorithm 7. The extra MSA stack (algorithm 18) has c_m = 64 and c = 8.
    """

    def __init__(
        self,
        c_m: int = 256,
        c_z: int = 128,
        c: int = 32,
        heads: int = 8,
        attention: Attention = evoformer_attention,
    ) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm = nn.LayerNorm(c_m)
        self.norm_pair = nn.LayerNorm(c_z)
        self.query = nn.Linear(c_m, heads * c, bias=False)
        self.key = nn.Linear(c_m, heads * c, bias=False)
        self.value = nn.Linear(c_m, heads * c, bias=False)
        self.pair_bias = nn.Linear(c_z, heads, bias=False)
        self.gate = nn.Linear(c_m, heads * c)
        self.output = nn.Linear(heads * c, c_m)

    def forward(self, msa: Tensor, pair: Tensor, msa_mask: Tensor | None = None) -> Tensor:
        """The update of the MSA.

        Args:
            msa: ``[B, S, R, c_m]``.
            pair: ``[B, R, R, c_z]``.
            msa_mask: Bool ``[B, S, R]``; all True by default.

        Returns:
            ``[B, S, R, c_m]``.

        Raises:
            TypeError: The mask is not bool.
            ValueError: Shapes do not fit.
        """
        check_mask("msa_mask", msa_mask, msa.shape[:3])
        m = self.norm(msa)  # line 1
        o = self.attention(  # lines 5 and 6
            to_heads(self.query, m, self.heads),  # line 2
            to_heads(self.key, m, self.heads),
            to_heads(self.value, m, self.heads),
            mask=msa_mask,
            pair_bias=to_pair_bias(self.pair_bias, self.norm_pair(pair)),  # line 3
            gate=to_heads(self.gate, m, self.heads),  # line 4
        )
        return from_heads(self.output, o)  # line 7


class MSAColumnAttention(nn.Module):
    """Every residue of an MSA attends along the sequences.

    For residue i, sequences s and t, and in each head::

        1   m_si ← LayerNorm(m_si)
        2   q_si, k_si, v_si = LinearNoBias(m_si)
        3   g_si = σ(Linear(m_si))
        4   a_sti = softmax_t(q_si · k_ti / √c)
        5   o_si = g_si ∘ Σ_t a_sti v_ti
        6   m̃_si = Linear(concat_h(o_si))

    Axes: the operation's S is the R residues, Q = K the S sequences, G = H heads, D = c; so the MSA
    is transposed on the way in and out.

    Args:
        c_m: Channels of the MSA.
        c: Head dim.
        heads: Number of heads.
        attention: The attention function.

    Source:
        AF2 algorithm 8.
    """

    def __init__(
        self,
        c_m: int = 256,
        c: int = 32,
        heads: int = 8,
        attention: Attention = evoformer_attention,
    ) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm = nn.LayerNorm(c_m)
        self.query = nn.Linear(c_m, heads * c, bias=False)
        self.key = nn.Linear(c_m, heads * c, bias=False)
        self.value = nn.Linear(c_m, heads * c, bias=False)
        self.gate = nn.Linear(c_m, heads * c)
        self.output = nn.Linear(heads * c, c_m)

    def forward(self, msa: Tensor, msa_mask: Tensor | None = None) -> Tensor:
        """The update of the MSA.

        Args:
            msa: ``[B, S, R, c_m]``.
            msa_mask: Bool ``[B, S, R]``; all True by default.

        Returns:
            ``[B, S, R, c_m]``.

        Raises:
            TypeError: The mask is not bool.
            ValueError: Shapes do not fit.
        """
        check_mask("msa_mask", msa_mask, msa.shape[:3])
        m = self.norm(msa.transpose(1, 2))  # line 1
        o = self.attention(  # lines 4 and 5
            to_heads(self.query, m, self.heads),  # line 2
            to_heads(self.key, m, self.heads),
            to_heads(self.value, m, self.heads),
            mask=None if msa_mask is None else msa_mask.transpose(1, 2),
            gate=to_heads(self.gate, m, self.heads),  # line 3
        )
        return from_heads(self.output, o).transpose(1, 2)  # line 6


class MSAColumnGlobalAttention(nn.Module):
    """Every residue of an MSA attends along the sequences, with one query for all of them.

    With thousands of sequences, S² logits per residue are too many. One query, their mean, and one
    key and value for all heads leave S per head. For residue i, sequences s and t::

        1   m_si ← LayerNorm(m_si)
        2   q_si = LinearNoBias(m_si) per head,   k_si, v_si = LinearNoBias(m_si) for all heads
        3   q_i = mean_s(q_si)
        4   g_si = σ(Linear(m_si))
        5   a_ti = softmax_t(q_i · k_ti / √c)
        6   o_si = g_si ∘ Σ_t a_ti v_ti
        7   m̃_si = Linear(concat_h(o_si))

    The mean is over the sequences that the mask leaves (0 where it leaves none).

    Axes: the operation's S is the R residues, Q = 1, K the S sequences, H heads, G = 1, D = c. The
    output has one query but the gate S of them, so the gate is multiplied afterwards.

    Args:
        c_m: Channels of the (extra) MSA.
        c: Head dim.
        heads: Number of heads.
        attention: The attention function.

    Source:
        AF2 algorithm 19, part of the extra MSA stack (algorithm 18).
    """

    def __init__(
        self,
        c_m: int = 64,
        c: int = 8,
        heads: int = 8,
        attention: Attention = evoformer_attention,
    ) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm = nn.LayerNorm(c_m)
        self.query = nn.Linear(c_m, heads * c, bias=False)
        self.key = nn.Linear(c_m, c, bias=False)
        self.value = nn.Linear(c_m, c, bias=False)
        self.gate = nn.Linear(c_m, heads * c)
        self.output = nn.Linear(heads * c, c_m)

    def forward(self, msa: Tensor, msa_mask: Tensor | None = None) -> Tensor:
        """The update of the MSA.

        Args:
            msa: ``[B, S, R, c_m]``.
            msa_mask: Bool ``[B, S, R]``; all True by default.

        Returns:
            ``[B, S, R, c_m]``.

        Raises:
            TypeError: The mask is not bool.
            ValueError: Shapes do not fit.
        """
        check_mask("msa_mask", msa_mask, msa.shape[:3])
        m = self.norm(msa.transpose(1, 2))  # line 1
        mask = None if msa_mask is None else msa_mask.transpose(1, 2)
        q = to_heads(self.query, m, self.heads)  # line 2
        if mask is not None:
            q = torch.where(mask[..., None, None], q, 0.0)
        left = q.shape[2] if mask is None else mask.sum(2).clamp(min=1)[..., None, None, None]
        o = self.attention(  # line 5
            q.sum(2, keepdim=True) / left,  # line 3
            to_heads(self.key, m, 1),
            to_heads(self.value, m, 1),
            mask=mask,
        )
        o = torch.sigmoid(to_heads(self.gate, m, self.heads)) * o  # lines 4 and 6
        return from_heads(self.output, o).transpose(1, 2)  # line 7


class TriangleAttentionStartingNode(nn.Module):
    """Every edge i→j of the pair representation attends to the edges i→k with the same start.

    The third edge of the triangle, j→k, is the bias. In each head::

        1   z_ij ← LayerNorm(z_ij)
        2   q_ij, k_ij, v_ij = LinearNoBias(z_ij)
        3   b_ij = LinearNoBias(z_ij)
        4   g_ij = σ(Linear(z_ij))
        5   a_ijk = softmax_k(q_ij · k_ik / √c + b_jk)
        6   o_ij = g_ij ∘ Σ_k a_ijk v_ik
        7   z̃_ij = Linear(concat_h(o_ij))

    Axes: S is i, Q is j, K is k, all R long; G = H heads, D = c. The bias b_jk is the same for
    every i.

    Args:
        c_z: Channels of the pair representation.
        c: Head dim.
        heads: Number of heads.
        attention: The attention function.

    Source:
        AF2 algorithm 13; AF3 algorithm 14.
    """

    def __init__(
        self,
        c_z: int = 128,
        c: int = 32,
        heads: int = 4,
        attention: Attention = evoformer_attention,
    ) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm = nn.LayerNorm(c_z)
        self.query = nn.Linear(c_z, heads * c, bias=False)
        self.key = nn.Linear(c_z, heads * c, bias=False)
        self.value = nn.Linear(c_z, heads * c, bias=False)
        self.pair_bias = nn.Linear(c_z, heads, bias=False)
        self.gate = nn.Linear(c_z, heads * c)
        self.output = nn.Linear(heads * c, c_z)

    def forward(self, pair: Tensor, pair_mask: Tensor | None = None) -> Tensor:
        """The update of the pair representation.

        Args:
            pair: ``[B, R, R, c_z]``.
            pair_mask: Bool ``[B, R, R]``; all True by default.

        Returns:
            ``[B, R, R, c_z]``.

        Raises:
            TypeError: The mask is not bool.
            ValueError: Shapes do not fit.
        """
        check_mask("pair_mask", pair_mask, pair.shape[:3])
        z = self.norm(pair)  # line 1
        o = self.attention(  # lines 5 and 6
            to_heads(self.query, z, self.heads),  # line 2
            to_heads(self.key, z, self.heads),
            to_heads(self.value, z, self.heads),
            mask=pair_mask,
            pair_bias=to_pair_bias(self.pair_bias, z),  # line 3
            gate=to_heads(self.gate, z, self.heads),  # line 4
        )
        return from_heads(self.output, o)  # line 7


class TriangleAttentionEndingNode(TriangleAttentionStartingNode):
    """Every edge i→j of the pair representation attends to the edges k→j with the same end.

    Lines 1 to 4 and 7 are those of the starting node, and ::

        5   a_ijk = softmax_k(q_ij · k_kj / √c + b_ki)
        6   o_ij = g_ij ∘ Σ_k a_ijk v_kj

    Turn every edge round, z'_ji = z_ij, and this is ``softmax_k(q'_ji · k'_jk / √c + b'_ik)``: the
    starting node's line 5 with i and j exchanged. So it is attention on the transposed pair
    representation, bias and mask included, transposed back.

    Axes: S is j, Q is i, K is k, all R long; G = H heads, D = c.

    Args:
        c_z: Channels of the pair representation.
        c: Head dim.
        heads: Number of heads.
        attention: The attention function.

    Source:
        AF2 algorithm 14; AF3 algorithm 15.
    """

    def forward(self, pair: Tensor, pair_mask: Tensor | None = None) -> Tensor:
        """The update of the pair representation.

        Args:
            pair: ``[B, R, R, c_z]``.
            pair_mask: Bool ``[B, R, R]``; all True by default.

        Returns:
            ``[B, R, R, c_z]``.

        Raises:
            TypeError: The mask is not bool.
            ValueError: Shapes do not fit.
        """
        turned_mask = None if pair_mask is None else pair_mask.transpose(1, 2)
        return super().forward(pair.transpose(1, 2), turned_mask).transpose(1, 2)


class TemplatePointwiseAttention(nn.Module):
    """Every pair i,j attends to what the T templates say about that pair.

    With t_τij the embedding of template τ, and in each head::

        1   q_ij = LinearNoBias(z_ij)
        2   k_τij, v_τij = LinearNoBias(t_τij)
        3   a_τij = softmax_τ(q_ij · k_τij / √c)
        4   o_ij = Σ_τ a_τij v_τij
        5   z̃_ij = Linear(concat_h(o_ij))

    Where no template is left the update is 0, as in the published code (line 5 alone would leave
    its bias).

    Axes: S is all R·R pairs, Q = 1, K = T templates, G = H heads, D = c. There is no gate and no
    bias.

    Args:
        c_t: Channels of the templates.
        c_z: Channels of the pair representation.
        c: Head dim. The paper writes c = 64; the published code and weights spread these 64 over
            the 4 heads, so 16 it is.
        heads: Number of heads.
        attention: The attention function.

    Source:
        AF2 algorithm 17.
    """

    def __init__(
        self,
        c_t: int = 64,
        c_z: int = 128,
        c: int = 16,
        heads: int = 4,
        attention: Attention = evoformer_attention,
    ) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.query = nn.Linear(c_z, heads * c, bias=False)
        self.key = nn.Linear(c_t, heads * c, bias=False)
        self.value = nn.Linear(c_t, heads * c, bias=False)
        self.output = nn.Linear(heads * c, c_z)

    def forward(
        self, templates: Tensor, pair: Tensor, template_mask: Tensor | None = None
    ) -> Tensor:
        """The update of the pair representation.

        Args:
            templates: ``[B, T, R, R, c_t]``.
            pair: ``[B, R, R, c_z]``.
            template_mask: Bool ``[B, T]``; all True by default.

        Returns:
            ``[B, R, R, c_z]``.

        Raises:
            TypeError: The mask is not bool.
            ValueError: Shapes do not fit.
        """
        check_mask("template_mask", template_mask, templates.shape[:2])
        B, T, R = templates.shape[:3]
        if template_mask is None:
            template_mask = templates.new_ones(B, T, dtype=torch.bool)
        z = pair.flatten(1, 2).unsqueeze(2)  # [B, R·R, 1, c_z]
        t = templates.movedim(1, 3).flatten(1, 2)  # [B, R·R, T, c_t]
        o = self.attention(  # lines 3 and 4
            to_heads(self.query, z, self.heads),  # line 1
            to_heads(self.key, t, self.heads),  # line 2
            to_heads(self.value, t, self.heads),
            mask=template_mask[:, None].expand(B, R * R, T),
        )
        update = from_heads(self.output, o).reshape(pair.shape)  # line 5
        return torch.where(template_mask.any(1)[:, None, None, None], update, 0.0)


class AttentionPairBias(nn.Module):
    """AlphaFold 3's attention of tokens, biased by pairs, with or without conditioning.

    For tokens i and j of one sample, and in each head::

        1       if s is given:
        2           a_i ← AdaLN(a_i, s_i)
        3       else:
        4           a_i ← LayerNorm(a_i)
        6       q_i = Linear(a_i)
        7       k_i, v_i = LinearNoBias(a_i)
        8       b_ij = LinearNoBias(LayerNorm(z_ij)) + β_ij
        9       g_i = σ(LinearNoBias(a_i))
        10      A_ij = softmax_j(q_i · k_j / √c + b_ij)
        11      o_i = g_i ∘ Σ_j A_ij v_j
        12      ã_i = LinearNoBias(concat_h(o_i))
        13      if s is given:
        14          ã_i ← σ(Linear(s_i)) ∘ ã_i

    β is a constant that restricts attention, to a window say. What depends on the query too is part
    of the pair bias (``beta``); what depends on the key alone may differ between samples and need
    not be spread over the queries (``mask_bias``).

    Axes: S samples, that is, structures being denoised, which share one pair representation as in
    the diffusion transformer (S = 1 in the pairformer); Q = K = R tokens, G = H heads, D = c. The
    gate of line 14 comes after the output projection and so is not the attention's.

    Args:
        c_a: Channels of the tokens: 384 in the pairformer, 768 in the diffusion transformer.
        c_z: Channels of the pair representation.
        c: Head dim; ``c_a / heads`` by default, as in the paper: 24 in the pairformer, 48 in the
            diffusion transformer.
        heads: Number of heads.
        c_s: Channels of the conditioning signal (384 in the diffusion transformer); None for no
            conditioning.
        attention: The attention function.

    Raises:
        ValueError: ``c`` is not given and the heads do not divide ``c_a``.

    Source:
        AF3 algorithm 24, in algorithm 17 (pairformer) and 23 (diffusion transformer).
    """

    def __init__(
        self,
        c_a: int = 384,
        c_z: int = 128,
        c: int | None = None,
        heads: int = 16,
        c_s: int | None = None,
        attention: Attention = evoformer_attention,
    ) -> None:
        super().__init__()
        if c is None:
            if c_a % heads:
                raise ValueError(f"heads must divide c_a, got c_a={c_a} and heads={heads}")
            c = c_a // heads
        self.heads, self.attention = heads, attention
        self.norm = nn.LayerNorm(c_a) if c_s is None else AdaptiveLayerNorm(c_a, c_s)
        self.norm_pair = nn.LayerNorm(c_z)
        self.query = nn.Linear(c_a, heads * c)
        self.key = nn.Linear(c_a, heads * c, bias=False)
        self.value = nn.Linear(c_a, heads * c, bias=False)
        self.pair_bias = nn.Linear(c_z, heads, bias=False)
        self.gate = nn.Linear(c_a, heads * c, bias=False)
        self.output = nn.Linear(heads * c, c_a, bias=False)
        self.condition_gate = None if c_s is None else nn.Linear(c_s, c_a)

    def forward(
        self,
        a: Tensor,
        pair: Tensor,
        s: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        beta: Tensor | None = None,
        mask_bias: Tensor | None = None,
    ) -> Tensor:
        """The update of the tokens.

        Args:
            a: ``[B, S, R, c_a]``.
            pair: ``[B, R, R, c_z]``, shared by the samples.
            s: ``[B, S, R, c_s]``, or S = 1 for all samples; exactly if the layer has ``c_s``.
            mask: Bool ``[B, S, R]``; all True by default.
            beta: ``[B, R, R]``, β_ij by query and key; −inf allowed.
            mask_bias: ``[B, S, R]``, the part of β that depends on the sample and the key; −inf
                allowed.

        Returns:
            ``[B, S, R, c_a]``.

        Raises:
            TypeError: The mask is not bool.
            ValueError: ``s`` is given to a layer without ``c_s`` or missing from one with it, or
                shapes do not fit.
        """
        if (s is None) != (self.condition_gate is None):
            has, got = ("no c_s", "s") if self.condition_gate is None else ("c_s", "no s")
            raise ValueError(f"a layer with {has} got {got}")
        check_mask("mask", mask, a.shape[:3])
        x = self.norm(a) if s is None else self.norm(a, s)  # lines 1 to 4
        bias = to_pair_bias(self.pair_bias, self.norm_pair(pair))  # line 8
        if beta is not None:
            bias = bias + beta[:, None, None]
        o = self.attention(  # lines 10 and 11
            to_heads(self.query, x, self.heads),  # line 6
            to_heads(self.key, x, self.heads),  # line 7
            to_heads(self.value, x, self.heads),
            mask=mask,
            mask_bias=None if mask_bias is None else mask_bias[:, :, None, None],
            pair_bias=bias,
            gate=to_heads(self.gate, x, self.heads),  # line 9
        )
        update: Tensor = from_heads(self.output, o)  # line 12
        if self.condition_gate is not None:
            update = torch.sigmoid(self.condition_gate(s)) * update  # lines 13 and 14
        return update


class AdaptiveLayerNorm(nn.Module):
    """Layer normalisation whose scale and offset depend on a conditioning signal.

    ::

        1   a_i ← LayerNorm(a_i)            no scale, no offset
        2   s_i ← LayerNorm(s_i)            no offset
        3   ã_i = σ(Linear(s_i)) ∘ a_i + LinearNoBias(s_i)

    Args:
        c_a: Channels of the tokens.
        c_s: Channels of the conditioning signal.

    Source:
        AF3 algorithm 26 (AdaLN).
    """

    def __init__(self, c_a: int = 768, c_s: int = 384) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c_a, elementwise_affine=False)
        self.norm_condition = nn.LayerNorm(c_s, bias=False)
        self.condition_scale = nn.Linear(c_s, c_a)
        self.condition_offset = nn.Linear(c_s, c_a, bias=False)

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        """Normalised ``a [..., c_a]``, scaled and offset by ``s [..., c_s]``: ``[..., c_a]``."""
        a = self.norm(a)  # line 1
        s = self.norm_condition(s)  # line 2
        adapted: Tensor = torch.sigmoid(self.condition_scale(s)) * a + self.condition_offset(s)
        return adapted  # line 3


# The steps that the layers share.


def check_mask(name: str, mask: Tensor | None, shape: torch.Size) -> None:
    """Raise unless ``mask``, if there is one, is bool and has ``shape``: no mask is broadcast."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {dtype_name(mask)}")
    if mask.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(mask.shape)}")


def to_heads(linear: nn.Linear, x: Tensor, heads: int) -> Tensor:
    """Project ``x [..., C]`` and split the channels into heads: ``[..., heads, D]``."""
    return torch.unflatten(linear(x), -1, (heads, linear.out_features // heads))


def from_heads(linear: nn.Linear, o: Tensor) -> Tensor:
    """Concatenate the heads of ``o [..., H, D]`` and project: ``[..., C]``."""
    projected: Tensor = linear(o.flatten(-2))
    return projected


def to_pair_bias(linear: nn.Linear, z: Tensor) -> Tensor:
    """Project ``z [B, Q, K, C_z]`` to one logit per head, as the operand ``[B, 1, H, Q, K]``."""
    return torch.movedim(linear(z), -1, 1).unsqueeze(1)


# How the weights start.


@torch.no_grad()
def init_as_published_(module: nn.Module) -> None:
    """Start the weights of all these layers in ``module``, in place, as the papers do.

    ================================  ================================================
    projection                        weight, bias
    ================================  ================================================
    ``gate*``                         0, 1: gates start open, at σ(1)
    ``output``                        0, 0: each layer's update starts at zero
    ``query``, ``key``, ``value``     Glorot uniform, 0
    ``expand`` (before a ReLU)        He normal, 0
    ``condition_gate``                0, −2: conditioned updates start small, at σ(−2)
    ``condition_*``                   0, 0: AdaLN starts as LayerNorm times one half
    any other                         LeCun normal, 0
    ================================  ================================================

    The normal distributions are cut off at two standard deviations. A conditioned layer's
    ``output`` counts as "any other", its gate being what starts small. Layer norms start at 1 and 0
    anyway.

    A network started so is the identity: every residual update is zero. That is good to train from
    and useless for comparing implementations, hence not the default.

    Args:
        module: Any module; its linear layers are told apart by name.

    Source:
        AF2 section 1.11.4; for conditioning, AF3 algorithm 24 line 14 and the published code.
    """
    for parent in module.modules():
        conditioned = getattr(parent, "condition_gate", None) is not None
        for name, linear in parent.named_children():
            if not isinstance(linear, nn.Linear):
                continue
            bias = 0.0
            if name.startswith("gate"):
                linear.weight.zero_()
                bias = 1.0
            elif name.startswith("condition_"):
                linear.weight.zero_()
                bias = -2.0 if name == "condition_gate" else 0.0
            elif name == "output" and not conditioned:
                linear.weight.zero_()
            elif name in ("query", "key", "value"):
                nn.init.xavier_uniform_(linear.weight)
            else:
                _truncated_normal_(linear.weight, 2.0 if name == "expand" else 1.0)
            if linear.bias is not None:
                linear.bias.fill_(bias)


def _truncated_normal_(weight: Tensor, gain: float) -> None:
    """Fill with normal numbers of variance gain / fan-in, none beyond two standard deviations."""
    std = (gain / weight.shape[1]) ** 0.5 / 0.87962566103423978  # that of the normal, cut off at 2
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

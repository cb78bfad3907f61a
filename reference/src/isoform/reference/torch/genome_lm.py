r"""A genome language model, whole: the definition of everything that trains it in parallel.

A decoder of the GPT-NeoX kind predicts each token of a genome from those before it. With tokens
t_i, embedding E and, for learned positions, a table T, at positions p_i::

    1   x_i = E[t_i]  (+ T[p_i])
    2   in every block:
            q, k, v = Linear(LayerNorm₁(x))          per head, q and k rotated by p (rotary)
            a_i = Linear(Σ_{p_j ≤ p_i} softmax_j(q_i · k_j / √D) v_j)
            x ← x + a + MLP(LayerNorm₂(x))           MLP(y) = W₂ gelu(W₁ y)
    3   logits_i = W LayerNorm(x_i)
    4   loss = mean over labelled i of −log softmax(logits_i)[label_i]

The two updates of line 2 are taken from the same x, as GPT-NeoX does; with
``parallel_residual=False`` the MLP sees x + a instead, as Megatron does.

Axes: B batch, L positions, H heads, D head dim, V vocabulary. What a parallel form replaces are
arguments: ``attend`` (line 2's sum) and ``rotate``, functions; layers are submodules by name.

Source: Zvyagin et al., GenSLMs, IJHPCA 2023; Black et al., arXiv 2204.06745; Su et al., arXiv
2104.09864. No dropout: the definition is a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from isoform.reference.torch.attention import attention
from isoform.reference.torch.genome_tokens import codons, nucleotides
from isoform.reference.torch.rotary import rotary_embedding

__all__ = [
    "CONFIGURATIONS",
    "Block",
    "Configuration",
    "GenomeLM",
    "codons",
    "initialize",
    "nucleotides",
]

IGNORE = -100
"""The label of a token that has none."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""``attend(q, k, v, positions, segments)``: causal attention, ``[B, L, H, D]`` throughout."""

Rotate = Callable[[Tensor, Tensor], Tensor]
"""``rotate(x, positions)``: rotary embedding of ``x [B, L, H, D]``."""


@dataclass(frozen=True)
class Configuration:
    """The sizes of a model.

    Attributes:
        name: What it is called.
        layers, hidden, heads: Blocks, channels, and heads, which divide the channels.
        vocabulary: V.
        positions: ``"rotary"`` or ``"learned"``.
        rotary_dim: Channels of a head that are turned, even; a quarter of them by default.
        base: Of the rotary frequencies.
        max_length: Rows of the learned table.
        ffn: Channels within the MLP; ``4 * hidden`` by default.
        eps: Of the LayerNorms.
        tied: The head has the weight of the embedding.
        parallel_residual: Attention and MLP see the same input.

    Raises:
        ValueError: Sizes do not fit.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int = len(codons.vocabulary)
    positions: Literal["rotary", "learned"] = "rotary"
    rotary_dim: int = 0
    base: float = 10000.0
    max_length: int = 2048
    ffn: int = 0
    eps: float = 1e-5
    tied: bool = False
    parallel_residual: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "vocabulary", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % self.heads:
            raise ValueError(f"heads={self.heads} must divide hidden={self.hidden}")
        if self.positions not in ("rotary", "learned"):
            raise ValueError(f"positions must be rotary or learned, got {self.positions!r}")
        object.__setattr__(self, "ffn", self.ffn or 4 * self.hidden)
        object.__setattr__(self, "rotary_dim", self.rotary_dim or self.head_dim // 4 // 2 * 2)
        if self.positions == "rotary" and not 2 <= self.rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim={self.rotary_dim} must be 2 to D={self.head_dim}")

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        h, f = self.hidden, self.ffn
        block = 4 * (h * h + h) + (h * f + f) + (f * h + h) + 2 * 2 * h
        tables = self.vocabulary * h * (1 if self.tied else 2)
        tables += self.max_length * h * (self.positions == "learned")
        return self.layers * block + tables + 2 * h


CONFIGURATIONS = {
    one.name: one
    for one in (
        Configuration("tiny", 2, 32, 4),
        # GenSLM's GPT-NeoX models, as its repository has them (genslm/architectures/neox); the
        # numbers of parameters are those in the names of its files, but for 250M: the sizes in the
        # file give 253,429,376, its name says 244,464,576. The sizes are taken.
        Configuration("25M", 8, 512, 8, ffn=2048),
        Configuration("250M", 12, 1840, 16, ffn=2048),
        Configuration("2.5B", 28, 3840, 32, ffn=4096),
        # Published with hidden 8196, which its 64 heads do not divide: here 8192.
        Configuration("25B", 64, 8192, 64, ffn=8000),
        # No model of GenSLM has 33B. The launch script of its long-sequence runs
        # (examples/long-sequences) names two for it; this one is nearer to the name.
        Configuration("33B", 80, 5760, 80, parallel_residual=False),
    )
}


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, segments: Tensor | None
) -> Tensor:
    """Line 2's sum, of whole sequences: the definition of :data:`Attend`."""
    return cast(Tensor, attention(q, k, v, causal=True, positions=positions, segments=segments))


class Attention(nn.Module):
    """Attention between its projections, which are separate so that each can be sharded."""

    def __init__(self, c: Configuration, attend: Attend, rotate: Rotate | None) -> None:
        super().__init__()
        self.head_dim, self.attend, self.rotate = c.head_dim, attend, rotate
        self.query = nn.Linear(c.hidden, c.hidden)
        self.key = nn.Linear(c.hidden, c.hidden)
        self.value = nn.Linear(c.hidden, c.hidden)
        self.output = nn.Linear(c.hidden, c.hidden)

    def forward(self, x: Tensor, positions: Tensor, segments: Tensor | None) -> Tensor:
        """``[B, L, hidden]`` to the same; heads are as many as the projections here give."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim))
            for layer in (self.query, self.key, self.value)
        )
        if self.rotate is not None:
            q, k = self.rotate(q, positions), self.rotate(k, positions)
        return cast(Tensor, self.output(self.attend(q, k, v, positions, segments).flatten(2)))


class MLP(nn.Module):
    """``W₂ gelu(W₁ y)``, with the tanh form of gelu."""

    def __init__(self, c: Configuration) -> None:
        super().__init__()
        self.up = nn.Linear(c.hidden, c.ffn)
        self.down = nn.Linear(c.ffn, c.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, L, hidden]`` to the same."""
        return cast(Tensor, self.down(F.gelu(self.up(x), approximate="tanh")))


class Block(nn.Module):
    """Line 2."""

    def __init__(self, c: Configuration, attend: Attend, rotate: Rotate | None) -> None:
        super().__init__()
        self.parallel_residual = c.parallel_residual
        self.norm1 = nn.LayerNorm(c.hidden, c.eps)
        self.attention = Attention(c, attend, rotate)
        self.norm2 = nn.LayerNorm(c.hidden, c.eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, positions: Tensor, segments: Tensor | None) -> Tensor:
        """``[B, L, hidden]`` to the same."""
        after = x + self.attention(self.norm1(x), positions, segments)
        seen = x if self.parallel_residual else after
        return cast(Tensor, after + self.mlp(self.norm2(seen)))


def initialize(model: nn.Module) -> None:
    """First values of all layers: normal with GenSLM's ``initializer_range``, biases 0, norms 1."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
        if isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()


class GenomeLM(nn.Module):
    """The model of lines 1 to 4.

    Args:
        configuration: Its sizes.
        attend: Causal attention.
        rotate: The rotary embedding; by default the reference's. Not called for learned positions.
    """

    def __init__(
        self,
        configuration: Configuration,
        attend: Attend = causal_attention,
        rotate: Rotate | None = None,
    ) -> None:
        super().__init__()
        self.configuration = c = configuration
        if c.positions == "learned":
            self.position_table = nn.Embedding(c.max_length, c.hidden)
            rotate = None
        else:
            rotate = rotate or partial(rotary_embedding, base=c.base, rotary_dim=c.rotary_dim)
        self.embedding = nn.Embedding(c.vocabulary, c.hidden)
        self.blocks = nn.ModuleList(Block(c, attend, rotate) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.hidden, c.eps)
        self.head = nn.Linear(c.hidden, c.vocabulary, bias=False)
        initialize(self)
        if c.tied:
            self.head.weight = self.embedding.weight

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """The logits of each next token.

        Args:
            tokens: int64 ``[B, L]``.
            positions: int64 ``[L]`` or ``[B, L]``; 0 … L−1 by default.
            segments: int64 likewise: attention stays within a segment. One by default.

        Returns:
            ``[B, L, V]``.

        Raises:
            ValueError: A learned table has fewer rows than a position asks for.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens)
        if self.configuration.positions == "learned":
            rows = self.configuration.max_length
            if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < rows:
                raise ValueError(f"positions must be 0 to {rows - 1}, the rows of the table")
            x = x + self.position_table(positions)
        for block in self.blocks:
            x = block(x, positions, segments)
        return cast(Tensor, self.head(self.norm(x)))

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """The mean cross entropy, in nats, of labels that are not −100; 0 where none is.

        Args:
            tokens, positions, segments: As in :meth:`forward`.
            labels: int64 ``[B, L]``: each token's next one.
        """
        logits = self(tokens, positions, segments).flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
        return total / (labels != IGNORE).sum().clamp(min=1)

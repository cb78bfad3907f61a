"""A block of the model, computed as the switches want it; its parameters are the reference's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import cast

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from isoform.parallel.training.attending import Attending, Place, rotate
from isoform.parallel.training.recompute import EVERY, Piece, add, tiles
from isoform.parallel.training.switches import Switches
from isoform.reference.torch.genome_lm import Block, Configuration, causal_attention

__all__ = ["TrainingBlock"]


class TrainingBlock(Block):
    """:class:`~isoform.reference.torch.genome_lm.Block`, by the techniques that are switched on.

    Args:
        configuration: The sizes.
        switches: The techniques.
        attend: Attention of this rank's tokens.
        place: Where they lie, now: asked for in each forward.
    """

    def __init__(
        self,
        configuration: Configuration,
        switches: Switches,
        attend: Attending,
        place: Callable[[], Place],
    ) -> None:
        super().__init__(configuration, causal_attention, None)
        self.configuration, self.switches = configuration, switches
        self.attend, self.place = attend, place

    def forward(self, x: Tensor, positions: Tensor, segments: Tensor | None) -> Tensor:
        """``[B, L_r, hidden]`` to the same."""
        s, place = self.switches, self.place()
        again = s.checkpointing != "none"
        heads = self._heads(place)
        if again:
            after = add(x, x, heads, [self.norm1, self.attention])
        else:
            after = x + heads[0].function(x)
        seen = x if self.parallel_residual else after
        if not again and s.mlp == "whole":
            return after + self._mlp(seen)
        length = x.shape[1]
        rows = tiles(length, s.tile if s.mlp == "tiled" else max(length, 1))
        return add(after, seen, [Piece(one, self._mlp) for one in rows], [self.norm2, self.mlp])

    def _mlp(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.mlp(self.norm2(x)))

    def _heads(self, place: Place) -> list[Piece]:
        """Attention by groups of heads, all tokens each."""
        groups, heads = self.switches.head_groups, self.configuration.heads
        if groups == 1:
            return [Piece(EVERY, partial(self._attention, place=place))]
        cuts = [heads * g // groups * self.configuration.head_dim for g in range(groups + 1)]
        return [
            Piece(EVERY, partial(self._attention, place=place, channels=slice(a, b)))
            for a, b in pairwise(cuts)
        ]

    def _attention(self, x: Tensor, place: Place, channels: slice | None = None) -> Tensor:
        """What the heads add that have these channels; None for all, whose layers are called whole,
        as engines that shard them want it.
        """
        a, y = self.attention, self.norm1(x)
        layers = (a.query, a.key, a.value)
        if channels is None:
            q, k, v = (layer(y) for layer in layers)
        else:
            q, k, v = (F.linear(y, one.weight[channels], one.bias[channels]) for one in layers)
        del y
        q, k, v = (z.unflatten(-1, (-1, a.head_dim)) for z in (q, k, v))
        q, k = rotate(self.configuration, q, k, place.positions)
        out = self.attend(q, k, v, place).flatten(2)
        del q, k, v
        if channels is None:
            return cast(Tensor, a.output(out))
        bias = a.output.bias if channels.start == 0 else None
        return F.linear(out, a.output.weight[:, channels], bias)

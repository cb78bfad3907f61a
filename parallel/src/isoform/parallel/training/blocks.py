"""A block of the model, computed as the switches want it; its parameters are the reference's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.distributed.tensor import DTensor

from isoform.parallel.training.attending import Attending, Place, rotate
from isoform.parallel.training.recompute import EVERY, Piece, add, pull, tiles
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
        s, heads, tokens = self.switches, self._heads(self.place()), self._tiles(x.shape[1])
        around_attention, around_mlp = [self.norm1, self.attention], [self.norm2, self.mlp]
        if s.checkpointing == "none":
            after = x + heads[0].function(x)
        elif self.parallel_residual:
            return add(x, x, [*heads, *tokens], [*around_attention, *around_mlp])
        else:
            after = add(x, x, heads, around_attention)
        seen = x if self.parallel_residual else after
        if s.checkpointing == "none" and s.mlp == "whole":
            return after + self._mlp(seen)
        return add(after, seen, tokens, around_mlp)

    # --- the MLP ---

    def _tiles(self, length: int) -> list[Piece]:
        """The MLP, some tokens at a time."""
        s = self.switches
        rows = tiles(length, s.tile) if s.mlp == "tiled" else [EVERY]
        return [Piece(one, self._mlp, self._mlp_pulled) for one in rows]

    def _mlp(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.mlp(self.norm2(x)))

    def _mlp_pulled(self, x: Tensor, dy: Tensor) -> Tensor:
        inner = F.gelu(self.mlp.up(self.norm2(x)), approximate="tanh")
        return pull(inner, dy, *_own(self.mlp.down.weight, self.mlp.down.bias))

    # --- attention ---

    def _heads(self, place: Place) -> list[Piece]:
        """Attention by groups of heads, all tokens each."""
        groups, heads = self.switches.head_groups, self.configuration.heads
        cuts = [heads * g // groups * self.configuration.head_dim for g in range(groups + 1)]
        found = []
        for a, b in pairwise(cuts):
            channels = None if groups == 1 else slice(a, b)
            pulled = partial(self._attention_pulled, place=place, channels=channels)
            function = partial(self._attention, place=place, channels=channels)
            found.append(Piece(EVERY, function, pulled))
        return found

    def _attention(self, x: Tensor, place: Place, channels: slice | None) -> Tensor:
        """What the heads add that have these channels; None for all, whose layers are called whole,
        as engines that shard them want it.
        """
        out = self._attended(x, place, channels)
        if channels is None:
            return cast(Tensor, self.attention.output(out))
        return F.linear(out, *self._output(channels))

    def _attention_pulled(
        self, x: Tensor, dy: Tensor, place: Place, channels: slice | None
    ) -> Tensor:
        return pull(self._attended(x, place, channels), dy, *_own(*self._output(channels)))

    def _output(self, channels: slice | None) -> tuple[Tensor, Tensor | None]:
        """Of the last layer, what acts on these channels; the first group adds the bias."""
        layer = self.attention.output
        if channels is None:
            return layer.weight, layer.bias
        return layer.weight[:, channels], layer.bias if channels.start == 0 else None

    def _attended(self, x: Tensor, place: Place, channels: slice | None) -> Tensor:
        """Line 2's sum, ``[B, L_r, channels]``."""
        a, y = self.attention, self.norm1(x)
        layers = (a.query, a.key, a.value)
        if channels is None:
            q, k, v = (layer(y) for layer in layers)
        else:  # one product, so that the backward makes one gradient of y and not three
            weight = torch.cat([layer.weight[channels] for layer in layers])
            bias = torch.cat([layer.bias[channels] for layer in layers])
            q, k, v = F.linear(y, weight, bias).chunk(3, -1)
        del y
        q, k, v = (z.unflatten(-1, (-1, a.head_dim)) for z in (q, k, v))
        q, k = rotate(self.configuration, q, k, place.positions)
        return self.attend(q, k, v, place).flatten(2)


def _own(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """This rank's part of the last layer of a branch, where ranks share it.

    Their outputs are summed in the forward, so that each has the whole of dy, and nothing of the
    output is wanted again: neither the product nor the sum.
    """
    if isinstance(weight, DTensor):
        return weight.to_local(), bias.to_local() if isinstance(bias, DTensor) else bias
    return weight, bias

"""The model of one rank: the reference's layers under the reference's names, and this rank's loss.

What is kept of :class:`isoform.reference.torch.genome_lm.GenomeLM` are its lines 1 to 4; a
``state_dict`` of one is that of the other, but for the rows of a partitioned table and the layers
of other stages.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from isoform.parallel.communicator import Communicator
from isoform.parallel.labels import shift_labels
from isoform.parallel.sharding import IGNORE, Sharding
from isoform.parallel.training.attending import Attending, Place, forbidden
from isoform.parallel.training.blocks import TrainingBlock
from isoform.parallel.training.offload import Offload
from isoform.parallel.training.position_table import PartitionedTable, slice_of
from isoform.parallel.training.recompute import again, total_loss, wide
from isoform.parallel.training.switches import Switches
from isoform.reference.torch.genome_lm import Configuration, initialize

__all__ = ["TrainingLM", "build"]

TABLE = "position_table.weight"
_seeding = threading.Lock()  # PyTorch's generator is one for all threads, and ranks may be threads


class TrainingLM(nn.Module):
    """The layers of one pipeline stage, or all of them.

    Args:
        configuration: The sizes.
        switches: The techniques.
        comm: The ranks that share a sequence; None for one.
        stage: Which stage, and of how many: the first has the embedding, the last the head.

    Attributes:
        embedding, position_table, norm, head: None on stages that have them not.
        blocks: By the number of the block, as text, in order.
        attending: How it attends.
        offload: What is in the host's memory.

    Raises:
        ValueError: The ranks are not as many as the layout says; a stage does not exist.
        Unsupported: The techniques do not go together.
    """

    def __init__(
        self,
        configuration: Configuration,
        switches: Switches,
        *,
        comm: Communicator | None = None,
        stage: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        switches.check(configuration)
        self.configuration, self.switches, self.comm = configuration, switches, comm
        c, (index, stages) = configuration, stage
        ranks = 1 if comm is None else comm.size
        if ranks != switches.layout.sequence:
            raise ValueError(
                f"the layout shares a sequence over {switches.layout.sequence} ranks, "
                f"but there are {ranks}"
            )
        if not 0 <= index < stages <= c.layers:
            raise ValueError(f"there is no stage {index} of {stages} with {c.layers} blocks")
        self.attending, self.offload = Attending(switches, comm), Offload()
        self._place: Place | None = None
        self.embedding = self.position_table = self.norm = self.head = None
        if index == 0:
            self.embedding = nn.Embedding(c.vocabulary, c.hidden)
            if c.positions == "learned":
                self.position_table = self._table()
        own = range(c.layers * index // stages, c.layers * (index + 1) // stages)
        self.blocks = nn.ModuleDict(
            {str(i): TrainingBlock(c, switches, self.attending, self._placed) for i in own}
        )
        if index == stages - 1:
            self.norm = nn.LayerNorm(c.hidden, c.eps)
            self.head = nn.Linear(c.hidden, c.vocabulary, bias=False)
            if c.tied:
                if self.embedding is None:
                    raise ValueError("a tied head needs the embedding on its stage: one stage only")
                self.head.weight = self.embedding.weight

    def _table(self) -> nn.Module:
        c = self.configuration
        if self.switches.position_table == "whole" or self.comm is None:
            return nn.Embedding(c.max_length, c.hidden)
        return PartitionedTable(self.sharding(c.max_length), c.hidden, self.comm)

    def sharding(self, length: int) -> Sharding:
        """Which tokens of a sequence each rank has, as the switches want it."""
        return Sharding(self.switches.sharding, length, self.switches.layout.sequence)

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Layers and blocks, by name, each parameter in one of them: a tied head is none."""
        tied = self.configuration.tied
        found = {"embedding": self.embedding, "position_table": self.position_table}
        found |= {f"blocks.{number}": block for number, block in self.blocks.items()}
        found |= {"norm": self.norm, "head": None if tied else self.head}
        yield from ((name, layer) for name, layer in found.items() if layer is not None)

    def replicated(self) -> Iterator[nn.Parameter]:
        """Parameters that all ranks of a sequence have, whose gradients are to be summed."""
        for name, parameter in self.named_parameters():
            if name != TABLE or not isinstance(self.position_table, PartitionedTable):
                yield parameter

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        sharding: Sharding | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        count: int | None = None,
    ) -> Tensor:
        """This rank's part of the loss: all ranks' add up to the mean over labelled tokens.

        Collective over the ranks that share a sequence, as is its backward.

        Args:
            tokens: int64 ``[B, L_r]``; on a stage that is not the first, what the stage before has
                given, ``[B, L_r, hidden]``.
            labels: int64 ``[B, L_r]``, −100 where there is none; by default the next tokens, across
                the borders of shards, none at the end of a segment.
            sharding: Which positions each rank has; one rank may leave it out.
            positions: int64 ``[L_r]`` or ``[B, L_r]``, where they are not those of the sharding.
            segments: int64 likewise: attention stays within a segment. One by default.
            count: Labelled tokens of all ranks and of all copies of the model, where there are
                more than this rank's group has; by default they are counted over the group.

        Returns:
            A scalar in at least float32; on a stage that is not the last, ``[B, L_r, hidden]``.

        Raises:
            ValueError: Shapes do not fit the sharding, or a table has too few rows.
        """
        x = self.hidden(tokens, sharding=sharding, positions=positions, segments=segments)
        if self.head is None:
            return x
        if labels is None:
            if self.embedding is None:
                raise ValueError("the last of several stages does not see tokens: give it labels")
            labels = self.labels(tokens, sharding, segments)
        return self.loss(x, labels, count)

    def hidden(
        self,
        tokens: Tensor,
        *,
        sharding: Sharding | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """What the last block of this stage gives, ``[B, L_r, hidden]``; as :meth:`forward`."""
        place = self._place = self._located(tokens, sharding, positions, segments)
        x = tokens if self.embedding is None else self._embedded(tokens, place)
        blocks, every = [*self.blocks.values()], self.switches.every
        groups = [blocks[i : i + every] for i in range(0, len(blocks), every)]
        for number, group in enumerate(groups):
            # what comes last is wanted as soon as its output is there
            wanted_at_once = number == len(groups) - 1 and self.head is not None
            with self._kept(offloaded=not wanted_at_once):
                if len(group) == 1:
                    x = group[0](x, place.positions, place.segments)
                else:
                    x = again(partial(self._through, group, place), x)
        return x

    def _through(self, group: list[nn.Module], place: Place, x: Tensor) -> Tensor:
        """Some blocks. Where they are differentiated, the first's input is there anyhow, and the
        last's is wanted at once.
        """
        self._place = place  # of the forward that this is part of
        for number, block in enumerate(group):
            with self._kept(offloaded=0 < number < len(group) - 1):
                x = block(x, place.positions, place.segments)
        return x

    def _kept(self, offloaded: bool) -> AbstractContextManager[Any]:
        """Within, what autograd keeps is on the host, if the switches want that, and if it may."""
        asked = self.switches.checkpointing == "offloaded" and torch.is_grad_enabled()
        return self.offload.hooks() if asked and offloaded else nullcontext()

    def labels(
        self, tokens: Tensor, sharding: Sharding | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Each token's next one, across the borders of shards. Collective."""
        if self.comm is not None:
            sharding = self._sharding(tokens, sharding)
            found = shift_labels(tokens, comm=self.comm, sharding=sharding, segments=segments)
            return cast(Tensor, found)
        found = tokens.roll(-1, 1)
        found[:, -1:] = IGNORE
        if segments is not None:
            ends = segments[..., :-1] != segments[..., 1:]
            found[:, :-1].masked_fill_(ends, IGNORE)
        return found

    def count(self, labels: Tensor) -> int:
        """Labelled tokens of all ranks that share the sequence. Collective."""
        own = int((labels != IGNORE).sum())
        if self.comm is None:
            return own
        counts = self.comm.all_gather(np.array([own]), [(1,)] * self.comm.size, operation="count")
        return int(np.sum(counts))

    def loss(self, x: Tensor, labels: Tensor, count: int | None = None) -> Tensor:
        """This rank's part of the loss from what the last block gives; as :meth:`forward`."""
        if self.norm is None or self.head is None:
            raise ValueError("only the last stage has a head")
        count = self.count(labels) if count is None else count
        tile = self.switches.tile
        if self.switches.loss == "tiled":
            total = total_loss(x, labels, self._summed_loss, [self.norm, self.head], tile)
        else:
            total = self._summed_loss(x, labels)
        return total / max(count, 1)

    def _summed_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        assert self.norm is not None and self.head is not None
        logits = wide(self.head(self.norm(x))).flatten(0, 1)
        return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")

    # --- where tokens lie ---

    def _placed(self) -> Place:
        assert self._place is not None, "blocks are called by the model"
        return self._place

    def _sharding(self, tokens: Tensor, sharding: Sharding | None) -> Sharding:
        ranks = self.switches.layout.sequence
        if sharding is None:
            if ranks > 1:
                raise ValueError(f"{ranks} ranks share a sequence: say which positions each has")
            return Sharding.contiguous(tokens.shape[1], 1)
        rank = 0 if self.comm is None else self.comm.rank
        if sharding.ranks != ranks:
            raise ValueError(f"the sharding is for {sharding.ranks} ranks, but there are {ranks}")
        if tokens.shape[1] != sharding.lengths[rank]:
            raise ValueError(
                f"tokens must have the {sharding.lengths[rank]} positions of rank {rank} on "
                f"axis 1, got shape {tuple(tokens.shape)}"
            )
        return sharding

    def _located(
        self,
        tokens: Tensor,
        sharding: Sharding | None,
        positions: Tensor | None,
        segments: Tensor | None,
    ) -> Place:
        sharding = self._sharding(tokens, sharding)
        given = positions is not None
        if positions is None:
            rank = 0 if self.comm is None else self.comm.rank
            positions = torch.from_numpy(sharding.positions(rank)).to(tokens.device)
        place = Place(sharding, positions, segments, given, None)
        if self.switches.attention == "stored":
            return replace(place, mask=forbidden(positions, segments))
        return place

    def _embedded(self, tokens: Tensor, place: Place) -> Tensor:
        assert self.embedding is not None
        x = cast(Tensor, self.embedding(tokens))
        if self.position_table is None:
            return x
        at, rows = place.positions, self.configuration.max_length
        if at.numel() and not 0 <= int(at.min()) <= int(at.max()) < rows:
            raise ValueError(f"positions must be 0 to {rows - 1}, the rows of the table")
        if isinstance(self.position_table, PartitionedTable):
            found = self.position_table(at, None if place.given else place.sharding)
            return x + cast(Tensor, found)
        return x + cast(Tensor, self.position_table(at))


def build(
    configuration: Configuration,
    switches: Switches,
    *,
    comm: Communicator | None = None,
    stage: tuple[int, int] = (0, 1),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    weights: Mapping[str, Tensor] | None = None,
    share: Callable[[nn.Module], None] | None = None,
) -> TrainingLM:
    """A rank's model, with the same numbers at every layout.

    Args:
        configuration: The sizes.
        switches: The techniques.
        comm: The ranks that share a sequence; None for one.
        stage: Which pipeline stage, and of how many.
        device: Where its parameters are; the processor by default.
        dtype: Of its parameters; PyTorch's default by default.
        seed: Of their first values. Each layer has a stream of its own, so that they do not depend
            on the layout; on a GPU they are others than on a processor.
        weights: First values instead, as ``GenomeLM(configuration).state_dict()``; tables whole.
        share: Called with each layer and block once it has its first values, before there is the
            next: what it leaves of them is all that there is at the same time.

    Returns:
        The model, of which a partitioned table holds the rank's rows alone.

    Raises:
        ValueError, Unsupported: As :class:`TrainingLM`.
        KeyError: A parameter is not among the weights.
    """
    with torch.device("meta"):
        model = TrainingLM(configuration, switches, comm=comm, stage=stage)
    model = model.to(dtype=dtype)
    for name, layer in model.layers():
        layer.to_empty(device=device or "cpu")
        if weights is None:
            _seed(model, name, layer, seed)
        else:
            _load(model, name, layer, weights)
        if share is not None:
            share(layer)
    if configuration.tied and model.head is not None and model.embedding is not None:
        model.head.weight = model.embedding.weight
    return model


@torch.no_grad()
def _seed(model: TrainingLM, name: str, layer: nn.Module, seed: int) -> None:
    if isinstance(layer, PartitionedTable):
        _seed_rows(layer.weight, layer.rows, layer.comm.rank, seed)
        return
    if layer is model.position_table:
        weight = cast(Tensor, layer.weight)
        _seed_rows(weight, Sharding.contiguous(len(weight), 1), 0, seed)
        return
    blocks = [f"blocks.{i}" for i in range(model.configuration.layers)]
    names = ["embedding", "norm", "head", *blocks]
    with _seeding, torch.random.fork_rng():
        torch.manual_seed(seed * len(names) + names.index(name))
        initialize(layer)


def _seed_rows(weight: Tensor, rows: Sharding, rank: int, seed: int, block: int = 1024) -> None:
    """Rows of a table, drawn in blocks by their number, so that ranks need not draw all."""
    own = torch.from_numpy(rows.positions(rank))
    for number in torch.unique(own // block).tolist():
        generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + number)
        drawn = torch.randn(block, weight.shape[1], generator=generator) * 0.02
        mine = own // block == number
        weight[mine.to(weight.device)] = drawn[own[mine] % block].to(weight)


@torch.no_grad()
def _load(model: TrainingLM, name: str, layer: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for own, parameter in layer.named_parameters(name):
        given = weights[own]
        if isinstance(layer, PartitionedTable):
            given = slice_of(given, layer.rows, layer.comm.rank)
        parameter.copy_(given)

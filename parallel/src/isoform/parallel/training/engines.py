"""All four kinds of parallelism on one mesh of ranks, and optimizer states that ranks share.

Sequence parallelism is :mod:`.model`'s. The others are PyTorch's own engines, which find layers
under the names that the reference gives them: tensor parallelism
(``torch.distributed.tensor.parallel``), pipeline parallelism (``torch.distributed.pipelining``,
1F1B) and fully sharded parameters, gradients and optimizer states (FSDP2), on the host where they
are offloaded. On every rank, once a process group is there::

    engine = Engine(configuration, switches)
    optimizer = torch.optim.AdamW(engine.model.parameters())
    sharding = engine.model.sharding(length)
    tokens = sharding.shard(tokens_of_this_copy, engine.sequence.rank)
    loss = engine.differentiate(tokens, sharding=sharding, microbatches=2)
    optimizer.step()

Ranks that share parameters are those of the axes ``data`` and ``sequence`` together: what is summed
over them, or sharded among them, is gradients of one loss, so engines sum and do not average.

Source: Shoeybi et al., arXiv 1909.08053; Narayanan et al., arXiv 2104.04473; Zhao et al., arXiv
2304.11277.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from isoform.parallel.communicators.torch_distributed import TorchCommunicator
from isoform.parallel.sharding import IGNORE, Sharding
from isoform.parallel.training.gradients import sum_tensors
from isoform.parallel.training.model import TrainingLM, build
from isoform.parallel.training.position_table import PartitionedTable
from isoform.parallel.training.switches import Layout, Switches
from isoform.reference.contract import Unsupported
from isoform.reference.torch.genome_lm import Configuration

AXES = ("pipeline", "data", "sequence", "tensor")
SHARERS = "sharers"
"""The axes data and sequence as one: ranks that have the same parameters."""


def mesh_of(layout: Layout, device: str = "cpu") -> DeviceMesh:
    """The ranks of the process group, by the layout: neighbours share tensors. Collective.

    Args:
        layout: The degrees of all axes.
        device: The kind of device that each rank has: ``"cpu"`` or ``"cuda"``.

    Returns:
        A mesh of :data:`AXES`, of which data and sequence are also one axis, :data:`SHARERS`.

    Raises:
        ValueError: There are not as many ranks.
    """
    if (ranks := get_world_size()) != layout.ranks:
        raise ValueError(f"the layout is for {layout.ranks} ranks, but there are {ranks}")
    mesh = init_device_mesh(device, astuple(layout), mesh_dim_names=AXES)
    mesh["data", "sequence"]._flatten(SHARERS)
    return mesh


class _Stage(nn.Module):
    """What a pipeline or FSDP calls: the model, told where tokens lie."""

    def __init__(self, model: TrainingLM) -> None:
        super().__init__()
        self.model = model
        self.place: dict[str, Any] = {}

    def forward(self, x: Tensor, labels: Tensor | None = None, count: int = 0) -> Tensor:
        """The loss, where there are labels; else what the next stage takes."""
        hidden = self.model.hidden(x, **self.place)
        return hidden if labels is None else self.model.loss(hidden, labels, count)


class Engine:
    """A rank's part of a model that all ranks of the process group train.

    Args:
        configuration: The sizes.
        switches: The techniques; their layout is that of all ranks.
        mesh: As :func:`mesh_of` makes it, which it does by default.
        device: Where parameters are.
        dtype: Of parameters.
        compute: Of what is computed where states are sharded; that of parameters by default.
            Gradients are then summed in float32.
        seed, weights: First values, as of :func:`~isoform.parallel.training.model.build`.

    Attributes:
        model: This rank's part.
        mesh: The ranks, by axis.
        sequence: Those that share a sequence.
        copies: Those that have the same place in other sequences.
        sharers: Both together.

    Raises:
        ValueError, Unsupported: As :class:`~isoform.parallel.training.model.TrainingLM`.
    """

    def __init__(
        self,
        configuration: Configuration,
        switches: Switches,
        *,
        mesh: DeviceMesh | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        compute: torch.dtype | None = None,
        seed: int = 0,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        switches.check(configuration)
        if compute is not None and switches.optimizer == "replicated":
            raise ValueError("compute is for sharded states: with replicated ones it is dtype")
        self.switches, self.device = switches, torch.device(device)
        self.mesh = mesh_of(switches.layout, device) if mesh is None else mesh
        self.sequence = TorchCommunicator(self.mesh.get_group("sequence"))
        self.copies = TorchCommunicator(self.mesh.get_group("data"))
        self.sharers = TorchCommunicator(self.mesh[SHARERS].get_group())
        self.stage = (self.mesh.get_local_rank("pipeline"), switches.layout.pipeline)
        self.model = build(
            configuration,
            switches,
            comm=self.sequence if self.sequence.size > 1 else None,
            stage=self.stage,
            device=device,
            dtype=dtype,
            seed=seed,
            weights=weights,
        )
        self._stage = _Stage(self.model)
        self._schedules: dict[tuple[int, ...], Schedule1F1B] = {}
        self._between = compute or next(self.model.blocks.parameters()).dtype
        self._count = 0
        if switches.layout.tensor > 1:
            self._share_tensors()
        if switches.optimizer != "replicated":
            self._share_states(compute)

    def _share_tensors(self) -> None:
        """Heads, and channels of the MLP, over the axis of tensors."""
        across, along = ColwiseParallel, RowwiseParallel
        plan: dict[str, Any] = {f"attention.{one}": across() for one in ("query", "key", "value")}
        plan |= {"attention.output": along(), "mlp.up": across(), "mlp.down": along()}
        for block in self.model.blocks.values():
            parallelize_module(block, self.mesh["tensor"], plan)

    def _share_states(self, compute: torch.dtype | None) -> None:
        """Parameters, gradients and optimizer states over those that would have the same."""
        offloaded = self.switches.optimizer == "offloaded"
        pinned = self.device.type == "cuda"
        options: dict[str, Any] = {
            "mesh": self.mesh[SHARERS],
            "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if offloaded else OffloadPolicy(),
        }
        if compute is not None:
            options["mp_policy"] = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32)
        table = self._table()
        for block in self.model.blocks.values():
            fully_shard(block, **options)
        fully_shard(self._stage, ignored_params=set() if table is None else {table}, **options)
        for module in self._stage.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)

    def _table(self) -> nn.Parameter | None:
        """A partitioned table's rows, of which the ranks of a sequence have others each."""
        table = self.model.position_table
        return table.weight if isinstance(table, PartitionedTable) else None

    def differentiate(
        self,
        tokens: Tensor,
        *,
        sharding: Sharding | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        microbatches: int = 1,
    ) -> float:
        """Add the gradient of the loss of all ranks' tokens to that of parameters. Collective.

        Gradients must be none before it: they are summed over ranks within.

        Args:
            tokens: int64 ``[B, L_r]``: this rank's of the sequences of its copy; the same on all
                stages and all ranks that share tensors. B is the same on all copies.
            sharding: Which positions each rank of a sequence has.
            positions, segments: As of :class:`~isoform.parallel.training.model.TrainingLM`;
                ``[L_r]`` where there are several stages.
            microbatches: Parts of the batch, one after the other; they fill the stages of a
                pipeline. Divides B.

        Returns:
            The loss of all tokens, on every rank.

        Raises:
            ValueError: ``microbatches`` does not divide B.
            Unsupported: Several stages, and positions or segments that differ between examples.
        """
        if microbatches < 1 or len(tokens) % microbatches:
            raise ValueError(f"microbatches={microbatches} must divide the batch of {len(tokens)}")
        labels = self.model.labels(tokens, sharding, segments)
        own = np.array([int((labels != IGNORE).sum())])
        counts = self.sharers.all_gather(own, [(1,)] * self.sharers.size, operation="count")
        self._count = int(np.sum(counts))
        place: dict[str, Any] = {"sharding": sharding, "positions": positions, "segments": segments}
        if self.stage[1] > 1:
            reasons = [
                f"{name} that differ between examples, with several stages"
                for name, x in place.items()
                if isinstance(x, Tensor) and x.dim() > 1
            ]
            if reasons:
                raise Unsupported(reasons, "isoform.parallel.training")
            part = self._by_stages(tokens, labels, place, microbatches)
        else:
            part = self._at_once(tokens, labels, place, microbatches)
        self._sum_gradients()
        return self._total(part)

    def _at_once(
        self, tokens: Tensor, labels: Tensor, place: dict[str, Any], microbatches: int
    ) -> float:
        total = 0.0
        size = len(tokens) // microbatches
        for i in range(microbatches):
            rows = slice(i * size, (i + 1) * size)
            self._stage.place = {
                name: x[rows] if isinstance(x, Tensor) and x.dim() > 1 else x
                for name, x in place.items()
            }
            if isinstance(self._stage, FSDPModule):
                self._stage.set_requires_gradient_sync(i == microbatches - 1)
            loss = self._stage(tokens[rows], labels[rows], self._count)
            loss.backward()
            total += loss.item()
        return total

    def _by_stages(
        self, tokens: Tensor, labels: Tensor, place: dict[str, Any], microbatches: int
    ) -> float:
        self._stage.place = place
        index, stages = self.stage
        losses: list[Tensor] = []
        schedule = self._schedule(tokens, microbatches)
        if index == 0:
            schedule.step(tokens)
        elif index == stages - 1:
            schedule.step(target=labels, losses=losses)
        else:
            schedule.step()
        return float(sum(loss.item() for loss in losses))

    def _schedule(self, tokens: Tensor, microbatches: int) -> Schedule1F1B:
        """That of batches of this shape; shapes are said, so that PyTorch does not try a batch."""
        key = (*tokens.shape, microbatches)
        if key not in self._schedules:
            size, length = len(tokens) // microbatches, tokens.shape[1]
            shape = (size, length, self.model.configuration.hidden)
            options: dict[str, Any] = {"device": "meta", "requires_grad": True}
            between = torch.empty(shape, dtype=self._between, **options)
            first = torch.empty(size, length, dtype=tokens.dtype, device="meta")
            index, stages = self.stage
            one = PipelineStage(
                self._stage,
                index,
                stages,
                self.device,
                input_args=(between if index else first,),
                output_args=(between,),
                group=self.mesh.get_group("pipeline"),
            )
            self._schedules[key] = Schedule1F1B(
                one, microbatches, loss_fn=self._loss, scale_grads=False
            )
        return self._schedules[key]

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self.model.loss(hidden, labels, self._count)

    def _sum_gradients(self) -> None:
        """Of parameters that several ranks have whole."""
        table = self._table()
        if table is not None and table.grad is not None:
            sum_tensors([table.grad], self.copies)
        if self.switches.optimizer == "replicated":
            parameters = list(self.model.replicated())
            for p in parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            sum_tensors((_local(cast(Tensor, p.grad)) for p in parameters), self.sharers)

    def _total(self, part: float) -> float:
        """The sum over those that share parameters; what the last stage has, on all stages."""
        parts = self.sharers.all_gather(
            np.array([part]), [(1,)] * self.sharers.size, operation="loss"
        )
        total = torch.tensor(float(np.sum(parts)), dtype=torch.float64, device=self.device)
        if self.stage[1] > 1:
            torch.distributed.all_reduce(total, group=self.mesh.get_group("pipeline"))
        return total.item()


def _local(x: Tensor) -> Tensor:
    """What this rank has of it."""
    return x.to_local() if isinstance(x, DTensor) else x

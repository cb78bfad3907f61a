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
Ranks of the axis ``tensor`` have the same tokens, and the same numbers but for the layers that they
share: embedding, norms and head are on each of them, and their gradients come out alike.

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
from torch.distributed import get_world_size, is_initialized
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)

from isoform.parallel.communicators.torch_distributed import TorchCommunicator
from isoform.parallel.sharding import IGNORE, Sharding
from isoform.parallel.training.gradients import sum_gradients, sum_tensors
from isoform.parallel.training.model import TrainingLM, build
from isoform.parallel.training.position_table import PartitionedTable
from isoform.parallel.training.switches import Layout, Switches
from isoform.reference.torch.genome_lm import Block, Configuration

AXES = ("pipeline", "data", "sequence", "tensor")
SHARERS = "sharers"
"""The axes data and sequence as one: ranks that have the same parameters."""


def mesh_of(layout: Layout, device: str = "cpu") -> DeviceMesh:
    """The ranks of the process group, by the layout: neighbours share tensors. Collective.

    Args:
        layout: The degrees of all axes.
        device: The kind of device that each rank has: ``"cpu"`` or ``"cuda"``.

    Returns:
        A mesh of :data:`AXES`.

    Raises:
        ValueError: There is no process group, or not as many ranks.
    """
    if not is_initialized():
        raise ValueError("call torch.distributed.init_process_group before this")
    if (ranks := get_world_size()) != layout.ranks:
        raise ValueError(f"the layout is for {layout.ranks} ranks, but there are {ranks}")
    return init_device_mesh(device, astuple(layout), mesh_dim_names=AXES)


class _Stage(nn.Module):
    """What a pipeline or FSDP calls: the model, told what all examples have in common.

    The loss is computed within too: FSDP has parameters whole in a forward alone.
    """

    def __init__(self, model: TrainingLM) -> None:
        super().__init__()
        self.model = model
        self.common: dict[str, Any] = {}

    def forward(self, x: Tensor, **own: Tensor) -> Tensor:
        """This rank's part of the loss, ``[1]``; where there is no head, what the next takes."""
        found = cast(Tensor, self.model(x, **self.common, **own))
        return found if self.model.head is None else torch.stack([found])


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
        self._sharing = self.mesh["data", "sequence"]._flatten(SHARERS)  # made once for a mesh
        self.sharers = TorchCommunicator(self._sharing.get_group())
        self.stage = (self.mesh.get_local_rank("pipeline"), switches.layout.pipeline)
        self._compute = compute
        self.model = build(
            configuration,
            switches,
            comm=self.sequence if self.sequence.size > 1 else None,
            stage=self.stage,
            device=device,
            dtype=dtype,
            seed=seed,
            weights=weights,
            share=self._share,
        )
        self._stage = _Stage(self.model)
        self._schedules: dict[tuple[int, ...], Schedule1F1B] = {}
        self._between = compute or next(self.model.blocks.parameters()).dtype
        if switches.optimizer != "replicated":
            self._share_rest()

    def _share(self, layer: nn.Module) -> None:
        """Share a block that has its first values, before there is the next."""
        if not isinstance(layer, Block):
            return
        if self.switches.layout.tensor > 1:
            share_tensors(layer, self.mesh["tensor"])
        if self.switches.optimizer != "replicated":
            fully_shard(layer, **self._sharded())

    def _share_rest(self) -> None:
        """States of what is in no block, but for a table of which ranks have other rows each."""
        table = self._table()
        ignored = set() if table is None else {table}
        fully_shard(self._stage, ignored_params=ignored, **self._sharded())
        for module in self._stage.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other way to this

    def _sharded(self) -> dict[str, Any]:
        """How parameters, gradients and states are shared by those that would have the same."""
        offloaded = self.switches.optimizer == "offloaded"
        pinned = self.device.type == "cuda"
        found: dict[str, Any] = {
            "mesh": self._sharing,
            "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if offloaded else OffloadPolicy(),
        }
        if self._compute is not None:
            found["mp_policy"] = MixedPrecisionPolicy(self._compute, reduce_dtype=torch.float32)
        return found

    def _table(self) -> nn.Parameter | None:
        """A partitioned table's rows, of which the ranks of a sequence have others each."""
        table = self.model.position_table
        return table.weight if isinstance(table, PartitionedTable) else None

    def differentiate(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
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
            labels: int64 ``[B, L_r]``, −100 where there is none; by default the next tokens, as of
                :class:`~isoform.parallel.training.model.TrainingLM`.
            sharding: Which positions each rank of a sequence has.
            positions, segments: As of :class:`~isoform.parallel.training.model.TrainingLM`.
            microbatches: Parts of the batch, one after the other; they fill the stages of a
                pipeline, and are at least as many. Divides B.

        Returns:
            The loss of all tokens, on every rank.

        Raises:
            ValueError: ``microbatches`` does not divide B, or is less than the stages.
        """
        if labels is None:
            labels = self.model.labels(tokens, sharding, segments)
        own = np.array([int((labels != IGNORE).sum())])
        counts = self.sharers.all_gather(own, [(1,)] * self.sharers.size, operation="count")
        place = {"labels": labels, "positions": positions, "segments": segments}
        part = self._losses(tokens, place, sharding, int(np.sum(counts)), microbatches)
        self._sum_gradients()
        return self._total(part)

    @torch.no_grad()
    def summed_loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        sharding: Sharding | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        microbatches: int = 1,
    ) -> float:
        """The loss of this rank's tokens, summed and not the mean, without gradients. Collective.

        Args:
            tokens, labels, sharding, positions, segments, microbatches: As of
                :meth:`differentiate`.

        Returns:
            The sum over this rank's labelled tokens, which ranks that share tensors all have; of
            several stages the last has it, and the others 0.

        Raises:
            ValueError: As :meth:`differentiate`.
        """
        place = {"labels": labels, "positions": positions, "segments": segments}
        return self._losses(tokens, place, sharding, 1, microbatches)

    def _losses(
        self,
        tokens: Tensor,
        place: Mapping[str, Tensor | None],
        sharding: Sharding | None,
        count: int,
        microbatches: int,
    ) -> float:
        """This rank's part of the loss; differentiated, where gradients are wanted."""
        if microbatches < 1 or len(tokens) % microbatches:
            raise ValueError(f"microbatches={microbatches} must divide the batch of {len(tokens)}")
        if microbatches < self.stage[1] > 1:
            raise ValueError(
                f"microbatches={microbatches} must be at least the {self.stage[1]} stages of the "
                "pipeline"
            )
        common = {name: x for name, x in place.items() if x is None or x.dim() < 2}
        own = {name: x for name, x in place.items() if x is not None and x.dim() > 1}
        self._stage.common = {**common, "sharding": sharding, "count": count}
        losses: list[Tensor] = []
        if self.stage[1] > 1:
            schedule = self._schedule(tokens, microbatches)
            index, stages = self.stage
            step = schedule.step if torch.is_grad_enabled() else schedule.eval
            given: dict[str, Any] = dict(own)
            if index == stages - 1:
                given |= {"target": own["labels"], "losses": losses}
            step(*([] if index else [tokens]), **given)
        else:
            size = len(tokens) // microbatches
            for start in range(0, len(tokens), size or 1):
                rows = slice(start, start + size)
                loss = self._stage(tokens[rows], **{name: x[rows] for name, x in own.items()})
                if torch.is_grad_enabled():
                    loss.backward()
                losses.append(loss.detach())
        return float(sum(loss.sum().item() for loss in losses))

    def _schedule(self, tokens: Tensor, microbatches: int) -> Schedule1F1B:
        """That of batches of this shape; shapes are said, so that PyTorch does not try a batch.

        With gradients and without are two: up to PyTorch 2.11, a stage whose first batch wants no
        gradient does not pass any back later.
        """
        key = (*tokens.shape, microbatches, torch.is_grad_enabled())
        if key not in self._schedules:
            size, length = len(tokens) // microbatches, tokens.shape[1]
            shape = (size, length, self.model.configuration.hidden)
            options: dict[str, Any] = {"device": "meta", "requires_grad": True}
            between = torch.empty(shape, dtype=self._between, **options)
            first = torch.empty(size, length, dtype=tokens.dtype, device="meta")
            # the loss is in at least float32, and some versions of PyTorch compare dtypes
            loss = torch.empty(
                1, dtype=torch.promote_types(self._between, torch.float32), **options
            )
            index, stages = self.stage
            one = PipelineStage(
                self._stage,
                index,
                stages,
                self.device,
                input_args=(between if index else first,),
                output_args=(between if index < stages - 1 else loss,),
                group=self.mesh.get_group("pipeline"),
            )
            self._schedules[key] = Schedule1F1B(
                one, microbatches, loss_fn=_given, scale_grads=False
            )
        return self._schedules[key]

    def _sum_gradients(self) -> None:
        """Of parameters that several ranks have whole."""
        table = self._table()
        if table is not None and table.grad is not None:
            sum_tensors([table.grad], self.copies)
        if self.switches.optimizer == "replicated":
            sum_gradients(self.model, self.sharers)

    def _total(self, part: float) -> float:
        """The sum over those that share parameters; what the last stage has, on all stages."""
        parts = self.sharers.all_gather(
            np.array([part]), [(1,)] * self.sharers.size, operation="loss"
        )
        total = torch.tensor(float(np.sum(parts)), dtype=torch.float64, device=self.device)
        if self.stage[1] > 1:
            torch.distributed.all_reduce(total, group=self.mesh.get_group("pipeline"))
        return total.item()


def share_tensors(block: nn.Module, mesh: DeviceMesh) -> None:
    """Share heads of attention and channels of the MLP over ranks, which all have a block whole.

    What LayerNorms give is told to be on all ranks, so that its gradient, which three projections
    have a part in, is summed over ranks once.

    Args:
        block: Of the reference's layers.
        mesh: Of one axis.
    """
    everywhere = PrepareModuleOutput(
        output_layouts=Replicate(), desired_output_layouts=Replicate(), use_local_output=False
    )
    plan: dict[str, Any] = {"norm1": everywhere, "norm2": everywhere}
    plan |= {f"attention.{one}": ColwiseParallel() for one in ("query", "key", "value")}
    plan |= {"attention.output": RowwiseParallel()}
    plan |= {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    # every rank has the same numbers: each keeps its part of them, and none is sent
    parallelize_module(block, mesh, plan, src_data_rank=None)


def _given(loss: Tensor, labels: Tensor) -> Tensor:
    """The loss of a stage that has computed it."""
    return loss.sum()

"""What the tests of training run on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoform.parallel.communicator import Communicator
from isoform.parallel.sharding import Documents, Sharding
from isoform.parallel.training.gradients import sum_gradients
from isoform.parallel.training.model import TrainingLM, build
from isoform.parallel.training.switches import Layout, Switches
from isoform.reference.torch.genome_lm import Configuration, GenomeLM

TABLE = "position_table.weight"


def configuration(**changes: Any) -> Configuration:
    """Small, and no size is another's."""
    sizes: dict[str, Any] = {"vocabulary": 11, "rotary_dim": 6, "max_length": 23, "ffn": 28}
    return Configuration("small", **{"layers": 2, "hidden": 40, "heads": 4, **sizes, **changes})


@dataclass(frozen=True)
class Case:
    """A model, its techniques and its tokens; the layout is that of the ranks that run it."""

    switches: Switches = field(default_factory=Switches)
    model: Configuration = field(default_factory=configuration)
    L: int = 19
    B: int = 2
    dtype: str = "float64"
    documents: tuple[int, ...] | None = None
    restart: bool = False  # positions count from 0 in each document
    by_example: bool = False  # segments and positions are [B, L], and differ

    def weights(self) -> dict[str, Tensor]:
        """Equal wherever they are made, none of them 0; threads share PyTorch's generator."""
        with torch.device("meta"):
            shapes = {name: x.shape for name, x in GenomeLM(self.model).state_dict().items()}
        rng = np.random.default_rng(5)
        found = {
            name: torch.from_numpy(
                rng.standard_normal(shape) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
            )
            for name, shape in shapes.items()
        }
        if self.model.tied:
            found["head.weight"] = found["embedding.weight"]
        return {name: x.to(getattr(torch, self.dtype)) for name, x in found.items()}

    def reference(self) -> GenomeLM:
        """The one-rank model."""
        with torch.device("meta"):
            model = GenomeLM(self.model)
        model = model.to_empty(device="cpu").to(getattr(torch, self.dtype))
        if self.model.tied:
            model.head.weight = model.embedding.weight
        model.load_state_dict(self.weights())
        return model

    def tokens(self, step: int = 0) -> Tensor:
        """``[B, L]``."""
        rng = np.random.default_rng([7, step])
        return torch.from_numpy(rng.integers(0, self.model.vocabulary, (self.B, self.L)))

    def places(self) -> dict[str, Tensor]:
        """Segments, and positions where they restart."""
        if self.documents is None:
            return {}
        lengths = (*self.documents, self.L - sum(self.documents))
        orders = [lengths if b % 2 == 0 else lengths[::-1] for b in range(self.B)]
        packed = [Documents(order) for order in (orders if self.by_example else [lengths])]
        found = {"segments": torch.from_numpy(np.stack([one.segments for one in packed]))}
        if self.restart:
            found["positions"] = torch.from_numpy(np.stack([one.positions for one in packed]))
        if not self.by_example:
            found = {name: x[0] for name, x in found.items()}
        return found

    def labels(self, step: int = 0) -> Tensor:
        """Of the whole."""
        segments = self.places().get("segments")
        whole = Sharding.contiguous(self.L, 1)
        return whole.labels(self.tokens(step), 0, axis=-1, segments=segments)

    def built(self, comm: Communicator) -> TrainingLM:
        """The rank's model."""
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "weights": self.weights()}
        switches = self.switches.but(layout=Layout(sequence=comm.size))
        return build(self.model, switches, comm=comm, **options)

    def loss(self, comm: Communicator, model: TrainingLM, step: int = 0) -> Tensor:
        """The rank's part."""
        sharding = model.sharding(self.L)
        places = {name: sharding.shard(x, comm.rank, axis=-1) for name, x in self.places().items()}
        return model(sharding.shard(self.tokens(step), comm.rank), sharding=sharding, **places)


def differentiate(comm: Communicator, case: Case) -> dict[str, Any]:
    """The rank's part of the loss, and gradients after they are summed."""
    model = case.built(comm)
    loss = case.loss(comm, model)
    loss.backward()
    held = model.offload.most_held, model.offload.bytes_held
    sum_gradients(model, comm)
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return {"loss": loss.item(), "gradients": gradients, "held": held}


def differentiate_all(comm: Communicator, cases: list[Case]) -> list[dict[str, Any]]:
    """The same of several."""
    return [differentiate(comm, case) for case in cases]


def train(comm: Communicator, case: Case, steps: int) -> tuple[list[float], dict[str, Any]]:
    """The rank's parts of the loss, step by step, and the parameters in the end."""
    model = case.built(comm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = case.loss(comm, model, step)
        loss.backward()
        sum_gradients(model, comm)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach().numpy() for name, p in model.named_parameters()}

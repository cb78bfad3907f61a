"""What the tests of all kinds of parallelism run on every rank."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from isoform.parallel.communicator import Communicator
from isoform.parallel.training.engines import Engine, mesh_of
from isoform.parallel.training.switches import Layout, Switches
from isoform.reference.contract import Unsupported

if "training_programs" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "training_programs", Path(__file__).with_name("training_programs.py")
    )
    assert spec is not None and spec.loader is not None
    sys.modules["training_programs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["training_programs"])
from training_programs import Case


def whole(x: Tensor) -> Any:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().numpy()


def train(
    comm: Communicator,
    cases: list[tuple[Case, Layout]],
    steps: int,
    microbatches: int,
    fault: str = "",
) -> list[tuple[list[float], dict[str, Any], dict[str, Any], int]]:
    """Of each case: losses, gradients of the first step, parameters in the end, and numbers that
    this rank holds of parameters.
    """
    found = []
    for case, layout in cases:
        switches: Switches = case.switches.but(layout=layout)
        weights = case.weights()
        options: dict[str, Any] = {"mesh": mesh_of(layout), "weights": weights}
        engine = Engine(case.model, switches, dtype=torch.float64, **options)
        if fault == "averaged":
            for module in engine._stage.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(float(engine.sharers.size))
        optimizer = torch.optim.AdamW(engine.model.parameters(), lr=1e-2)
        sharding = engine.model.sharding(case.L)
        own = case.B // layout.data
        rows = slice(engine.copies.rank * own, (engine.copies.rank + 1) * own)
        losses, gradients = [], {}
        for step in range(steps):
            optimizer.zero_grad()
            tokens = sharding.shard(case.tokens(step)[rows], engine.sequence.rank)
            places = {
                name: sharding.shard(x, engine.sequence.rank, axis=-1)
                for name, x in case.places().items()
            }
            losses.append(
                engine.differentiate(tokens, sharding=sharding, microbatches=microbatches, **places)
            )
            if step == 0:
                gradients = {n: whole(p.grad) for n, p in engine.model.named_parameters()}
            optimizer.step()
        parameters = {name: whole(p) for name, p in engine.model.named_parameters()}
        held = sum(
            (p.to_local() if isinstance(p, DTensor) else p).numel()
            for p in engine.model.parameters()
        )
        found.append((losses, gradients, parameters, held))
    return found


def refused(comm: Communicator, case: Case) -> list[str]:
    """What is said of wrong calls."""
    layout = Layout(pipeline=2)
    mesh = mesh_of(layout)
    engine = Engine(case.model, case.switches.but(layout=layout), mesh=mesh)
    replicated = case.switches.but(layout=layout, optimizer="replicated")
    tokens = case.tokens()
    places = torch.arange(case.L).expand(case.B, -1)
    calls: list[Any] = [
        lambda: mesh_of(Layout(data=3)),
        lambda: engine.differentiate(tokens, microbatches=3),
        lambda: engine.differentiate(tokens, segments=places, positions=places),
        lambda: Engine(case.model, replicated, mesh=mesh, compute=torch.bfloat16),
    ]
    found = []
    for call in calls:
        try:
            call()
        except (ValueError, Unsupported) as error:
            found.append(str(error))
    return found


def mixed(comm: Communicator, case: Case) -> tuple[float, set[torch.dtype], set[torch.dtype]]:
    """float32 states, bfloat16 in between, two stages."""
    switches = case.switches.but(layout=Layout(pipeline=2), optimizer="sharded")
    options: dict[str, Any] = {"weights": case.weights(), "compute": torch.bfloat16}
    engine = Engine(case.model, switches, dtype=torch.float32, **options)
    loss = engine.differentiate(case.tokens(), microbatches=2)
    parameters = list(engine.model.parameters())
    return loss, {p.dtype for p in parameters}, {p.grad.dtype for p in parameters}

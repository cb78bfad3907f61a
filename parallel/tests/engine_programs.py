"""What the tests of all kinds of parallelism run on every rank."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._python_dispatch import TorchDispatchMode

from isoform.parallel.communicator import Communicator
from isoform.parallel.communicators.torch_distributed import TorchCommunicator
from isoform.parallel.training import engines
from isoform.parallel.training.engines import AXES, Engine, mesh_of
from isoform.parallel.training.gradients import local, sum_gradients
from isoform.parallel.training.switches import Layout, Switches


def _training_programs() -> Any:
    """Beside this file: a rank has no path to it."""
    if "training_programs" not in sys.modules:
        path = Path(__file__).with_name("training_programs.py")
        spec = importlib.util.spec_from_file_location("training_programs", path)
        assert spec is not None and spec.loader is not None
        sys.modules["training_programs"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["training_programs"])
    return sys.modules["training_programs"]


Case = _training_programs().Case


def whole(x: Tensor) -> Any:
    """Of a parameter that is shared over ranks. Collective over them."""
    if isinstance(x, DTensor):  # in the host's memory NCCL does not see it
        x = x.to(x.device_mesh.device_type).full_tensor()
    return x.detach().cpu().numpy().copy()


def train(
    comm: Communicator, asked: list[tuple[Any, Layout]], steps: int, microbatches: int
) -> list[dict[str, Any]]:
    """Some steps of each case, by its layout, and what came of them; on GPUs if ranks have them."""
    device = "cuda" if "cuda" in comm.devices else "cpu"
    return [_train(case, layout, steps, microbatches, device) for case, layout in asked]


def train_with_faults(
    comm: Communicator, asked: list[tuple[str, Any, Layout]], microbatches: int
) -> list[dict[str, Any]]:
    """A step of each case, with a fault."""
    found = []
    for fault, case, layout in asked:
        with FAULTS[fault]():
            found.append(_train(case, layout, 1, microbatches))
    return found


def _train(
    case: Any, layout: Layout, steps: int, microbatches: int, device: str = "cpu"
) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": getattr(torch, case.dtype), "weights": case.weights()}
    with patch.object(engines, "fully_shard", wraps=engines.fully_shard) as sharding_calls:
        engine = Engine(case.model, case.switches.but(layout=layout), device=device, **options)
    named = dict(engine.model.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2, foreach=False)  # meshes differ
    sharding, own = engine.model.sharding(case.L), engine.sequence.rank
    each, copy = case.B // layout.data, engine.copies.rank
    rows = slice(copy * each, (copy + 1) * each)
    places = {
        name: sharding.shard(x[rows] if x.dim() > 1 else x, own, axis=-1).to(device)
        for name, x in case.places().items()
    }
    given: dict[str, Any] = {"sharding": sharding, "microbatches": microbatches, **places}
    found: dict[str, Any] = {"where": tuple(map(engine.mesh.get_local_rank, AXES)), "losses": []}
    labels = sharding.shard(case.labels()[rows], own).to(device)
    tokens = sharding.shard(case.tokens()[rows], own).to(device)
    found["summed"] = engine.summed_loss(tokens, labels, **given)
    for step in range(steps):
        tokens = sharding.shard(case.tokens(step)[rows], own).to(device)
        found["losses"].append(engine.differentiate(tokens, **given))
        if step == 0:
            found["gradients"] = {name: whole(p.grad) for name, p in named.items()}
        optimizer.step()
        optimizer.zero_grad()
    last = f"blocks.{max(map(int, engine.model.blocks))}.mlp.up.weight"
    found["parameters"] = {name: whole(p) for name, p in named.items()}
    found["devices"] = {local(x).device.type for x in optimizer.state[named[last]].values()}
    policies = [call.kwargs["offload_policy"] for call in sharding_calls.call_args_list]
    found["policies"] = [type(policy).__name__ for policy in policies]
    found["held"] = {name: local(p).numel() for name, p in named.items()}
    found["states"] = {
        name: local(optimizer.state[p]["exp_avg"]).numel() for name, p in named.items()
    }
    return found


def first_values(comm: Communicator, c: Any, asked: list[Switches]) -> list[dict[str, Any]]:
    """Of all parameters of this rank's stage, drawn by seed."""
    made = [Engine(c, switches, seed=3).model for switches in asked]
    return [{name: whole(p) for name, p in model.named_parameters()} for model in made]


def refused(comm: Communicator, case: Any) -> list[str]:
    """What is said of wrong calls, on 2 ranks."""
    layout = Layout(pipeline=2)
    mesh = mesh_of(layout)
    engine = Engine(case.model, case.switches.but(layout=layout), mesh=mesh)
    replicated = case.switches.but(layout=layout, optimizer="replicated")
    calls: list[Any] = [
        lambda: mesh_of(Layout(data=3)),
        lambda: engine.differentiate(case.tokens(), microbatches=3),
        lambda: engine.differentiate(case.tokens(), microbatches=1),
        lambda: Engine(case.model, replicated, mesh=mesh, compute=torch.bfloat16),
    ]
    found = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    return found


def mixed(
    comm: Communicator, case: Any, asked: list[Layout]
) -> list[tuple[float, set[torch.dtype], set[torch.dtype], set[torch.dtype]]]:
    """float32 states, bfloat16 in between: the loss, and dtypes of parameters, of gradients and of
    what blocks give.
    """
    found = []
    for layout in asked:
        switches = case.switches.but(layout=layout, optimizer="sharded")
        options: dict[str, Any] = {"weights": case.weights(), "compute": torch.bfloat16}
        engine = Engine(case.model, switches, dtype=torch.float32, **options)
        between: set[torch.dtype] = set()
        for block in engine.model.blocks.values():
            block.register_forward_hook(lambda *given, seen=between: seen.add(given[2].dtype))
        rows = engine.copies.rank * (case.B // layout.data)
        sharding = engine.model.sharding(case.L)
        tokens = case.tokens()[rows : rows + case.B // layout.data]
        tokens = sharding.shard(tokens, engine.sequence.rank)
        loss = engine.differentiate(tokens, sharding=sharding, microbatches=len(tokens))
        parameters = list(engine.model.parameters())
        kinds = {p.dtype for p in parameters}, {p.grad.dtype for p in parameters}
        found.append((loss, *kinds, between))
    return found


class Sums(TorchDispatchMode):
    """Counts sums over ranks that PyTorch's engines make."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its own operations come here again
        self.count += func is torch.ops._c10d_functional.all_reduce.default
        return func(*args, **(kwargs or {}))


def sums_over_tensors(comm: Communicator, case: Any, asked: list[Switches]) -> list[int]:
    """How often ranks that share tensors sum activations, or their gradients, in a step."""
    found = []
    for switches in asked:
        layout = Layout(tensor=comm.size)
        engine = Engine(case.model, switches.but(layout=layout), weights=case.weights())
        with Sums() as sums:
            engine.differentiate(case.tokens())
        found.append(sums.count)
    return found


# --- faults ---


class _Partial(torch.autograd.Function):
    """Told to be on all ranks, but its gradient stays this rank's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Any) -> Tensor:
        return DTensor.from_local(x, mesh, [Replicate()], run_check=False)

    @staticmethod
    def backward(ctx: Any, dx: DTensor) -> tuple[Tensor, None]:
        return dx.to_local(), None


def gradients_of_heads_not_summed() -> Any:
    class Wrong(engines.PrepareModuleOutput):
        def _apply(self, module: Any, mesh: Any) -> Any:
            module.register_forward_hook(lambda _, inputs, out: _Partial.apply(out, mesh))
            return module

    return patch.object(engines, "PrepareModuleOutput", Wrong)


def summed_over_those_that_share_tensors() -> Any:
    """And so counted twice."""

    def wrong(self: Engine) -> None:
        sum_gradients(self.model, TorchCommunicator())

    return patch.object(Engine, "_sum_gradients", wrong)


def averaged() -> Any:
    """Over ranks that share states, as FSDP does unless it is told."""
    return patch.object(FSDPModule, "set_gradient_divide_factor", lambda *_: None)


def averaged_over_microbatches() -> Any:
    def wrong(*args: Any, scale_grads: bool, **options: Any) -> Any:
        return Schedule1F1B(*args, scale_grads=True, **options)

    return patch.object(engines, "Schedule1F1B", wrong)


def means_of_microbatches() -> Any:
    """Each by its own count."""
    usual = engines._Stage.forward

    def wrong(self: Any, x: Tensor, **own: Tensor) -> Tensor:
        self.common["count"] = None
        return usual(self, x, **own)

    return patch.object(engines._Stage, "forward", wrong)


def segments_of_the_first_example() -> Any:
    usual = engines._Stage.forward

    def wrong(self: Any, x: Tensor, **own: Tensor) -> Tensor:
        own["segments"] = own["segments"][:1].expand_as(own["segments"])
        return usual(self, x, **own)

    return patch.object(engines._Stage, "forward", wrong)


FAULTS: dict[str, Callable[[], Any]] = {
    "heads": gradients_of_heads_not_summed,
    "twice": summed_over_those_that_share_tensors,
    "averaged": averaged,
    "microbatches": averaged_over_microbatches,
    "means": means_of_microbatches,
    "segments": segments_of_the_first_example,
}

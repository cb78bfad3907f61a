"""What the tests of the Evoformer over ranks run on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoform.parallel.axial import evoformer_block, evoformer_stack
from isoform.parallel.communicator import Communicator
from isoform.parallel.gathered_product import gathered_product
from isoform.parallel.movements import all_reduce, gather, move, recut, replicated
from isoform.parallel.sharding import Sharding
from isoform.reference.torch.evoformer_stack import EvoformerBlock, EvoformerStack


@dataclass(frozen=True)
class Case:
    """A block, or a stack of them, and what goes in."""

    S: int = 5
    R: int = 7
    B: int = 2
    blocks: int = 0  # of a stack; 0 is one block by itself
    dtype: str = "float64"
    msa_mask: bool = True
    pair_mask: bool = True
    extra_msa: bool = False
    pieces: int | None = None
    recompute: bool = False
    inputs_trained: bool = True

    def module(self) -> Any:
        """Equal wherever it is made, and another object each time."""
        sizes: dict[str, Any] = {"c_triangle": 4, "heads_triangle": 3, "c_outer": 3}
        sizes |= {"c_multiplication": 5, "n": 2, "extra_msa": self.extra_msa}
        with torch.device("meta"):  # does not draw from the generator that all threads share
            if self.blocks:
                made: Any = EvoformerStack(self.blocks, 6, 7, 4, c=3, heads=2, **sizes)
            else:
                made = EvoformerBlock(6, 7, 3, 2, **sizes)
        made = made.to_empty(device="cpu").to(torch.float64)
        rng = np.random.default_rng(3)
        with torch.no_grad():
            for p in made.parameters():
                spread = 1.0 if p.ndim == 1 else p.shape[-1] ** -0.5
                p.copy_(torch.from_numpy(spread * rng.standard_normal(tuple(p.shape))))
        return made.to(getattr(torch, self.dtype))

    def operands(self) -> dict[str, Tensor]:
        """Of the whole: inputs, cotangents of all outputs, masks."""
        rng = np.random.default_rng([self.S, self.R])
        shapes = {"msa": (self.B, self.S, self.R, 6), "pair": (self.B, self.R, self.R, 7)}
        shapes |= {f"d{name}": shape for name, shape in shapes.items()}
        shapes["dsingle"] = (self.B, self.R, 4)
        found = {
            name: torch.from_numpy(rng.standard_normal(shape)).to(getattr(torch, self.dtype))
            for name, shape in shapes.items()
        }
        for name in ("msa", "pair"):  # different along every axis, some rows all False
            mask = rng.random(shapes[name][:3]) < 0.7
            mask[:, 1:2] = False
            found[f"{name}_mask"] = torch.from_numpy(mask)
        return found


OUTPUTS = ("msa", "pair", "single")


def run(comm: Communicator, case: Case) -> dict[str, Any]:
    """This rank's outputs and gradients, and what it has sent, forward and in all."""
    P, r = comm.size, comm.rank
    sequences, residues = Sharding.contiguous(case.S, P), Sharding.contiguous(case.R, P)
    whole = case.operands()
    own = {
        name: (sequences if "msa" in name else residues).shard(x, r) for name, x in whole.items()
    }
    module = case.module()
    inputs = [own["msa"], own["pair"]]
    if case.inputs_trained:
        inputs = [x.requires_grad_() for x in inputs]
    options: dict[str, Any] = {"comm": comm, "sequences": sequences, "residues": residues}
    options["pieces"] = case.pieces
    masks = [own[f"{n}_mask"] if getattr(case, f"{n}_mask") else None for n in ("msa", "pair")]
    comm.traffic.clear()
    if case.blocks:
        outs: Any = evoformer_stack(module, *inputs, *masks, **options, recompute=case.recompute)
    else:
        outs = evoformer_block(module, *inputs, *masks, **options)
    forward = dict(comm.traffic.bytes_by)
    names = OUTPUTS[: len(outs)]
    torch.autograd.backward(outs, [own[f"d{name}"] for name in names])
    results: dict[str, Any] = dict(zip(names, map(array, outs), strict=True))
    if case.inputs_trained:
        results |= {"msa gradient": array(inputs[0].grad), "pair gradient": array(inputs[1].grad)}
    results["parameters"] = {name: array(p.grad) for name, p in module.named_parameters()}
    return {**results, "forward": forward, "both": dict(comm.traffic.bytes_by)}


def one_rank(case: Case, dtype: str = "float64") -> dict[str, Any]:
    """The reference's block or stack with the whole, computed in ``dtype``."""
    module = case.module().to(getattr(torch, dtype))
    whole = {
        name: x if x.dtype == torch.bool else x.to(getattr(torch, dtype))
        for name, x in case.operands().items()
    }
    inputs = [whole["msa"].requires_grad_(), whole["pair"].requires_grad_()]
    masks = [whole[f"{n}_mask"] if getattr(case, f"{n}_mask") else None for n in ("msa", "pair")]
    outs = module(*inputs, *masks)
    names = OUTPUTS[: len(outs)]
    torch.autograd.backward(outs, [whole[f"d{name}"] for name in names])
    results: dict[str, Any] = dict(zip(names, map(array, outs), strict=True))
    results |= {"msa gradient": array(inputs[0].grad), "pair gradient": array(inputs[1].grad)}
    results["parameters"] = {name: array(p.grad) for name, p in module.named_parameters()}
    return results


def array(x: Tensor | None) -> Any:
    assert x is not None
    return x.detach().double().numpy()


# --- movements ---

SHAPE = (2, 5, 4, 3)  # cut along axis 1 by ``FIRST``, along axis 2 by ``SECOND``


def lengths(P: int) -> tuple[list[int], list[int]]:
    """How SHAPE is cut along its axes 1 and 2: unevenly, and with nothing for some."""
    first = [3, 0, 2] if P > 2 else [5] if P == 1 else [1, 4]
    second = [0, 3, 1] if P > 2 else [4] if P == 1 else [4, 0]
    return first + [0] * (P - len(first)), second + [0] * (P - len(second))


def tensors(name: str, shape: tuple[int, ...], rank: int, trained: bool = True) -> Tensor:
    rng = np.random.default_rng([len(name), *shape, rank])
    return torch.from_numpy(rng.standard_normal(shape)).requires_grad_(trained)


def dot(x: Tensor, y: Tensor) -> float:
    return float((x * y).detach().sum())


def adjoints(comm: Communicator) -> dict[str, list[float]]:
    """By linear map A: this rank's part of ⟨A x, y⟩, and of ⟨x, Aᵀ y⟩ as autograd has it."""
    P, r = comm.size, comm.rank
    first, second = lengths(P)
    B, S, R, C = SHAPE
    found = {}

    def record(name: str, y: Tensor, *xs: Tensor) -> None:
        cotangent = tensors(name, tuple(y.shape), 100 + r, False)
        gradients = torch.autograd.grad(y, xs, cotangent)
        found[name] = [dot(y, cotangent), *map(dot, xs, gradients)]

    x = tensors("x", (B, first[r], R, C), r)
    record("recut", move(recut(comm, joined=1, lengths=first, cut=2, into=second), x), x)
    record("gather", move(gather(comm, axis=1, lengths=first), x), x)

    # Linear in each factor: the product equals both adjoint products.
    for pieces in (1, 2, 5):
        a, b = tensors("a", (B, 3, S, C), r), tensors("b", (B, first[r], S, C), r)
        along = gather(comm, axis=1, lengths=first)
        y = gathered_product("bikc,bjkc->bijc", a, b, along, pieces=pieces)
        record(f"product in {pieces}", y, a, b)
        a, b = tensors("a", (B, S, 2, C), r), tensors("b", (B, S, first[r], 4), r)
        along = gather(comm, axis=2, lengths=first)
        y = gathered_product("bsic,bsjd->bijcd", a, b, along, pieces=pieces)
        record(f"outer product in {pieces}", y, a, b)

    # One x, on all ranks: its side of the product counts once.
    linear = torch.nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(tensors("weight", (2, 3), 0, False))
    record("replicated", replicated(linear, comm).weight * 1.0, linear.weight)
    if r > 0:
        found["replicated"][1] = 0.0
    return found


def moved(comm: Communicator) -> dict[str, Any]:
    """What the movements do to the arrays that the NumPy programs move too."""
    P, r = comm.size, comm.rank
    first, second = lengths(P)
    B, S, R, C = SHAPE
    x = tensors("x", (B, first[r], R, C), r, False)
    whole = tensors("whole", SHAPE, r, False)
    own = gather(comm, axis=1, lengths=first).begin_adjoint(whole)()
    return {
        "recut": move(recut(comm, joined=1, lengths=first, cut=2, into=second), x).numpy(),
        "gathered": move(gather(comm, axis=1, lengths=first), x).numpy(),
        "gathered_backward": own.numpy(),
    }


def sums(comm: Communicator) -> tuple[float, float]:
    """256 from the first rank and 1 from all others: a sum that bfloat16 must not hold."""
    number = 256.0 if comm.rank == 0 else 1.0
    x = torch.full((comm.size, 2), number, dtype=torch.bfloat16)
    scattered = gather(comm, axis=0, lengths=[1] * comm.size).begin_adjoint(x)()
    (reduced,) = all_reduce(comm, [x])
    assert scattered.dtype == reduced.dtype == x.dtype
    return float(scattered[0, 0]), float(reduced[-1, -1])


def everything(comm: Communicator, cases: list[Case]) -> dict[str, Any]:
    return {
        "blocks": [run(comm, case) for case in cases],
        "adjoints": adjoints(comm),
        "moved": moved(comm),
        "sums": sums(comm),
    }

"""Attention over many ranks as an implementation like any other.

The judge makes one call; here it becomes one call on each of P ranks, with that rank's shards, and
the shards of the results become the whole that the judge looks at. So the same oracle, budgets and
verdicts judge what one device computes and what a thousand would. An implementation is a function
of :data:`Vjp`'s kind, the one that :func:`isoform.parallel.attention.attention_vjp` is of, and a
division of the sequence::

    MINE = over_ranks("mine", mymodule.attention_vjp, "zigzag")

What the judge cannot see from outside is looked at on every rank: that its shards are left alone;
and memory that it is likely to be given holds NaN there too. A fault on any rank fails the case,
and the message says on which.
"""

from __future__ import annotations

import atexit
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, cast, get_args

import numpy as np

from isoform.conformance.case import Operands
from isoform.conformance.dtypes import Array, same
from isoform.conformance.frameworks import framework
from isoform.conformance.implementation import Implementation
from isoform.kernels import attention_tensor
from isoform.parallel import Sharding
from isoform.parallel.communicator import Communicator
from isoform.parallel.communicators.simulated import simulate
from isoform.parallel.job import Job
from isoform.parallel.launch import LaunchError, Transport, mpiexec
from isoform.parallel.sharding import Kind
from isoform.reference.attention_contract import DIFFERENTIABLE, NAME, PLACES, attention_call
from isoform.reference.contract import Arithmetic, Capabilities, Unsupported

Vjp = Callable[..., tuple[Any, Callable[[Any], Sequence[Any]]]]
"""``vjp(q, k, v, *, comm, sharding, causal, positions, segments, window, scale)``, on one rank: its
shard of the output, and the function of ``dout`` that gives ``dq, dk, dv``. At the top level of a
module, or a ``functools.partial`` of such, so that other processes find it."""

Joined = Literal["simulated", "mpi", "torch", "torch-nccl", "cupy-nccl"]

TRANSPORTS: dict[str, Transport] = {
    "mpi": "mpi",
    "torch": "gloo",
    "torch-nccl": "torch-nccl",
    "cupy-nccl": "cupy-nccl",
}
"""How ranks that are processes are started and joined."""

CAPABILITIES = Capabilities(
    NAME,
    operands=frozenset({"causal", "positions", "segments", "window"}),
    gradients=frozenset(DIFFERENTIABLE),
    cross_lengths=False,  # queries and keys are shards of one sequence
    lse=False,
    deterministic=True,
    memory="linear",
    arithmetic=Arithmetic(output="operand"),
)
"""What the strategies of :mod:`isoform.parallel` declare."""


class RankError(Exception):
    """A rank failed or did not answer; the message says which, and what it said."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that a call is spread over.

    Attributes:
        size: P.
        communicator: ``"simulated"``: threads of this process; ``"mpi"``: processes that
            ``mpiexec`` starts; ``"torch"``: processes with gloo, whose arrays are PyTorch tensors;
            ``"torch-nccl"`` and ``"cupy-nccl"``: processes with a GPU each, where the tensors are,
            joined by NCCL, PyTorch's or through CuPy.
        limit: Seconds that processes have for a call; then all are ended. Threads cannot be: there
            a deadlock is found instead.

    Raises:
        ValueError: ``size`` is less than 1, or the communicator is unknown.
    """

    size: int = 4
    communicator: Joined = "simulated"
    limit: float = 60.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"ranks must be at least 1, got {self.size}")
        if self.communicator not in get_args(Joined):
            known = ", ".join(get_args(Joined))
            raise ValueError(f"communicator must be one of {known}, got {self.communicator!r}")

    @property
    def in_process(self) -> bool:
        """Whether they are threads of this process, whose memory can be seen here."""
        return self.communicator == "simulated"

    @property
    def library(self) -> str:
        """Whose arrays the ranks work with."""
        return "numpy" if self.communicator in ("simulated", "mpi") else "torch"

    @property
    def device(self) -> str:
        """Where the ranks' arrays are."""
        return "cuda" if self.communicator.endswith("-nccl") else "cpu"

    def on(self, device: str) -> Ranks:
        """These ranks where arrays lie on ``device``: PyTorch's on GPUs are joined by NCCL; others
        are where they are.
        """
        if device == "cuda" and self.communicator == "torch":
            return replace(self, communicator="torch-nccl")
        return self

    def lacking(self) -> str:
        """What a machine with as many GPUs as there are ranks has and this one has not, where the
        ranks need it; else empty.
        """
        return gpus_lacking(self.size) if self.device == "cuda" else ""

    def require(self) -> None:
        """Raise ImportError where what starts or joins the ranks is not installed, and RankError
        where there are fewer GPUs than ranks.
        """
        needed = {"mpi": "mpi4py", "torch": "torch", "torch-nccl": "torch", "cupy-nccl": "cupy"}
        module = needed.get(self.communicator)
        if module and importlib.util.find_spec(module) is None:
            extra = {"mpi4py": "mpi", "cupy": "torch,cuda13"}.get(module, module)
            remedy = f"install it with 'pip install \"isoform[{extra}]\"'"
            raise ImportError(f"ranks of {self.communicator} need {module}: {remedy}", name=module)
        if self.communicator == "mpi":
            mpiexec()
        if why := self.lacking():
            raise RankError(f"{self.communicator} {why}")

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(comm, *args)`` on every rank; what each returned.

        Raises:
            RankError: A rank raised, or time was up.
        """
        try:
            if self.in_process:
                return simulate(function, self.size, *args)
            return _job(self.size, self.communicator).run(function, *args, limit=self.limit)
        except LaunchError as error:
            raise RankError(_told(error, self)) from error
        except Exception as error:
            noted = [note for note in getattr(error, "__notes__", ()) if "by rank" in note]
            who = noted[0].removeprefix("raised by ") if noted else f"{self.size} ranks"
            raise RankError(f"{who}: {type(error).__name__}: {error}") from error


def gpus_lacking(needed: int) -> str:
    """Why ``needed`` ranks cannot have a GPU each, joined by NCCL; empty where they can. It begins
    with "needs", and says how many GPUs there are.
    """
    import torch

    if (seen := torch.cuda.device_count()) < needed:
        gpus = "1 GPU" if needed == 1 else f"{needed} GPUs"
        return f"needs {gpus}, one for each rank, joined by NCCL: PyTorch sees {seen} here"
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return "needs a PyTorch that was built with NCCL: this one was not"
    return ""


@cache
def _job(size: int, communicator: str) -> Job:
    """The processes, which stay for the calls to come."""
    job = Job(size, transport=TRANSPORTS[communicator])
    atexit.register(job.close)
    return job


def _told(error: LaunchError, ranks: Ranks) -> str:
    """What a job that has ended says, in one line."""
    if not error.tracebacks:
        return " ".join(str(error).split())
    rank, text = next(iter(error.tracebacks.items()))
    if not text.startswith("Timeout"):
        return f"rank {rank} of {ranks.size}: {text.strip().splitlines()[-1]}"
    places = ", ".join(
        f"rank {r} in {frames[-1]}"
        for r, text in sorted(error.tracebacks.items())
        if (frames := re.findall(r"first\):\n  File .* in (\w+)", text))
    )
    return f"not done after {ranks.limit:g} s: {places}"


@dataclass(frozen=True)
class Spread:
    """How an implementation is spread over ranks.

    Attributes:
        name: What the implementation is called.
        vjp: What every rank runs.
        kind: How the sequence is divided: ``"contiguous"``, ``"zigzag"`` or ``"striped"``.
        block: Positions in a stripe.
        capabilities: What is declared.
        ranks: Where it runs.
        parts: Equal parts that each rank's shard must be made of, so that lengths are multiples of
            ``parts·P``; 0 where any length is divided.
    """

    name: str
    vjp: Vjp
    kind: str
    block: int = 1
    capabilities: Capabilities = CAPABILITIES
    ranks: Ranks = Ranks()
    parts: int = 0

    @property
    def declared(self) -> Capabilities:
        """What is declared on these ranks. On GPUs those of ours round as the kernels do, and go
        by the fastest, which add in any order.
        """
        declared = self.capabilities
        if self.ranks.device == "cuda" and declared is CAPABILITIES:
            declared = replace(
                declared,
                devices=frozenset({"cuda"}),
                deterministic=False,
                arithmetic=attention_tensor.CAPABILITIES.arithmetic,
            )
        if self.parts:
            declared = replace(declared, length_multiple=self.parts * self.ranks.size)
        return declared

    def implementation(self) -> Implementation:
        """What the judge is given."""
        return Implementation(
            self.name, "numpy", self.declared, self.forward, self.backward, spread=self
        )

    def on(self, ranks: Ranks) -> Implementation:
        """The same on other ranks."""
        return replace(self, ranks=ranks).implementation()

    def forward(self, q: Array, k: Array, v: Array, **options: Any) -> Array:
        """The operation: ``out`` of the whole sequence."""
        return self._call({"q": q, "k": k, "v": v}, options)[0]

    def backward(
        self, dout: Array, q: Array, k: Array, v: Array, **options: Any
    ) -> tuple[Array, ...]:
        """``dq, dk, dv`` of the whole sequence."""
        return self._call({"q": q, "k": k, "v": v, "dout": dout}, options)[1:]

    def sharding(self, length: int) -> Sharding:
        """The division of a sequence."""
        return Sharding(cast(Kind, self.kind), length, self.ranks.size, self.block)

    def rank_of(self, position: int, length: int) -> int:
        """Which rank has computed the results at ``position``."""
        return int(self.sharding(length).owners(np.array(position)))

    def _call(self, operands: Operands, options: dict[str, Any]) -> tuple[Array, ...]:
        given = {name: x for name, x in options.items() if name != "return_lse"}
        call = attention_call(
            *(operands[name] for name in "qkv"),
            **given,
            gradients=DIFFERENTIABLE if "dout" in operands else (),
            lse=options.get("return_lse", False),
            device=self.ranks.device,
        )
        self.declared.require(call, self.name)
        sharding = self.sharding(call.shape.Q)
        found = self.ranks.run(_on_rank, self.vjp, sharding, self.ranks, operands, given)
        for answer in found:
            if isinstance(answer, _Refusal):
                raise Unsupported(answer.reasons, self.name)
        return tuple(sharding.unshard(shards) for shards in zip(*found, strict=True))


def over_ranks(name: str, vjp: Vjp, kind: str, **more: Any) -> Implementation:
    """An implementation over ranks.

    Args:
        name: What it is called.
        vjp: What every rank runs.
        kind: How the sequence is divided.
        more: The other attributes of a :class:`Spread`.
    """
    return Spread(name, vjp, kind, **more).implementation()


# --- on a rank ---


@dataclass(frozen=True)
class _Refusal:
    """What a rank answers that does not support the call."""

    reasons: tuple[str, ...]


def _on_rank(
    comm: Communicator,
    vjp: Vjp,
    sharding: Sharding,
    ranks: Ranks,
    operands: Operands,
    options: dict[str, Any],
) -> tuple[Array, ...] | _Refusal:
    """This rank's shards of ``out`` and, where ``dout`` is given, of ``dq, dk, dv``."""
    arrays = framework(ranks.library)
    places = {name: options[name] for name in PLACES if options.get(name) is not None}
    whole = operands | places
    own = {
        name: sharding.shard(x, comm.rank, axis=-1 if name in places else 1)
        for name, x in whole.items()
    }
    given = arrays.upload(own, ranks.device)
    arrays.poison(given)
    before = {name: arrays.download(x) for name, x in given.items()}
    others = {name: x for name, x in options.items() if name not in PLACES}
    try:
        out, backward = vjp(
            *(given[name] for name in "qkv"),
            comm=comm,
            sharding=sharding,
            **{name: given[name] for name in places},
            **others,
        )
        found = (out, *backward(given["dout"])) if "dout" in given else (out,)
    except Unsupported as refusal:
        return _Refusal(refusal.reasons)
    changed = [name for name, x in given.items() if not same(before[name], arrays.download(x))]
    if changed:
        raise RuntimeError(f"the call changed {', '.join(changed)}")
    return tuple(arrays.download(x) for x in found)

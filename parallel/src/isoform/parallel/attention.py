"""Attention over a sequence that is spread over ranks: one door to every strategy.

Each rank calls with its own shards and gets its own shard of the result, which is that of one rank
with the whole sequence, to rounding. The division is a :class:`~isoform.parallel.Sharding`; causal
masks, windows and documents go by the positions that it says, so any division is right; zigzag and
striped ones share causal work evenly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, cast, get_args

from isoform.parallel import all_gather, hybrid, ring, whole_tiles
from isoform.parallel.arrays import (
    Array,
    astype_of,
    check_array,
    detached,
    device_of,
    is_cupy,
    is_tensor,
)
from isoform.parallel.communicator import Communicator
from isoform.parallel.local import Gradients, Mask
from isoform.parallel.planner import Attended, Plan, Sizes, Topology, plan
from isoform.parallel.sharding import Sharding
from isoform.reference.attention_contract import attention_call, resolve_window
from isoform.reference.contract import Unsupported, dtype_name

Strategy = Literal["auto", "ring", "ulysses", "all_gather", "hybrid"]
Backward = Callable[[Any], Gradients]

PLACES = ("positions", "segments")
"""What a call may say of where its tokens lie; every rank must know it of all."""

SAID = ("sharding", "strategy", "near", "causal", "scale", "deterministic", "differentiated")
"""What else a call says that must be the same on all ranks."""

LOG = logging.getLogger("isoform.parallel")


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    comm: Communicator,
    sharding: Sharding,
    strategy: Strategy = "auto",
    near: int | None = None,
    topology: Topology | None = None,
    causal: bool = False,
    positions: Any = None,
    segments: Any = None,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    deterministic: bool = False,
) -> Any:
    """Attention of this rank's queries to the keys of all ranks.

    Collective: all ranks call it, with the same options and dtypes, each with its own shards.

    Args:
        q: This rank's queries ``[B, L_r, H, D]``: NumPy arrays, or PyTorch tensors (then
            differentiable) in memory that ``comm`` moves, in any float dtype.
        k: Its keys ``[B, L_r, G, D]``; G divides H.
        v: Its values ``[B, L_r, G, D]``.
        comm: The ranks.
        sharding: Which positions each rank has.
        strategy: ``"ring"``, ``"ulysses"``, ``"all_gather"`` or ``"hybrid"``; ``"auto"`` takes the
            one that :func:`explain` finds best, and logs which, and why.
        near: For the hybrid alone: ranks in a group that exchange heads; divides P.
        topology: For ``"auto"``: with one, the shortest time counts, else the fewest bytes.
        causal: No query attends to a later position.
        positions: This rank's shard of the positions, int32 or int64 ``[L_r]`` or ``[B, L_r]``,
            where they are not those of the sharding: for packed documents that count from 0 each.
        segments: This rank's shard of the segment ids, int32 or int64 ``[L_r]`` or ``[B, L_r]``:
            attention stays within a segment, and a negative one is padding.
        window: ``(left, right)``: how many positions before and after its own a query looks, −1
            for no end; a number stands for both sides.
        scale: Factor of the logits; ``D**-0.5`` by default.
        deterministic: Equal calls give equal bits, gradients included, from run to run. With
            ``"all_gather"`` also at every number of ranks and with every sharding: one rank gives
            the bits of eight, given the same processor, libraries and number of threads. That
            costs twice the work in the backward, and memory and bytes for q and dout of all ranks
            (:mod:`isoform.parallel.whole_tiles`). The other strategies add up by rank, so their
            bits are those of their number of ranks and of their sharding.

    Returns:
        ``out [B, L_r, H, D]``, this rank's shard, in q's dtype.

    Raises:
        TypeError: An operand has the wrong dtype.
        ValueError: A shape, option or strategy is wrong; the message names it.
        Unsupported: Operands lie in memory that ``comm`` does not move, or are CuPy's.
        MismatchError: Ranks have come with different calls; raised on all of them.

    Source:
        The strategies' modules name theirs.
    """
    way = (comm, sharding, strategy, near, topology)
    options = (causal, positions, segments, window, scale)
    asked = _Asked(*way, *options, deterministic=deterministic)
    if any(is_tensor(x) and x.requires_grad for x in (q, k, v)):
        from isoform.parallel.torch_function import apply

        return apply(partial(_vjp, asked=replace(asked, differentiated=True)), q, k, v)
    return _vjp(q, k, v, asked)[0]


def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    *,
    comm: Communicator,
    sharding: Sharding,
    strategy: Strategy = "auto",
    near: int | None = None,
    topology: Topology | None = None,
    causal: bool = False,
    positions: Any = None,
    segments: Any = None,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    deterministic: bool = False,
) -> tuple[Any, Backward]:
    """:func:`attention`, and the function that takes its gradient back (a vector-Jacobian product).

    For who puts a backward together by hand: nothing is recorded for autograd.

    Args:
        q, k, v, comm, sharding, strategy, near, topology: As in :func:`attention`.
        causal, positions, segments, window, scale, deterministic: As in :func:`attention`.

    Returns:
        ``out``, and a function of ``dout`` (the gradient of the loss by ``out``, in its shape and
        dtype) that gives ``dq, dk, dv``: this rank's shards, in the shapes and dtype of q, k and v.
        It is collective too, and may be called several times.

    Raises:
        As :func:`attention`.
    """
    way = (comm, sharding, strategy, near, topology)
    options = (causal, positions, segments, window, scale)
    asked = _Asked(*way, *options, deterministic=deterministic, differentiated=True)
    return _vjp(detached(q), detached(k), detached(v), asked)


def explain(
    q: Any,
    k: Any,
    *,
    sharding: Sharding,
    topology: Topology | None = None,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
) -> Plan:
    """What ``strategy="auto"`` makes of a call, and why. Not collective.

    Without a topology the strategy is best whose busiest rank sends fewest bytes, forward and
    backward together; with one, that which takes least time. It follows from sizes alone, so all
    ranks find the same.

    Args:
        q: This rank's queries ``[B, L_r, H, D]``.
        k: Its keys ``[B, L_r, G, D]``.
        sharding, topology, causal, window: As in :func:`attention`.

    Returns:
        Every candidate with its figures, and those that are declined with the reasons. ``str`` of
        it is the line that is logged.

    Raises:
        ValueError: The topology does not join so many ranks, or does not know q's dtype.
    """
    B, _, H, D = q.shape
    sizes = Sizes(B, H, k.shape[2], D, q.dtype.itemsize)
    sides = resolve_window(window, causal)
    return _planned(sharding, sizes, dtype_name(q), Attended(causal, sides), topology)


@lru_cache(maxsize=256)  # a training step makes many calls of few shapes
def _planned(
    sharding: Sharding, sizes: Sizes, dtype: str, attended: Attended, topology: Topology | None
) -> Plan:
    return plan([sharding], sizes, dtype=dtype, attended=attended, topology=topology)


@dataclass(frozen=True)
class _Asked:
    """Everything that a call says but for its arrays of numbers."""

    comm: Communicator
    sharding: Sharding
    strategy: Strategy
    near: int | None
    topology: Topology | None
    causal: bool
    positions: Any
    segments: Any
    window: int | tuple[int, int] | None
    scale: float | None
    deterministic: bool
    differentiated: bool = False

    def plan(self, q: Any, k: Any) -> Plan:
        """What there is to choose from."""
        return explain(
            q,
            k,
            sharding=self.sharding,
            topology=self.topology,
            causal=self.causal,
            window=self.window,
        )

    @property
    def mask(self) -> Mask:
        """Who attends to whom. Collective: masks are computed from all ranks' places."""
        places = {name: self._of_all_ranks(name) for name in PLACES}
        return Mask(
            self.sharding,
            **places,
            causal=self.causal,
            window=self.window,
            scale=self.scale,
            deterministic=self.deterministic,
        )

    def _of_all_ranks(self, name: str) -> tuple[Array, ...] | None:
        """Everybody's positions or segments, where they are given."""
        if (own := getattr(self, name)) is None:
            return None
        own = own.detach().cpu().numpy() if is_tensor(own) else own
        shapes = [(*own.shape[:-1], length) for length in self.sharding.lengths]
        return tuple(self.comm.all_gather(own, shapes, operation=name))

    @property
    def way(self) -> tuple[Callable[..., tuple[Any, Any]], Callable[..., Gradients]]:
        """The strategy's forward and backward."""
        if self.strategy == "all_gather":
            gathering = whole_tiles if self.deterministic else all_gather
            return gathering.forward, gathering.backward
        if self.strategy == "ring":
            alone = [[rank] for rank in range(self.comm.size)]
            return partial(ring.forward, groups=alone), partial(ring.backward, groups=alone)
        near = self.comm.size if self.near is None else self.near
        return partial(hybrid.forward, near=near), partial(hybrid.backward, near=near)


def _vjp(q: Any, k: Any, v: Any, asked: _Asked) -> tuple[Any, Backward]:
    _check_on_all_ranks(q, k, v, asked)
    if asked.strategy == "auto":
        found = asked.plan(q, k)
        if asked.comm.rank == 0:
            LOG.info("%s", found)
        asked = replace(asked, strategy=cast(Strategy, found.best.strategy), near=found.best.near)
    comm, mask = asked.comm, asked.mask
    forward, backward = asked.way
    out, saved = forward(q, k, v, comm=comm, mask=mask)

    def take_back(dout: Any) -> Gradients:
        if tuple(dout.shape) != tuple(out.shape) or dout.dtype != out.dtype:
            raise ValueError(
                f"dout must be like out, {out.dtype} {tuple(out.shape)}, "
                f"got {dout.dtype} {tuple(dout.shape)}"
            )
        found = backward(detached(dout), saved, comm=comm, mask=mask)
        return Gradients(*(astype_of(dx, x) for dx, x in zip(found, (q, k, v), strict=True)))

    return out, take_back


def _check_on_all_ranks(q: Any, k: Any, v: Any, asked: _Asked) -> None:
    """Raise unless the call is right here and the same everywhere.

    A rank that raised alone would leave the others waiting, so all are told what is wrong with one.
    """
    problem: Exception | None = None
    facts: dict[str, Any] = {}
    try:
        call = attention_call(
            q,
            k,
            v,
            causal=asked.causal,
            positions=asked.positions,
            segments=asked.segments,
            window=asked.window,
            scale=asked.scale,
        )
        _check_here(q, k, v, asked)
        chosen = asked.plan(q, k).best.name if asked.strategy == "auto" else asked.strategy
    except (TypeError, ValueError, Unsupported) as error:
        problem = error
    else:
        facts = {name: getattr(call.shape, name) for name in "BHGD"}
        facts |= {"dtype": call.dtype, "library": "torch" if is_tensor(q) else "numpy"}
        for name in PLACES:
            given = getattr(asked, name)
            facts[name] = (
                "none" if given is None else f"{dtype_name(given)} with {len(given.shape)} axes"
            )
        facts["window"] = resolve_window(asked.window)
        for name in SAID:
            facts[name] = str(getattr(asked, name))
        facts["chosen"] = chosen
    try:
        asked.comm.agree(error=None if problem is None else str(problem), **facts)
    finally:
        if problem is not None:
            raise problem


def _check_here(q: Any, k: Any, v: Any, asked: _Asked) -> None:
    """Raise for what attention by itself does not know of."""
    comm, sharding, near = asked.comm, asked.sharding, asked.near
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_array(name, x)
        if is_tensor(x) != is_tensor(q):
            raise TypeError(f"{name} must be of the library of q, got {type(x).__name__}")
        if is_cupy(x):
            remedy = "torch.from_dlpack(x) is its tensor, uncopied"
            raise Unsupported([f"CuPy's arrays ({remedy})"], "isoform.parallel")
        if (device := device_of(x)) not in comm.devices:
            moved = ", ".join(sorted(comm.devices))
            raise Unsupported([f"device {device} ({moved} only)"], "isoform.parallel")
    if asked.strategy not in get_args(Strategy):
        known = ", ".join(get_args(Strategy))
        raise ValueError(f"strategy must be one of {known}, got {asked.strategy!r}")
    if asked.deterministic and asked.strategy == "auto":
        raise ValueError(
            "deterministic=True needs a strategy by name: auto may take another at another number "
            "of ranks, and what it costs the planner does not know"
        )
    if sharding.ranks != comm.size:
        raise ValueError(f"the sharding is for {sharding.ranks} ranks, but there are {comm.size}")
    held = sharding.lengths[comm.rank]
    for name, x in (("q", q), ("k", k)):
        if x.shape[1] != held:
            raise ValueError(
                f"{name} must have the {held} positions of rank {comm.rank} on axis 1, "
                f"got shape {tuple(x.shape)}"
            )
    if (asked.strategy == "hybrid") != (near is not None):
        raise ValueError(f"near is what the hybrid strategy needs, and no other; got near={near}")
    if near is not None and (near < 1 or comm.size % near):
        raise ValueError(f"near must divide the {comm.size} ranks, got near={near}")

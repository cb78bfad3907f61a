"""Faults that sequence-parallel attention has had, or could have: the mutants of the strategies.

Each is a strategy of :mod:`isoform.parallel` with something else in the place of one of its steps,
for as long as a call lasts. The ranks are threads, so the step is replaced for all of them at once.
A label that is lost at the border of a shard is no fault of attention: ``parallel/tests`` has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count, islice
from types import FunctionType
from typing import Any
from unittest.mock import patch

import numpy as np

from isoform.conformance.case import Operands
from isoform.conformance.dtypes import Array, rounded
from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.parallel import STRATEGIES
from isoform.conformance.mutant import Mutant
from isoform.conformance.ranks import Ranks, Spread
from isoform.parallel import Communicator, Sharding, all_gather, hybrid, local, ring, ulysses
from isoform.parallel.arrays import take
from isoform.parallel.communicator import Transfer

Plant = Callable[[], AbstractContextManager[object]]
"""Puts a fault in its place for a while."""


@dataclass(frozen=True)
class Faulty(Spread):
    """A strategy with a fault.

    Attributes:
        plant: Puts it in place.
    """

    plant: Plant = nullcontext

    def _call(self, operands: Operands, options: dict[str, Any]) -> tuple[Array, ...]:
        with self.plant():
            return super()._call(operands, options)


def without_fault(mutant: Mutant) -> Implementation:
    """The same strategy on the same ranks without the fault."""
    spread = mutant.implementation.spread
    assert spread is not None
    name = f"{mutant.name}-mended"
    return Spread(name, spread.vjp, spread.kind, ranks=spread.ranks).implementation()


def _instead(place: Any, **others: Any) -> Plant:
    """Others under these names of a module or class."""

    @contextmanager
    def planted() -> Iterator[None]:
        with ExitStack() as stack:
            for name, other in others.items():
                stack.enter_context(patch.object(place, name, other))
            yield

    return planted


def _seeing(function: Any, **others: Any) -> Any:
    """``function`` itself, but that these names mean others in it."""
    return FunctionType(
        function.__code__,
        {**function.__globals__, **others},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


# Faults that take more than a line. What they stand in for is looked up now, before it is replaced.

_attend, _merge, _visits = local.attend, local.merge, ring._visits


def _stale_visits(k: Any, v: Any, *rest: Any) -> Any:
    """The own keys and values again and again, whosever turn it is."""
    return ((owner, k, v) for owner, *_ in _visits(k, v, *rest))


def _all_but_the_last(k: Any, v: Any, comm: Communicator, *rest: Any) -> Any:
    return islice(_visits(k, v, comm, *rest), max(comm.size - 1, 1))


def _counted(mask: local.Mask, ranks: Any) -> Array:
    """Positions as if every shard were one piece of the sequence."""
    plain = Sharding.contiguous(mask.sharding.length, mask.sharding.ranks)
    return np.concatenate([plain.positions(rank) for rank in ranks])


def _restarted(mask: local.Mask, ranks: Any) -> Array:
    """Every shard counts from 0."""
    return np.concatenate([np.arange(mask.sharding.lengths[rank]) for rank in ranks])


def _base_two(*operands: Any) -> Any:
    out, lse = _attend(*operands)
    return out, lse / np.log(2).astype(lse.dtype)


def _unrescaled(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """What is there already is not rescaled to the new sum."""
    weighed, lse = _merge(np.zeros_like(out_a), lse_a, out_b, lse_b)
    return out_a + weighed, lse


def _narrow_merge(*parts: Array) -> tuple[Array, Array]:
    """The output is held in bfloat16 while it is summed."""
    out, lse = _merge(*parts)
    return rounded(out, "bfloat16"), lse


def _narrow_sum(total: Any, part: Array) -> Array:
    """Gradients are held in bfloat16 while they are summed."""
    return rounded(total + part, "bfloat16")


def _careless_merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """−inf minus −inf where neither part has a key."""
    with np.errstate(all="ignore"):
        lse = np.logaddexp(lse_a, lse_b)
        weights = [np.exp(part - lse).swapaxes(-1, -2)[..., None] for part in (lse_a, lse_b)]
        return weights[0] * out_a + weights[1] * out_b, lse


def _own_part(comm: Communicator, parts: Any, **_: Any) -> Any:
    """A split where there should be a reduce-scatter: what others have found is lost."""
    return parts[comm.rank].copy()


def _first_copy(dx: Array, shard: Any) -> Array:
    """The gradient of one of the query heads that share a key/value head, not of all of them."""
    if shard.copies is None:
        return dx
    first = [int(np.argmax(shard.copies == place)) for place in range(len(shard.groups))]
    return dx[:, :, first]


def _of_the_last_rank(x: Any, parts: Any, lengths: Any, comm: Communicator) -> Any:
    """Where ranks share a key/value head, one's gradients overwrite the others'."""
    found = _seeing(_to_positions, shared=lambda parts: False)(x, parts, lengths, comm)
    last = {head: n for n, head in enumerate(head for part in parts for head in part)}
    return take(found, np.array([last[head] for head in sorted(last)], int), 2)


_to_positions = ulysses.to_positions


def _in_order_of_ranks(x: Any, comm: Communicator, mask: local.Mask) -> Any:
    """Gathered shards are put one after the other, as if they lay so in the sequence."""
    shapes = [(x.shape[0], length, *x.shape[2:]) for length in mask.sharding.lengths]
    return np.concatenate(comm.all_gather(x, shapes), axis=1)


def _unsent(size: int) -> Callable[..., Transfer]:
    """What arrives is thrown away; the buffer holds what it held."""

    def pass_on(held: Any, owner: int, comm: Communicator, mask: Any, *rest: Any) -> Transfer:
        length = mask.length(rest[0][(owner - 1) % comm.size])
        shapes = [(x.shape[0], length, *x.shape[2:]) for x in held]
        return Transfer(lambda: None, [np.zeros(s, held[0].dtype) for s in shapes])

    return pass_on


def _never_received(comm: Communicator, sends: Any, receives: Any, **more: Any) -> Any:
    """The first rank sends nothing to anybody."""
    sends = [] if comm.rank == 0 and more.get("operation") != "agree" else sends
    return _exchange(comm, sends, receives, **more)


_exchange = Communicator.exchange


def _one_raises(comm: Communicator, *_: Any, **__: Any) -> Any:
    if comm.rank == comm.size - 1:
        raise ArithmeticError("planted on the last rank")
    return comm.barrier()


def _written_to(q: Any, *rest: Any) -> Any:
    """The scale is multiplied into q where it lies."""
    q *= q.dtype.type(0.5)
    return _attend(q, *rest)


def _never_twice_the_same() -> Callable[..., Any]:
    """An order of summation that changes from call to call, as that of atomic additions."""
    calls = count()

    def attend(q: Any, k: Any, v: Any, options: Any) -> Any:
        turn = 1 + next(calls) % 3
        places = {
            name: np.roll(x, turn, axis=-1) if name.startswith("key_") else x
            for name, x in options.items()
        }
        return _attend(q, np.roll(k, turn, axis=1), np.roll(v, turn, axis=1), places)

    return attend


def _all_logits(q: Any, k: Any, v: Any, options: Any) -> Any:
    """All logits of a shard are made, and their exponentials, if only to look at them."""
    logits = np.einsum("bqhd,bkhd->bhqk", q, np.repeat(k, q.shape[2] // k.shape[2], axis=2))
    held = (logits, np.exp(-np.abs(logits)))
    found = _attend(q, k, v, options)
    del held
    return found


def _mutants() -> Iterator[Mutant]:
    def mutant(
        name: str, fault: str, way: str, killed_by: str, case: str, plant: Plant, ranks: int = 4
    ) -> Mutant:
        strategy, kind = way.rsplit("-", 1)
        called = f"parallel-mutant-{name}"
        vjp = STRATEGIES[strategy]
        faulty = Faulty(called, vjp, kind, ranks=Ranks(ranks), plant=plant)
        return Mutant(faulty.implementation(), fault, killed_by, case and f"attention/{case}")

    yield mutant(
        "stale-keys",
        "the backward goes round the ring with the rank's own keys and values",
        "ring-zigzag",
        "dq/condition",
        "scale/fp32/1",
        _instead(ring, backward=_seeing(ring.backward, _visits=_stale_visits)),
    )
    yield mutant(
        "keys-not-passed-on",
        "what arrives from the rank before is not used",
        "ring-contiguous",
        "out/condition",
        "mask/fp32/bare",
        _instead(ring, _pass_on=_unsent(4)),
    )
    yield mutant(
        "split",
        "a gather's gradient is a split, not a reduce-scatter",
        "all-gather-contiguous",
        "dk/condition",
        "mask/fp32/bare",
        _instead(Communicator, reduce_scatter=_own_part),
    )
    yield mutant(
        "zigzag-positions",
        "zigzag shards are masked as if they were contiguous",
        "ring-zigzag",
        "out/condition",
        "scale/fp32/1",
        _instead(local.Mask, _places=_counted),
    )
    yield mutant(
        "striped-positions",
        "striped shards are masked as if they were contiguous",
        "ulysses-striped",
        "out/condition",
        "mask/fp32/window",
        _instead(local.Mask, _places=_counted),
    )
    yield mutant(
        "positions-restarted",
        "every shard counts its positions from 0",
        "hybrid-contiguous",
        "out/condition",
        "mask/fp32/causal",
        _instead(local.Mask, _places=_restarted),
    )
    yield mutant(
        "gathered-in-order-of-ranks",
        "gathered shards are not put into the order of the sequence",
        "all-gather-zigzag",
        "out/condition",
        "mask/fp32/causal",
        _instead(all_gather, gathered=_in_order_of_ranks),
    )
    yield mutant(
        "base-two",
        "lse is to the base 2 where merging takes it to be to the base e",
        "ring-striped",
        "out/condition",
        "mask/fp32/bare",
        _instead(local, attend=_base_two),
    )
    yield mutant(
        "unrescaled",
        "what was merged before is not rescaled",
        "ring-contiguous",
        "out/condition",
        "mask/fp32/bare",
        _instead(local, merge=_unrescaled),
    )
    yield mutant(
        "merged-to-nan",
        "merging two parts without a key gives NaN",
        "ring-contiguous",
        "out/pattern",
        "values/fp32/all-padding",
        _instead(local, merge=_careless_merge),
    )
    yield mutant(
        "last-block",
        "the last shard of keys that comes by is not attended to",
        "ring-contiguous",
        "out/condition",
        "mask/fp32/bare",
        _instead(ring, _visits=_all_but_the_last),
    )
    yield mutant(
        "one-query-head",
        "dk and dv are of one query head of those that share a key/value head",
        "ulysses-contiguous",
        "dk/condition",
        "ranks-heads-12-6/fp64/causal",
        _instead(hybrid, summed_copies=_first_copy),
    )
    yield mutant(
        "one-rank",
        "dk and dv are of one rank of those that share a key/value head",
        "ulysses-zigzag",
        "dv/condition",
        "ranks-heads-3-1/fp32/bare",
        _instead(hybrid, to_positions=_of_the_last_rank),
    )
    yield mutant(
        "bfloat16-output",
        "the output is summed in bfloat16 on its way round the ring",
        "ring-zigzag",
        "out/condition",
        "mask/fp32/causal",
        _instead(local, merge=_narrow_merge),
    )
    yield mutant(
        "bfloat16-output-of-bfloat16",
        "the same, where operands are bfloat16 too",
        "ring-zigzag",
        "out/twin_mean",
        "mask/bf16/bare",
        _instead(local, merge=_narrow_merge),
        ranks=8,
    )
    yield mutant(
        "bfloat16-gradients",
        "dk and dv are summed in bfloat16 on their way round the ring",
        "ring-zigzag",
        "dk/condition",
        "mask/fp32/causal",
        _instead(local, add=_narrow_sum),
    )
    yield mutant(
        "no-message",
        "a rank sends nothing: the others would wait for ever",
        "ring-contiguous",
        "case",
        "mask/fp32/bare",
        _instead(Communicator, exchange=_never_received),
    )
    yield mutant(
        "one-raises",
        "one rank raises where the others go on",
        "ring-contiguous",
        "case",
        "mask/fp32/bare",
        _instead(ring, forward=lambda q, k, v, comm, **more: _one_raises(comm)),
    )
    yield mutant(
        "written-to",
        "a rank changes its own shard of q",
        "ring-contiguous",
        "case",
        "mask/fp32/bare",
        _instead(local, attend=_written_to),
    )
    yield mutant(
        "any-order",
        "sums in another order each time, declared deterministic",
        "ring-zigzag",
        "determinism",
        "mask/fp32/causal",
        _instead(local, attend=_never_twice_the_same()),
    )
    yield mutant(
        "not-linear",
        "declares linear memory and makes all logits of a shard",
        "ring-contiguous",
        "memory/growth",
        "",
        _instead(local, attend=_all_logits),
    )


MUTANTS: tuple[Mutant, ...] = tuple(_mutants())

"""Shrink: the smallest call that still fails as a given one does.

A failing case is a large array of random numbers; what it fails *of* is seldom seen in it. Here it
is cut down, axis by axis and operand by operand, for as long as the same check still fails. The
search is hypothesis's: every choice below is a number whose small values are the simpler calls, and
hypothesis lowers them, alone and together. The choices are

- for every axis, which stretch of it is kept: the last index, then the first;
- for every operand, what it holds: zeros, ones, its own numbers rounded to integers, its own;
- whether each optional operand, and each option, is there at all;
- whether the operands lie as they did or contiguously.

Operands are cut out of those of the case, not drawn anew, so that a fault that few numbers show is
not lost. This works alike for every operation, and for calls captured in a running model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, assume, find, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from isoform.conformance.case import Case, Operands
from isoform.conformance.dtypes import FORMATS, Array
from isoform.conformance.implementation import Implementation
from isoform.conformance.judge import judge
from isoform.conformance.operation import RecordedCase
from isoform.conformance.operations import OPERATIONS
from isoform.conformance.replay import cases as recorded_cases
from isoform.conformance.replay import laid_out, write
from isoform.conformance.signatures import Signature
from isoform.conformance.verdicts import GROUPS, Outcome, Verdict
from isoform.reference.contract import Call

WHOLE = 12
"""A choice is drawn from a range this much longer than its values, and all that is beyond counts as
the last: the case as it is. So one draw in a few is the case itself, which is known to fail, and
hypothesis has something to lower."""

EXAMPLES = 400
"""Calls tried at most before the first that fails; how long it is lowered is a matter of time."""

CONTENTS: dict[str, Callable[[Array], Array]] = {
    "zeros": np.zeros_like,
    "ones": np.ones_like,
    "integers": lambda x: np.rint(x.astype(np.float64)).astype(x.dtype),
    "its own numbers": lambda x: x,
}
"""What a float operand may hold, the simplest first."""


class Passes(Exception):
    """There is nothing to shrink: the implementation passes the case."""


@dataclass(frozen=True)
class Shrunk:
    """A failing call that has been cut down.

    Attributes:
        case: The call; it brings its operands with it.
        check: The check that fails, by its full name.
        outcome: What the judge says of it.
        contents: What each operand holds (:data:`CONTENTS`), by name.
        origin: Id of the case that it was cut out of.
        tried: How many calls were judged.
        seconds: How long that took.
        ended: Whether the search came to its end; if not, a smaller call may be found.
    """

    case: RecordedCase
    check: str
    outcome: Outcome
    contents: dict[str, str]
    origin: str
    tried: int
    seconds: float
    ended: bool

    def as_json(self) -> dict[str, Any]:
        """Plain data, for scripts."""
        return {
            "origin": self.origin,
            "check": self.check,
            "message": self.outcome.message,
            "operation": self.case.operation,
            "dtype": self.case.dtype,
            "shape": vars(self.case.shape),
            "options": {name: repr(x) for name, x in self.case.options},
            "operands": self.contents,
            "tried": self.tried,
            "seconds": round(self.seconds, 1),
            "ended": self.ended,
        }


def shrink(
    implementation: Implementation,
    case: Case,
    *,
    check: str = "",
    device: str = "cpu",
    architecture: str = "",
    seconds: float = 60.0,
    progress: Callable[[str], None] = lambda what: None,
) -> Shrunk:
    """Cut ``case`` down to the smallest call on which ``implementation`` fails the same check.

    Args:
        implementation: Who fails; it offers the case's operation.
        case: A case that it fails, drawn or captured.
        check: The check to keep, such as ``out/condition``; the first that fails if not said.
        device: Where to run.
        architecture: The GPU's architecture, where it is one.
        seconds: How long to search at most.
        progress: Called with the sizes of each smaller call that still fails.

    Raises:
        Passes: The implementation passes the case, or that check of it.
    """
    start = time.monotonic()
    ask = partial(judge, implementation, device=device, architecture=architecture, large=True)
    judged = ask(case)
    failing = {name: outcome for outcome in judged for name in outcome.failed_checks}
    if not failing:
        if all(outcome.verdict is Verdict.UNSUPPORTED for outcome in judged):
            raise Passes(f"{implementation.name} does not do {case.id}: {judged[0].message}")
        raise Passes(f"{implementation.name} passes {case.id}")
    check = check or next(iter(failing))
    if check not in failing:
        raise Passes(
            f"{implementation.name} passes {check} of {case.id}; it fails {', '.join(failing)}"
        )
    groups = [group for group in GROUPS if group == failing[check].group]
    operands = OPERATIONS[case.operation].operands(case)
    best: tuple[_Size, RecordedCase, Outcome, dict[str, str]] | None = None
    tried = 0

    def fails(candidate: _Candidate) -> bool:
        nonlocal best, tried
        if time.monotonic() - start > seconds:
            raise _OutOfTime
        tried += 1
        outcomes = ask(candidate.case, groups=groups)
        outcome = next((each for each in outcomes if check in each.failed_checks), None)
        if outcome is None:
            return False
        if best is None or candidate.size < best[0]:
            best = candidate.size, candidate.case, outcome, candidate.contents
            progress(f"{candidate.case.shape}")
        return True

    ended = False
    try:
        find(
            _candidates(case, operands, of_gradients=check.startswith("d")),
            fails,
            settings=settings(
                max_examples=EXAMPLES,
                database=None,
                deadline=None,
                derandomize=True,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            ),
        )
        ended = True
    except (_OutOfTime, HypothesisException, KeyboardInterrupt):
        pass  # what has been found until then is good
    if best is None:  # not even as it is: the check fails now and then
        best = _Size.of(operands), _recorded(case, operands), failing[check], {}
    return Shrunk(best[1], check, best[2], best[3], case.id, tried, time.monotonic() - start, ended)


def save(found: Shrunk, path: Path) -> Case:
    """Write a shrunk call to ``path``, to be judged again with ``isoform replay``.

    Returns:
        The case that the file holds.
    """
    held = ", ".join(f"{name}: {what}" for name, what in found.contents.items())
    notes = [f"shrunk from {found.origin}, where {found.check} fails", held]
    write(path, found.case, found.case.load(), notes=[note for note in notes if note])
    return next(iter(recorded_cases(path).values()))


class _OutOfTime(BaseException):
    """The search has taken as long as it may. Not an Exception, which hypothesis would keep."""


@dataclass(frozen=True, order=True)
class _Size:
    """How large a call is: by its elements, then by what they hold."""

    elements: int
    operands: int
    contents: int

    @classmethod
    def of(cls, operands: Operands, contents: int = 0) -> _Size:
        return cls(sum(x.size for x in operands.values()), len(operands), contents)


@dataclass(frozen=True)
class _Candidate:
    """A call that is cut out of a case."""

    case: RecordedCase
    size: _Size
    contents: dict[str, str]


def _up_to(last: int) -> st.SearchStrategy[int]:
    """0 … ``last``: simpler the smaller, but mostly ``last``."""
    return st.integers(0, WHOLE * last).map(lambda n: min(n, last))


@st.composite
def _candidates(
    draw: st.DrawFn, case: Case, operands: Operands, *, of_gradients: bool
) -> _Candidate:
    """The calls that can be cut out of ``case``."""
    operation = OPERATIONS[case.operation]
    signature = operation.signature
    kept = {}
    for axis, size in vars(case.shape).items():
        stop = draw(_up_to(max(size - 1, 0)))
        before = min(draw(_up_to(max(size - 1, 0))), stop)
        kept[axis] = np.arange(stop - before, stop + 1) if size else np.arange(0)
    present = {
        name: x
        for name, x in operands.items()
        if name in (*signature.required, "dout") or draw(_up_to(1))
    }
    options = tuple(option for option in case.options if draw(_up_to(1)))
    as_laid_out = draw(_up_to(1))
    changes = {
        name: list(_changes(name, x, signature, of_gradients=of_gradients))
        for name, x in present.items()
    }
    levels = {name: draw(_up_to(len(changes[name]) - 1)) for name in present}
    if "G" in kept and len(kept["G"]):
        kept["H"] = _heads(kept["G"], kept["H"], case.shape.H // case.shape.G)

    def cut_out() -> tuple[Operands, Call]:
        cut = {}
        for name, x in present.items():
            axes = case.shape.axes[name if name != "dout" else "out"].split()[-x.ndim :]
            piece = _cut(x, [kept.get(axis, np.arange(1)) for axis in axes])
            changed = changes[name][levels[name]][1](piece)
            lies = piece.strides if as_laid_out and min(piece.strides, default=0) >= 0 else None
            cut[name] = np.ascontiguousarray(changed) if lies is None else laid_out(changed, lies)
        given = {name: x for name, x in cut.items() if name != "dout"}
        return cut, signature.check(**given, **dict(options))

    try:
        try:
            cut, asked = cut_out()
        except ValueError:
            if "Q" not in kept or case.shape.Q != case.shape.K:
                raise
            kept["K"] = kept["Q"]  # some calls have as many queries as keys
            cut, asked = cut_out()
    except (TypeError, ValueError):
        assume(False)  # it cannot be cut like that
    smaller = replace(
        _plain(case),
        shape=asked.shape,
        operands=asked.operands,
        options=options,
        values="captured",
    )
    complexity = sum(levels.values()) + len(options) + as_laid_out
    contents = {name: changes[name][level][0] for name, level in levels.items()}
    return _Candidate(_recorded(smaller, cut), _Size.of(cut, complexity), contents)


def _heads(groups: Array, drawn: Array, per_group: int) -> Array:
    """The query heads of the kept key heads: of each as many as fit what was drawn for H."""
    some = max(1, min(per_group, len(drawn) // max(len(groups), 1)))
    return np.concatenate([g * per_group + np.arange(some) for g in groups])


def _cut(x: Array, indices: list[Array]) -> Array:
    """The part of ``x`` at the product of ``indices``: a view wherever they are stretches."""
    for axis, index in enumerate(indices):
        stretch = bool(np.all(np.diff(index) == 1))
        chosen: Any = slice(int(index[0]), int(index[-1]) + 1) if stretch and len(index) else index
        x = x[(slice(None),) * axis + (chosen,)]
    return x


def _changes(
    name: str, x: Array, signature: Signature, *, of_gradients: bool
) -> Iterator[tuple[str, Callable[[Array], Array]]]:
    """What operand ``name`` may hold, the simplest first."""
    if x.dtype == bool:
        yield "all true", np.ones_like
    elif x.dtype.kind in "iu":
        yield (
            "0, 1, 2 …",
            lambda x: np.broadcast_to(np.arange(x.shape[-1]), x.shape).astype(x.dtype),
        )
    else:
        for called, change in CONTENTS.items():
            # a cotangent of zeros says nothing; and without gradients, what it holds is not asked
            if name == "dout" and called == "zeros":
                continue
            yield called, change
            if name == "dout" and not of_gradients:
                return
        return
    yield "its own numbers", lambda x: x


def _plain(case: Case) -> Case:
    """``case`` without what binds it to where its operands came from."""
    fields = {key: value for key, value in vars(case).items() if key != "load"}
    short = FORMATS[case.dtype].short
    fields |= {"id": f"captured/shrunk/{short}/call-0000", "note": f"cut out of {case.id}"}
    return Case(**fields)


def _recorded(case: Case, operands: Operands) -> RecordedCase:
    """``case`` with these operands."""
    plain = {key: value for key, value in vars(case).items() if key != "load"}

    def load() -> Operands:
        """Copies: whom the operands are given to may write to them."""
        return {
            name: x.copy() if x.flags.c_contiguous else laid_out(x, x.strides)
            for name, x in operands.items()
        }

    return RecordedCase(**plain, load=load)

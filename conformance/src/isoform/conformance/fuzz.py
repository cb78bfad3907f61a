"""Fuzz: random calls, valid and invalid, until time is up; what goes wrong is kept.

The cases of the suite are chosen by people who know where kernels break. Here calls are drawn: a
case is taken at random and its sizes and dtype are changed, so that recipes of values, masks,
options and layouts meet on sizes that nobody thought of. Every few calls one is made wrong: an axis
too short, one too many, another dtype; the contract says what that must raise.

Everything happens in a process of its own, which may die or hang; the one that watches it draws the
same call again from seed and number, writes its operands to a file, and goes on with the next one
in a new process. Found are

- ``crash``: the process was killed by a signal;
- ``hang``: a call did not return in time;
- ``out-of-bounds write``: a guard band around an operand or an array made during the call was
  written to (:mod:`~.guards`);
- ``wrong``, ``error``, ``bad refusal``, ``broken declaration``: as the judge says. The statistical
  part of the budget is not looked at, which was measured on the suite's own cases;
- ``invalid call``: a wrong call did not raise what it must.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from isoform.conformance.case import Case
from isoform.conformance.dtypes import FORMATS
from isoform.conformance.frameworks import Framework, framework
from isoform.conformance.guards import Guards
from isoform.conformance.implementation import Implementation
from isoform.conformance.judge import judge
from isoform.conformance.operation import Operation
from isoform.conformance.operations import OPERATIONS
from isoform.conformance.registry import find
from isoform.conformance.replay import write
from isoform.conformance.summary import messages
from isoform.conformance.verdicts import Outcome

LARGEST = 200_000
"""No array of a drawn call is larger: a call and its oracle take some tens of milliseconds."""

INVALID_EVERY = 4
"""One call in so many is made wrong."""

UNCHOSEN = 0.1
"""Of so many calls it is not asked whether they are supported: refusals are looked at too."""

LEEWAY = 4.0
"""An error is a finding beyond this much of its budget. The constants were measured on the suite's
own cases; among thousands of others some honest error is a little larger."""

START_LIMIT = 300.0
"""Seconds that the other process may take to load the implementation."""

KEPT = 3
"""Calls that are kept of those that go wrong in the same way; all are counted."""

CRASH, HANG, OUT_OF_BOUNDS, INVALID = "crash", "hang", "out-of-bounds write", "invalid call"


@dataclass(frozen=True)
class Finding:
    """A call that went wrong.

    Attributes:
        kind: As in the head of this module.
        operation: The operation that was called.
        check: Which check saw it; for a wrong call, what was wrong with it.
        message: What happened, in a sentence.
        number: Which of the drawn calls it is.
        case: The case's id.
        file: Where the operands were written; empty where there are enough of its like.
    """

    kind: str
    operation: str
    check: str
    message: str
    number: int
    case: str
    file: str = ""

    @property
    def like(self) -> tuple[str, str, str]:
        """What findings that are alike have in common."""
        return self.kind, self.operation, self.check


@dataclass(frozen=True)
class Fuzzed:
    """What a fuzz run came to.

    Attributes:
        implementation: Whom.
        seed: What all calls are drawn from.
        calls: How many were made.
        invalid: How many of them were wrong calls.
        refused: How many valid ones were declined, as declared.
        seconds: How long it took.
        findings: Those that were kept.
        counts: How many calls went wrong in each way, kept or not.
        interrupted: Whether the user ended it.
    """

    implementation: str
    seed: int
    calls: int
    invalid: int
    refused: int
    seconds: float
    findings: tuple[Finding, ...] = ()
    counts: dict[tuple[str, str, str], int] = field(default_factory=dict)
    interrupted: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain data, for scripts."""
        found = asdict(self) | {"findings": [asdict(finding) for finding in self.findings]}
        found["counts"] = [
            {"kind": kind, "operation": operation, "check": check, "calls": n}
            for (kind, operation, check), n in self.counts.items()
        ]
        return found


# Drawing


def draw(implementation: Implementation, seed: int, number: int, device: str = "cpu") -> Case:
    """The call ``number`` of a run: always the same one for a seed."""
    rng = np.random.default_rng([seed, number])
    offered = implementation.offers[int(rng.integers(len(implementation.offers)))]
    operation = OPERATIONS[offered.operation]
    cases = [case for case in operation.cases.values() if not case.large]
    whichever = rng.random() < UNCHOSEN
    while True:
        case = _changed(cases[int(rng.integers(len(cases)))], rng, f"random-{seed}-{number}")
        call = operation.call_for(case, device=device)
        if not whichever and offered.capabilities.unsupported_reasons(call):
            continue
        if case.shape.largest <= LARGEST and _can_be_drawn(operation, case):
            return case


def _changed(case: Case, rng: np.random.Generator, name: str) -> Case:
    """``case`` with other sizes, and at times another dtype."""
    sizes = dict(vars(case.shape))
    for axis, size in sizes.items():
        if rng.random() < 0.6:
            sizes[axis] = _size(rng) if axis in ("Q", "K", "L", "D") else int(rng.integers(1, 5))
        else:
            sizes[axis] = size
    if "Q" in sizes and case.shape.Q == case.shape.K and rng.random() < 0.5:
        sizes["K"] = sizes["Q"]
    if sizes.get("G"):
        sizes["H"] = sizes["G"] * int(rng.integers(1, 4))
    dtypes = sorted({each.dtype for each in OPERATIONS[case.operation].cases.values()})
    dtype = dtypes[int(rng.integers(len(dtypes)))] if rng.random() < 0.4 else case.dtype
    operation, _, _, variant = case.id.split("/")
    return replace(
        case,
        id=f"{operation}/{name}/{FORMATS[dtype].short}/{variant}",
        shape=type(case.shape)(**sizes),
        dtype=dtype,
        tags=frozenset({"random"}),
    )


def _size(rng: np.random.Generator) -> int:
    """A length or a head dim: small, beside a tile's edge, or any."""
    kind = rng.random()
    if kind < 0.3:
        return int(rng.integers(0, 9))
    if kind < 0.7:
        return max(0, int(rng.choice((16, 32, 64, 128, 192, 256)) + rng.integers(-1, 2)))
    return int(rng.integers(1, 300))


def _can_be_drawn(operation: Operation, case: Case) -> bool:
    """Whether the case's recipes work on its sizes, and the call is one of the contract."""
    try:
        operands = operation.operands(case)
        given = {name: x for name, x in operands.items() if name != "dout"}
        asked = operation.signature.check(**given, **dict(case.options))
    except (IndexError, TypeError, ValueError):
        return False
    return bool(asked.shape == case.shape and asked.operands == case.operands)


Spoil = tuple[str, dict[str, Any]]


def spoiled(operands: dict[str, Any], rng: np.random.Generator, library: Framework) -> Spoil:
    """Arguments of which one is wrong, and what is wrong with it in a few words."""
    names = [name for name in operands if name != "dout" and hasattr(operands[name], "shape")]
    name = names[int(rng.integers(len(names)))]
    x = operands[name]
    changes: list[tuple[str, Callable[[Any], Any]]] = [
        ("an axis too many", lambda x: x[None]),
        ("another dtype", library.other_dtype),
    ]
    if x.shape and x.shape[0]:
        changes.append(("an axis missing", lambda x: x[0]))
    for axis, size in enumerate(x.shape):
        if size:
            changes += [
                (f"axis {axis} too short", partial(_resized, axis=axis, index=slice(0, -1))),
                (f"axis {axis} too long", partial(_resized, axis=axis, index=[0, *range(size)])),
            ]
    what, change = changes[int(rng.integers(len(changes)))]
    return f"{name}: {what}", {**operands, name: change(x)}


def _resized(x: Any, *, axis: int, index: Any) -> Any:
    return x[(*(slice(None),) * axis, index)]


# In the process that may die


def _work(
    connection: Connection, name: str, options: dict[str, Any], seed: int, device: str, trace: str
) -> None:
    """Make the calls whose numbers come in, and send back what went wrong of each."""
    with Path(trace).open("w") as said:
        faulthandler.enable(said)
        implementation = find(name, **options)
        connection.send("ready")
        while (number := connection.recv()) is not None:
            connection.send(_attempt(implementation, seed, number, device))


def _attempt(
    implementation: Implementation, seed: int, number: int, device: str
) -> tuple[str, list[Finding]]:
    """One call: of what sort it was, and what went wrong."""
    case = draw(implementation, seed, number, device)
    offered = implementation.of(case.operation)
    assert offered is not None
    library = framework(offered.framework)
    call = OPERATIONS[case.operation].call_for(case, device=device)
    declined = bool(offered.capabilities.unsupported_reasons(call))
    if number % INVALID_EVERY == INVALID_EVERY - 1 and not declined:
        found = _wrong_call(offered, case, library, seed, number, device)
        return "invalid", found
    found = [] if declined else _guarded_call(offered, case, library, number, device)
    found += [
        Finding(str(outcome.verdict), case.operation, check, message, number, case.id)
        for outcome in judge(
            implementation, case, groups=("conformance", "gradients"), device=device
        )
        if outcome.verdict.fails
        for check, message in messages(outcome)
        if not _within_leeway(outcome, check)
    ]
    return "refused" if declined else "valid", found


def _within_leeway(outcome: Outcome, check: str) -> bool:
    parts = {f"{outcome.check}/{part.name}": part for part in outcome.parts}
    part = parts.get(check)
    return part is not None and part.name == "condition" and part.figure <= LEEWAY * part.limit


def _guarded_call(
    offered: Implementation, case: Case, library: Framework, number: int, device: str
) -> list[Finding]:
    """The call between guard bands, every other time with its backward. What it returns, or raises,
    is the judge's to look at.
    """
    operation = OPERATIONS[case.operation]
    capabilities = offered.capabilities
    guards = Guards(offered.framework)
    operands = {
        name: guards.around(x, name)
        for name, x in library.upload(operation.operands(case), device).items()
    }
    wanted = operation.differentiable(case) if case.differentiate and number % 2 else ()
    gradients = [name for name in wanted if name in capabilities.gradients]
    try:
        with guards.allocations():
            library.run(
                offered, operands, dict(case.options), lse=capabilities.lse, gradients=gradients
            )
    except Exception as exception:  # the judge makes the same call and says what is wrong with it
        del exception
    return [
        Finding(OUT_OF_BOUNDS, case.operation, "guard", touched, number, case.id)
        for touched in guards.touched()
    ]


def _wrong_call(
    offered: Implementation, case: Case, library: Framework, seed: int, number: int, device: str
) -> list[Finding]:
    """A call that is wrong in one way must raise what the contract raises."""
    operation = OPERATIONS[case.operation]
    rng = np.random.default_rng([seed, number, 1])
    operands = library.upload(operation.operands(case), device)
    while True:
        what, arguments = spoiled(operands, rng, library)
        given = {name: x for name, x in arguments.items() if name != "dout"}
        try:
            operation.signature.check(**given, **dict(case.options))
        except (TypeError, ValueError) as said:
            wanted = type(said)
            break
    try:
        library.run(offered, arguments, dict(case.options), lse=False, gradients=[])
    except wanted:
        return []
    except Exception as exception:
        raised = f"raised {type(exception).__name__}: {exception}".splitlines()[0]
    else:
        raised = "returned"
    message = f"{what}: must raise {wanted.__name__}, {raised}"
    return [Finding(INVALID, case.operation, what, message, number, case.id)]


# In the process that watches


class _Died(Exception):
    """The worker was killed; the message says by what, and where it was."""


class _Hung(Exception):
    """The worker did not answer in time."""


class _Worker:
    """The process that makes the calls."""

    def __init__(self, name: str, options: dict[str, Any], seed: int, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        handle, self.trace = tempfile.mkstemp(prefix="isoform-fuzz-", suffix=".txt")
        os.close(handle)
        self.connection, other = context.Pipe()
        self.process = context.Process(
            target=_work, args=(other, name, options, seed, device, self.trace), daemon=True
        )
        # Ctrl-C is for the one who watches: a process starts with what is ignored at that time
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
        other.close()

    def ask(self, number: int | None, limit: float) -> Any:
        """What it answers to ``number``; with None, to nothing."""
        try:
            if number is not None:
                self.connection.send(number)
            if not self.connection.poll(limit):
                raise _Hung(f"did not return in {limit:g} s")
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise _Died(self._death()) from None

    def _death(self) -> str:
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        lines = Path(self.trace).read_text(errors="replace").splitlines()
        frames = [line.strip() for line in lines if line.lstrip().startswith("File ")]
        return f"the process {how}{f', in {frames[0]}' if frames else ''}"

    def end(self) -> None:
        """Leave nothing behind."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        Path(self.trace).unlink(missing_ok=True)


@contextmanager
def _ended(holder: list[_Worker]) -> Iterator[None]:
    try:
        yield
    finally:
        for worker in holder:
            worker.end()


def fuzz(
    implementation: Implementation,
    name: str,
    *,
    seconds: float,
    seed: int,
    directory: Path,
    options: dict[str, Any] | None = None,
    device: str = "cpu",
    limit: float = 60.0,
    only: int | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Fuzzed:
    """Draw calls for ``implementation`` until time is up, or the user ends it.

    Args:
        implementation: Whom; loaded here too, to draw what it offers.
        name: What it is found by: the other process loads it by this.
        seconds: How long.
        seed: What the calls are drawn from.
        directory: Where the operands of what goes wrong are written.
        options: As :func:`isoform.conformance.registry.find` takes them.
        device: Where to run.
        limit: Seconds that a call, and what is asked about it, may take.
        only: Make this one call and no other.
        progress: Called with a line before each call.

    Raises:
        RuntimeError: The other process cannot load it.
    """
    begun: float | None = None  # when the first process was ready
    counted: Counter[str] = Counter()
    counts: Counter[tuple[str, str, str]] = Counter()
    kept: list[Finding] = []
    interrupted = False
    number = only or 0

    def keep(findings: Sequence[Finding]) -> None:
        for finding in findings:
            counts[finding.like] += 1
            if counts[finding.like] <= KEPT:
                kept.append(_saved(finding, implementation, seed, directory, device))

    workers: list[_Worker] = []
    with _ended(workers):
        try:
            while only is None or number == only:
                if not workers:
                    workers.append(_Worker(name, options or {}, seed, device))
                    try:
                        workers[0].ask(None, START_LIMIT)
                    except (_Died, _Hung) as end:
                        raise RuntimeError(f"{name} cannot be loaded: {end}") from None
                begun = begun or time.monotonic()
                if time.monotonic() - begun >= seconds:
                    break
                progress(f"{name} call {number}, {sum(counts.values())} went wrong")
                try:
                    sort, findings = workers[0].ask(number, limit)
                    keep(findings)
                except (_Died, _Hung) as end:
                    sort = "valid"
                    kind = HANG if isinstance(end, _Hung) else CRASH
                    case = draw(implementation, seed, number, device)
                    keep([Finding(kind, case.operation, "process", str(end), number, case.id)])
                    workers.pop().end()
                counted[sort] += 1
                number += 1
        except KeyboardInterrupt:
            interrupted = True
    return Fuzzed(
        implementation.name,
        seed,
        sum(counted.values()),
        counted["invalid"],
        counted["refused"],
        time.monotonic() - begun if begun else 0.0,
        tuple(kept),
        dict(counts),
        interrupted,
    )


def _saved(
    finding: Finding, implementation: Implementation, seed: int, directory: Path, device: str
) -> Finding:
    """``finding`` with its operands written to a file; those of a wrong call before it was
    spoiled.
    """
    case = draw(implementation, seed, finding.number, device)
    words = finding.kind.replace(" ", "-")
    path = directory / f"{words}-{seed}-{finding.number}.safetensors"
    if not path.exists():
        notes = [f"{finding.kind}: {finding.check}: {finding.message}", f"drawn as {case.id}"]
        write(path, case, OPERATIONS[case.operation].operands(case), notes=notes)
    return replace(finding, file=str(path))


def as_json(runs: Sequence[Fuzzed]) -> str:
    """Several runs as a JSON document."""
    return json.dumps({"schema": 1, "runs": [run.as_json() for run in runs]}, indent=1) + "\n"

"""The matrix: implementations × behaviours, a page of what was seen of whom.

A run says thousands of things about an implementation. Here they are gathered under the questions
that users ask: does it do float16, odd lengths, rows without a key, the gradient of a bias; is it
deterministic; how does its memory grow; how exact is it. A cell is one of four:

- *wrong*: a check failed (how many of how many, which, and the command that shows the worst again);
- *pass*: everything that was checked holds;
- *declined*: it declares that it does not do this, and refuses;
- *not run*: nothing was seen. Never is a cell filled from what somebody says.

A run makes one line of JSON per implementation and operation (:func:`records`), small enough to be
kept with the sources; a page is made of many of them, from different machines (:func:`html`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from isoform.conformance.case import CASES_VERSION, Case
from isoform.conformance.console import number
from isoform.conformance.operations import CASES
from isoform.conformance.report import TEMPLATES
from isoform.conformance.run import Run, plain
from isoform.conformance.summary import command, reason
from isoform.conformance.verdicts import Outcome, Verdict

SCHEMA = 1
"""Version of the lines."""

SHOWN = 12
"""Failed checks that a cell names; all are counted."""

IDLE = frozenset({Verdict.UNSUPPORTED, Verdict.NOT_RUN, Verdict.UNDECLARED})

Asks = Callable[[Case, Outcome], bool]


@dataclass(frozen=True)
class Behaviour:
    """A column: a question, and which outcomes answer it.

    Attributes:
        name: What its cells are found by.
        label: Its head.
        group: The heads' head.
        asks: Whether an outcome on a case belongs to it.
    """

    name: str
    label: str
    group: str
    asks: Asks


def _dtype(name: str) -> Asks:
    return lambda case, outcome: case.dtype == name and "/" not in outcome.check


def _tagged(tag: str) -> Asks:
    return lambda case, outcome: tag in case.tags


def _head_dim(low: int, high: int) -> Asks:
    return lambda case, outcome: "head-dim" in case.tags and low <= case.shape.D <= high


def _asked(*names: str) -> Asks:
    return lambda case, outcome: bool(case.operands & {*names})


def _holding(*recipes: str) -> Asks:
    return lambda case, outcome: case.values in recipes


def _checked(*prefixes: str) -> Asks:
    return lambda case, outcome: outcome.check.startswith(prefixes)


def _gradients_of(*operands: str) -> Asks:
    names = tuple(f"d{name}" for name in operands)
    return lambda case, outcome: outcome.check in (*names, "gradients")


NO_KEY_LEFT = ("masked-rows", "all-masked", "minus-inf-bias", "no-keys-for-some", "all-padding")

BEHAVIOURS: tuple[Behaviour, ...] = tuple(
    Behaviour(*row)
    for row in (
        ("fp16", "fp16", "dtype", _dtype("float16")),
        ("bf16", "bf16", "dtype", _dtype("bfloat16")),
        ("fp32", "fp32", "dtype", _dtype("float32")),
        ("fp64", "fp64", "dtype", _dtype("float64")),
        ("models", "models", "sizes", _tagged("model")),
        ("head-dim-small", "D<16", "sizes", _head_dim(1, 15)),
        ("head-dim", "D 16–64", "sizes", _head_dim(16, 64)),
        ("head-dim-large", "D>64", "sizes", _head_dim(65, 10_000)),
        ("length", "odd L", "sizes", _tagged("length")),
        ("cross", "Q≠K", "sizes", _tagged("cross")),
        ("grouped", "G<H", "sizes", _tagged("grouped-heads")),
        ("empty", "empty", "sizes", _tagged("empty")),
        ("layout", "strides", "sizes", _tagged("layout")),
        ("mask", "mask", "masks", _asked("mask")),
        ("mask-bias", "mask bias", "masks", _asked("mask_bias")),
        ("pair-bias", "pair bias", "masks", _asked("pair_bias")),
        ("causal", "causal", "masks", _asked("causal")),
        ("window", "window", "masks", _asked("window")),
        ("segments", "segments", "masks", _asked("segments", "key_segments")),
        ("positions", "positions", "masks", _asked("positions", "key_positions")),
        ("far", "far positions", "masks", _tagged("positions")),
        ("interleaved", "interleaved", "masks", _asked("layout=interleaved")),
        ("scaling", "scalings", "masks", _tagged("scaling")),
        (
            "no-key", "no key left", "edges",
            _holding(*NO_KEY_LEFT),
        ),
        (
            "garbage", "NaN in padding", "edges",
            _holding("garbage-in-dropped", "garbage-in-padding", "nan-passing"),
        ),
        (
            "nan", "NaN, ∞ spread", "edges",
            _holding("nan-attended", "inf-attended", "nan-turned", "inf-turned"),
        ),
        ("subnormal", "subnormal", "edges", _holding("subnormal")),
        ("gradients", "gradients", "gradients", _gradients_of("q", "k", "v", "gate", "x")),
        ("bias-gradients", "of biases", "gradients", _gradients_of("mask_bias", "pair_bias")),
        ("lse", "lse", "behaviour", _checked("lse")),
        ("deterministic", "repeats", "behaviour", _checked("determinism")),
        ("clean", "no side effects", "behaviour", _checked("unmodified", "independence")),
        ("invalid", "wrong calls", "behaviour", _checked("invalid")),
        ("memory", "memory", "behaviour", _checked("memory")),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What was seen of one behaviour of one implementation.

    Attributes:
        counts: How many checks came to each verdict.
        known: How many of those that failed are expected to.
        cases: On how many cases.
        worst: The largest error over its budget, with the case and the check; empty for none.
        failed: Checks that failed: case, check, message.
        command: What shows the first failure, or the worst error, again.
    """

    counts: Mapping[str, int]
    known: int = 0
    cases: int = 0
    worst: tuple[float, str, str] | None = None
    failed: tuple[tuple[str, str, str], ...] = ()
    command: str = ""

    @property
    def failures(self) -> int:
        """How many checks failed."""
        return sum(n for verdict, n in self.counts.items() if Verdict(verdict).fails)

    @property
    def checked(self) -> int:
        """How many checks were made at all."""
        return sum(n for verdict, n in self.counts.items() if Verdict(verdict) not in IDLE)

    @property
    def state(self) -> str:
        """``wrong``, ``pass``, ``declined`` or ``not run``."""
        if self.failures:
            return "wrong"
        if self.checked:
            return "pass"
        return "declined" if self.counts.keys() & {"unsupported", "undeclared"} else "not run"


@dataclass(frozen=True)
class Record:
    """What was seen of one implementation of one operation, in one place.

    Attributes:
        implementation: Its name.
        operation: The operation.
        environment: Date, device, versions; what is needed to see it again.
        declared: Its capabilities, as plain data.
        grade: Error over budget: the median result's median (``p50``), the 99th percentile of the
            results' 99th percentiles (``p99``), and the largest (``max``). Empty where no errors
            were measured.
        cells: By the name of the behaviour.
        not_run: Why it was not run at all; empty if it was.
        cases_version: Version of the case set.
    """

    implementation: str
    operation: str
    environment: Mapping[str, str]
    declared: Mapping[str, Any] = field(default_factory=dict)
    grade: Mapping[str, float] = field(default_factory=dict)
    cells: Mapping[str, Cell] = field(default_factory=dict)
    not_run: str = ""
    cases_version: int = CASES_VERSION

    def as_json(self) -> str:
        """One line."""
        return json.dumps({"schema": SCHEMA} | plain(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Record:
        """Read what :meth:`as_json` wrote.

        Raises:
            ValueError: It is of another schema, or no such line.
        """
        if document.get("schema") != SCHEMA:
            raise ValueError(f"not a line of a matrix, or not of schema {SCHEMA}")
        fields = {key: x for key, x in document.items() if key != "schema"}
        cells = {
            name: Cell(
                **cell
                | {
                    "worst": cell["worst"]
                    and (float(cell["worst"][0]), cell["worst"][1], cell["worst"][2]),
                    "failed": tuple(tuple(each) for each in cell["failed"]),
                }
            )
            for name, cell in fields["cells"].items()
        }
        grade = {name: float(x) for name, x in fields["grade"].items()}
        return cls(**fields | {"cells": cells, "grade": grade})


def records(run: Run) -> Iterator[Record]:
    """A record of each implementation and operation in ``run``."""
    by_row: dict[tuple[str, str], list[tuple[Case, Outcome]]] = {}
    for outcome in run.outcomes:
        case = CASES.get(outcome.case) or _stand_in(outcome.case)
        by_row.setdefault((outcome.implementation, case.operation), []).append((case, outcome))
    for (name, operation), seen in by_row.items():
        cells = {}
        for behaviour in BEHAVIOURS:
            found = [outcome for case, outcome in seen if behaviour.asks(case, outcome)]
            if found:
                cells[behaviour.name] = _cell(run, found)
        yield Record(
            implementation=name,
            operation=operation,
            environment=dict(run.environment),
            declared=run.capabilities.get(name, {}).get(operation, {}),
            grade=_grade(outcome for _, outcome in seen),
            cells=cells,
        )


def _stand_in(case_id: str) -> Case:
    """For the checks that bring their own operands, and captured calls: what their id tells."""
    from isoform.conformance.dtypes import SHORT_NAMES
    from isoform.conformance.operations import OPERATIONS

    short = case_id.split("/")[0]
    operation = next((each for each in OPERATIONS.values() if each.short == short), None)
    probe = (operation or next(iter(OPERATIONS.values()))).probe
    return Case(
        case_id,
        probe.operation,
        probe.shape,
        SHORT_NAMES.get(case_id.split("/")[2], "float32"),
        frozenset(),
    )


def _cell(run: Run, found: Sequence[Outcome]) -> Cell:
    failing = [outcome for outcome in found if outcome.verdict.fails]
    known = [outcome for outcome in failing if reason(run, outcome) is not None]
    shares = [
        (part.figure / part.limit, outcome)
        for outcome in found
        for part in outcome.parts
        if part.name == "condition" and part.limit > 0
    ]
    share, worst = max(shares, key=lambda pair: pair[0], default=(0.0, None))
    shown = failing[0] if failing else worst or found[0]
    return Cell(
        counts={str(verdict): n for verdict, n in Counter(x.verdict for x in found).items()},
        known=len(known),
        cases=len({outcome.case for outcome in found}),
        worst=None if worst is None else (share, worst.case, f"{worst.check}/condition"),
        failed=tuple(
            (outcome.case, ", ".join(outcome.failed_checks), outcome.message[:300])
            for outcome in failing[:SHOWN]
        ),
        command=command(run, shown),
    )


def _grade(found: Iterable[Outcome]) -> dict[str, float]:
    """Error over budget of the results that were measured."""
    measured = [
        (outcome.errors, part.limit)
        for outcome in found
        if outcome.errors is not None
        for part in outcome.parts
        if part.name == "condition" and part.limit > 0
    ]
    if not measured:
        return {}
    p50 = np.array([errors.ratio_p50 / limit for errors, limit in measured])
    p99 = np.array([errors.ratio_p99 / limit for errors, limit in measured])
    top = np.array([errors.ratio_max / limit for errors, limit in measured])
    return {
        "p50": float(np.quantile(p50, 0.5, method="higher")),
        "p99": float(np.quantile(p99, 0.99, method="higher")),
        "max": float(top.max()),
    }


def read(path: Path) -> list[Record]:
    """The records of a file: a run's JSON, or lines that :meth:`Record.as_json` wrote. Of two for
    the same implementation, operation and device, the later.

    Raises:
        ValueError: It is neither.
    """
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            found = [Record.from_json(json.loads(line)) for line in text.splitlines() if line]
        else:
            found = list(records(Run.from_json(text)))
    except (KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"{path}: {problem}") from problem
    return list({_place(record): record for record in found}.values())


def _place(record: Record) -> tuple[str, str, str]:
    device = record.environment.get("gpu") or record.environment.get("device", "")
    return record.implementation, record.operation, device


def html(found: Sequence[Record]) -> str:
    """The page: one table for each operation, and below it what every cell is made of.

    What was run somewhere is not said to be not run elsewhere, where it cannot.
    """
    ran = {(record.implementation, record.operation) for record in found if not record.not_run}
    found = [
        record
        for record in found
        if not record.not_run or (record.implementation, record.operation) not in ran
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    tables = []
    for operation in dict.fromkeys(record.operation for record in found):
        rows = [record for record in found if record.operation == operation]
        present = [
            behaviour
            for behaviour in BEHAVIOURS
            if any(behaviour.name in record.cells for record in rows)
        ]
        groups = Counter(behaviour.group for behaviour in present)
        tables.append((operation, rows, present, groups))
    return environment.get_template("matrix.html.j2").render(
        css="".join(
            (TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "matrix.css")
        ),
        tables=tables,
        empty=Cell({}),
        run=[record for record in found if not record.not_run],
        not_run=[record for record in found if record.not_run],
        versions=sorted({record.cases_version for record in found}),
    )

"""A run: implementations judged on cases, and the record of it that reports are made of."""

from __future__ import annotations

import json
import math
import os
import platform
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from isoform.conformance.case import CASES_VERSION, Case
from isoform.conformance.frameworks import framework
from isoform.conformance.implementation import Implementation
from isoform.conformance.judge import judge, judge_invalid_calls, judge_memory, not_here
from isoform.conformance.metrics import Errors
from isoform.conformance.operations import OPERATIONS
from isoform.conformance.verdicts import (
    GROUPS,
    Outcome,
    Part,
    Verdict,
)

SCHEMA = 2
"""Version of the JSON that :meth:`Run.as_json` writes."""

Progress = Callable[[Implementation, Case], None]


@dataclass(frozen=True)
class Run:
    """What was judged, where, with what outcome.

    Attributes:
        outcomes: One for every check.
        capabilities: What each implementation declares, by its name and the operations that it was
            judged on, as plain data.
        environment: Date, versions, processor: what someone needs to see it again.
        sources: ``module:OBJECT`` of each implementation that is not a registered one, by name.
    """

    outcomes: tuple[Outcome, ...]
    capabilities: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def counts(self, implementation: str | None = None) -> dict[Verdict, int]:
        """How many checks came to each verdict, for one implementation or for all."""
        return Counter(
            outcome.verdict
            for outcome in self.outcomes
            if implementation in (None, outcome.implementation)
        )

    @property
    def implementations(self) -> tuple[str, ...]:
        """The names of those that were judged, in order."""
        return tuple(dict.fromkeys(outcome.implementation for outcome in self.outcomes))

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The outcomes in which an implementation is at fault."""
        return tuple(outcome for outcome in self.outcomes if outcome.verdict.fails)

    @property
    def ran(self) -> bool:
        """Whether anything was checked at all."""
        checked = {*Verdict} - {Verdict.NOT_RUN, Verdict.UNSUPPORTED}
        return any(outcome.verdict in checked for outcome in self.outcomes)

    def as_json(self) -> str:
        """The run as a JSON document (schema :data:`SCHEMA`), one line for every outcome.

        JSON has no NaN and no infinity: they are the strings ``"nan"``, ``"inf"`` and ``"-inf"``.
        """
        document = {
            "schema": SCHEMA,
            "cases_version": CASES_VERSION,
            "environment": self.environment,
            "capabilities": self.capabilities,
            "sources": self.sources,
        }
        head = json.dumps(document, indent=1, allow_nan=False).removesuffix("\n}")
        outcomes = (
            json.dumps(plain(asdict(outcome)), allow_nan=False) for outcome in self.outcomes
        )
        return head + ',\n "outcomes": [\n' + ",\n".join(outcomes) + "\n ]\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Read what :meth:`as_json` wrote.

        Raises:
            ValueError: It is no such document, or of another schema.
        """
        document = json.loads(text)
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise ValueError(f"not a record of a run, or not of schema {SCHEMA}")
        return cls(
            tuple(_outcome(entry) for entry in document["outcomes"]),
            document["capabilities"],
            document["environment"],
            document.get("sources", {}),
        )


def plain(x: Any) -> Any:
    """``x`` with its NaN and infinities as strings, as JSON wants it; :func:`number` undoes it."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def number(x: Any) -> Any:
    """What :func:`plain` made of a field that holds a number, or several."""
    if isinstance(x, list):
        return tuple(x)
    return float(x) if x in ("nan", "inf", "-inf") else x


def _outcome(entry: dict[str, Any]) -> Outcome:
    errors = entry["errors"]
    if errors is not None:
        errors = Errors(**{key: number(x) for key, x in errors.items()})
    parts = tuple(
        Part(**part | {key: number(part[key]) for key in ("figure", "limit")})
        for part in entry["parts"]
    )
    return Outcome(
        **entry | {"errors": errors, "parts": parts, "verdict": Verdict(entry["verdict"])}
    )


class Interrupted(KeyboardInterrupt):
    """A run was interrupted by the user.

    Attributes:
        run: What had been judged until then.
    """

    def __init__(self, run: Run) -> None:
        super().__init__("interrupted")
        self.run = run


def run(
    implementations: Sequence[Implementation],
    cases: Iterable[Case],
    *,
    groups: Collection[str] = GROUPS,
    device: str = "cpu",
    architecture: str = "",
    large: bool = False,
    invalid_calls: Collection[str] | None = None,
    memory: Collection[str] | None = None,
    skip: Callable[[str], str] = lambda case_id: "",
    progress: Progress = lambda implementation, case: None,
) -> Run:
    """Judge every implementation on every case.

    Args:
        implementations: Whom.
        cases: On what. Case by case, so that the oracle is asked once for all implementations.
        groups: Which groups of checks. The two that follow belong to ``conformance``.
        device: Where.
        architecture: The GPU's architecture, where it is one.
        large: Run on the CPU even what is too large for it.
        invalid_calls: Operations of which to judge the answers to wrong calls, once per
            implementation; None for those that it was judged on.
        memory: Operations of which to judge how peak memory grows, likewise.
        skip: Why a case is not to be run, by its id; empty where it is.
        progress: Called before each implementation is judged on each case.

    Raises:
        Interrupted: By the user; it carries what had been judged until then.
    """
    outcomes: list[Outcome] = []
    offered = [one for implementation in implementations for one in implementation.offers]
    first = next((group for group in GROUPS if group in groups), GROUPS[0])
    judged_on: set[str] = set()

    def record() -> Run:
        capabilities = {
            implementation.name: {
                operation: said
                for operation, said in declared(implementation).items()
                if operation in judged_on
            }
            for implementation in implementations
        }
        return Run(tuple(outcomes), capabilities, environment(implementations, device))

    def steps() -> Iterator[Sequence[Outcome]]:
        for case in cases:
            for implementation in offered:
                if implementation.operation != case.operation:
                    continue
                judged_on.add(case.operation)
                progress(implementation, case)
                if why := skip(case.id):
                    yield [
                        Outcome(implementation.name, case.id, first, "case", Verdict.NOT_RUN, why)
                    ]
                    continue
                yield judge(
                    implementation,
                    case,
                    groups=groups,
                    device=device,
                    architecture=architecture,
                    large=large,
                )
        of_cases = frozenset(judged_on)
        for implementation in offered:
            if "conformance" not in groups:
                continue
            if not_here(implementation, device):
                continue
            operation = implementation.operation
            answers = operation in (of_cases if invalid_calls is None else invalid_calls)
            grows = operation in (of_cases if memory is None else memory)
            if not (answers or grows):
                continue
            judged_on.add(operation)
            progress(implementation, OPERATIONS[operation].probe)
            if answers:
                yield judge_invalid_calls(implementation, device)
            if grows:
                yield judge_memory(implementation, device)

    try:
        for judged in steps():
            outcomes += judged
    except KeyboardInterrupt as interruption:
        raise Interrupted(record()) from interruption
    return record()


def declared(implementation: Implementation) -> dict[str, dict[str, Any]]:
    """What an implementation declares, as plain data, by operation."""
    return {one.operation: _declared(one) for one in implementation.offers}


def _declared(implementation: Implementation) -> dict[str, Any]:
    spread = implementation.spread
    over = {} if spread is None else {"ranks": spread.ranks.size, "sharding": spread.kind}
    return (
        {"framework": implementation.framework}
        | over
        | {
            key: sorted(value) if isinstance(value, frozenset) else plain(value)
            for key, value in asdict(implementation.capabilities).items()
        }
    )


def environment(implementations: Collection[Implementation], device: str) -> dict[str, str]:
    """What someone needs to know to see the same again."""
    frameworks = {implementation.framework for implementation in implementations}
    ranks = {one.spread.ranks for one in implementations if one.spread is not None}
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "device": device,
    }
    if ranks:  # of a run, all are the same
        used = next(iter(ranks))
        found |= {"ranks": str(used.size), "communicator": used.communicator}
        frameworks.add(used.library)
    for package in ("isoform", "numpy", *sorted(frameworks - {"numpy"})):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "not installed"
    if device == "cuda" and any(device in framework(name).devices() for name in frameworks):
        import torch

        found["gpu"] = torch.cuda.get_device_name()
        if any(each.device == "cuda" for each in ranks):
            nccl: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
            found["nccl"] = ".".join(map(str, nccl))
    return found


def write(run_record: Run, path: Path) -> None:
    """Write the record of a run, whole or not at all."""
    write_whole(run_record.as_json(), path)


def write_whole(text: str, path: Path) -> None:
    """Write a file, whole or not at all, and make the directories that it is in."""
    if path.exists() and not path.is_file():  # a pipe or a device: nothing to be replaced
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()  # not the link is replaced but what it leads to
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)

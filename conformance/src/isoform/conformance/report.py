"""A run, or records of benchmarks, or both, as one HTML page that loads nothing from anywhere."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from isoform.conformance import benchmark_plots, benchmarks, scaling
from isoform.conformance.budgets import SMALLEST
from isoform.conformance.console import HEADERS, counts, number, status
from isoform.conformance.dtypes import FORMATS
from isoform.conformance.plots import PAGE_COLOURS, budget_strips, dtypes, results, ulp_histogram
from isoform.conformance.run import Run, write_whole
from isoform.conformance.signatures import SIGNATURES, Signature
from isoform.conformance.summary import Summary, Worst, dtype, idle, shares, summaries
from isoform.conformance.verdicts import Verdict
from isoform.reference.contract import FLOAT_DTYPES

TEMPLATES = Path(__file__).parent / "templates"

SHOWN_FAILURES = 15
"""Failed cases shown of each implementation; all are in the run's JSON."""

SHOWN_MESSAGES = 4
"""Messages shown of each failed case; the other checks are named."""

PARTS = {
    "condition": "error / u·κ",
    "twin_max": "max / twin's",
    "twin_mean": "mean / twin's",
    "bias": "bias",
}


@dataclass(frozen=True)
class Row:
    """A row of a table of figures over their limits: one implementation in one dtype."""

    implementation: str
    dtype: str
    cells: tuple[Worst | None, ...]


def html(
    run: Run,
    *,
    boards: Sequence[benchmarks.Board] = (),
    charts: Sequence[scaling.Chart] = (),
    picture: Path | None = None,
    caption: str = "",
) -> str:
    """``run`` as an HTML page.

    Args:
        run: The run; one without outcomes is left out.
        boards: Benchmarks, which have a section of their own.
        charts: Attention over several GPUs, likewise.
        picture: A PNG file of what was judged on, to be shown first; it becomes part of the page.
        caption: What the picture shows, in a sentence or two.
    """
    found = summaries(run)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "heat": _heat, "page_colour": PAGE_COLOURS.get}
    measured = [name for name in run.implementations if _has_errors(run, name)]
    return environment.get_template("report.html.j2").render(
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        headline=_said(found, boards, charts),
        boards=boards,
        charts=charts,
        panels=benchmark_plots.panels,
        styles=benchmark_plots.styles,
        run=run,
        picture=None if picture is None else b64encode(picture.read_bytes()).decode(),
        caption=caption,
        summaries=found,
        verdicts=[key for key in HEADERS if any(key in counts(each) for each in found)],
        counts=counts,
        status=status,
        cases=len({outcome.case for outcome in run.outcomes}),
        results=results(run),
        by_result=_by_result(run),
        parts=PARTS,
        by_part=_by_part(run),
        dtypes=dtypes(outcome for outcome in run.outcomes if outcome.errors is not None),
        short={name: each.short for name, each in FORMATS.items()},
        strips={name: budget_strips(run, name) for name in measured},
        histograms={name: ulp_histogram(run, name) for name in measured},
        capabilities=_capabilities(run),
        idle={verdict: idle(run, verdict) for verdict in (Verdict.UNSUPPORTED, Verdict.NOT_RUN)},
        expected=_expected(found),
        shown_failures=SHOWN_FAILURES,
        shown_messages=SHOWN_MESSAGES,
    )


def save(run: Run, path: str | os.PathLike[str], **shown: Any) -> None:
    """Write the report of ``run``, as :func:`html` makes it, to ``path``, whole or not at all."""
    write_whole(html(run, **shown), Path(path))


def _said(
    found: tuple[Summary, ...],
    boards: Sequence[benchmarks.Board],
    charts: Sequence[scaling.Chart],
) -> str:
    """The page in a sentence."""
    if found or not (boards or charts):
        return _headline(found)
    return benchmarks.headline(boards) if boards else scaling.headline(charts)


def _headline(found: tuple[Summary, ...]) -> str:
    """Who passed, in a sentence."""
    judged = [summary for summary in found if summary.ran]
    wrong = [summary.implementation for summary in judged if summary.failed]
    if not judged:
        return "Nothing ran."
    if not wrong:
        known = [summary.implementation for summary in judged if summary.expected]
        also = f"; {_and(known)} {'has' if len(known) == 1 else 'have'} known failures"
        who = f"All {len(judged)} implementations pass"
        if len(judged) == 1:
            who, also = f"{judged[0].implementation} passes", "; it has known failures"
        return f"{who}{also if known else ''}."
    if len(judged) == 1:
        return f"{wrong[0]} fails."
    passing = len(judged) - len(wrong)
    verb, other = "passes" if passing == 1 else "pass", "fails" if len(wrong) == 1 else "fail"
    return f"{passing} of {len(judged)} implementations {verb}; {_and(wrong)} {other}."


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _has_errors(run: Run, implementation: str) -> bool:
    return any(
        outcome.implementation == implementation and shares(outcome) for outcome in run.outcomes
    )


def _rows(run: Run, columns: Iterable[str], column: Any) -> tuple[Row, ...]:
    """The worst of every cell; ``column`` says where a figure belongs, by outcome and part."""
    columns = tuple(columns)
    cells: dict[tuple[str, str, str], Worst] = {}
    for outcome in run.outcomes:
        for part, share in shares(outcome).items():
            key = outcome.implementation, dtype(outcome.case), column(outcome, part)
            if key not in cells or share > cells[key].share:
                cells[key] = Worst(share, outcome.case, f"{outcome.check}/{part}")
    return tuple(
        Row(name, kind, row)
        for name in run.implementations
        for kind in FORMATS
        if any(row := tuple(cells.get((name, kind, each)) for each in columns))
    )


def _by_result(run: Run) -> tuple[Row, ...]:
    """Error over budget: implementation and dtype down, results across. The condition alone, where
    it was looked at.
    """
    pointwise = any("condition" in shares(outcome) for outcome in run.outcomes)
    return _rows(
        run,
        results(run),
        lambda outcome, part: outcome.check if part == "condition" or not pointwise else "",
    )


def _by_part(run: Run) -> tuple[Row, ...]:
    """Every part of the budget: implementation and dtype down, parts across."""
    return _rows(run, SMALLEST, lambda outcome, part: part)


def _heat(share: float) -> str:
    """How strongly a cell is tinted: in steps of the share that it has of its limit."""
    return f"{100 * min(max(share, 0.0), 1.0) ** 0.7:.0f}%"


def _expected(found: Iterable[Summary]) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """Known failures by implementation and reason, each with what it is seen in."""
    grouping: dict[tuple[str, str], list[str]] = {}
    for summary in found:
        for outcome, reason in summary.expected:
            seen = f"{outcome.case}: {', '.join(outcome.failed_checks)}"
            grouping.setdefault((summary.implementation, reason), []).append(seen)
    return tuple((name, reason, tuple(seen)) for (name, reason), seen in grouping.items())


@dataclass(frozen=True)
class Declarations:
    """What is declared of one operation: groups of rows, and in each row a value for every
    implementation, a bool where it is a question of yes or no.
    """

    operation: str
    implementations: tuple[str, ...]
    groups: tuple[tuple[str, tuple[tuple[str, tuple[Any, ...]], ...]], ...]


def _capabilities(run: Run) -> tuple[Declarations, ...]:
    """What is declared of each operation that was judged."""
    found = (
        _declarations(run, signature)
        for signature in SIGNATURES.values()
        if any(signature.operation in declared for declared in run.capabilities.values())
    )
    return tuple(found)


def _declarations(run: Run, signature: Signature) -> Declarations:
    by_name = {
        name: run.capabilities[name][signature.operation]
        for name in run.implementations
        if signature.operation in run.capabilities.get(name, {})
    }
    declared = by_name.values()

    def has(field: str, names: Iterable[str]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
        return tuple((name, tuple(name in each[field] for each in declared)) for name in names)

    def said(label: str, words: Any) -> tuple[str, tuple[Any, ...]]:
        return label, tuple(words(each) for each in declared)

    devices = sorted({device for each in declared for device in each["devices"]})
    attention = (
        said("returns lse", lambda each: each["lse"]),
        said("grouped heads", lambda each: each["grouped_heads"]),
        said("K unlike Q", lambda each: each.get("cross_lengths", True)),
    )
    groups = (
        ("dtypes", has("dtypes", FLOAT_DTYPES)),
        ("operands", has("operands", _in_order(signature))),
        ("gradients of", has("gradients", signature.differentiable)),
        ("devices", has("devices", devices)),
        (
            "behaviour",
            (
                *(attention if signature.lse else ()),
                said("empty axes", lambda each: each["min_length"] == 0),
                said("deterministic", lambda each: each["deterministic"]),
                said("memory linear in the length", lambda each: each["memory"] == "linear"),
            ),
        ),
        (
            "sizes and arithmetic",
            (
                said("head dims", _head_dims),
                *(
                    said(f"{step} in", lambda each, step=step: each["arithmetic"][step])
                    for step in signature.arithmetic
                ),
            ),
        ),
    )
    return Declarations(signature.operation, tuple(by_name), groups)


def _in_order(signature: Signature) -> list[str]:
    """What an implementation may offer, in the order of the signature."""
    asked = (sorted(names) for names in signature.optional.values())
    return [*sorted(signature.basic), *(name for names in asked for name in names)]


def _head_dims(declared: dict[str, Any]) -> str:
    low, high = declared["head_dims"]
    if declared.get("head_dim_power_of_two"):  # not in what was written before there was any
        return f"{low}–{high}, 2ⁿ"
    multiple = declared["head_dim_multiple"]
    return f"{low}–{high}" + (f", ×{multiple}" if multiple > 1 else "")

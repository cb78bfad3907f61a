"""What the command line prints: tables, failures, progress; plain text where it is piped.

Case ids, commands and messages are never broken or cropped, whatever the width: they are there to
be copied. Colour only repeats what words say (and is left out where ``NO_COLOR`` is set).
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from isoform.conformance.case import Case
    from isoform.conformance.compare import Comparison, Difference, Side
    from isoform.conformance.explain import Explanation
    from isoform.conformance.fuzz import Fuzzed
    from isoform.conformance.run import Run
    from isoform.conformance.shrink import Shrunk
    from isoform.conformance.summary import Failure, Summary, Worst

PIPED_WIDTH = 160
"""Columns where the output is no terminal and ``COLUMNS`` does not say."""

_EXPONENT = re.compile(r"e\+?(-?)0*(?=\d)")

Step = Callable[[str], None]


def console(*, stderr: bool = False) -> Console:
    """A console on the standard output or error, as they are now."""
    stream = sys.stderr if stderr else sys.stdout
    piped = not stream.isatty() and "COLUMNS" not in os.environ
    return Console(file=stream, width=PIPED_WIDTH if piped else None, highlight=False)


def line(to: Console, *parts: str | tuple[str, str], indent: int = 0) -> None:
    """Print text, some of it in a style, without breaking or interpreting it."""
    to.print(Text.assemble(" " * indent, *parts), soft_wrap=True)


def paragraph(to: Console, *parts: str | tuple[str, str], indent: int = 0) -> None:
    """Print text, broken between words where the terminal ends."""
    for wrapped in Text.assemble(*parts).wrap(to, max(to.width - indent, 20)):
        wrapped.rstrip()
        to.print(Text.assemble(" " * indent, wrapped), soft_wrap=True)


@contextmanager
def progress(total: int | None, *, shown: bool = True) -> Iterator[Step]:
    """A progress bar on the standard error, if that is a terminal; yields what advances it.

    It is there from the first step on, so that what is said before is not in its way.

    Args:
        total: How many steps there are; None where that is not known.
        shown: Whether to show it at all.
    """
    to = console(stderr=True)
    bar = Progress(
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=to,
        transient=True,
        expand=True,
        disable=not shown or not to.is_terminal,
    )
    task = bar.add_task("", total=total)
    done = -1

    def step(what: str) -> None:
        nonlocal done
        done += 1
        bar.start()
        bar.update(task, completed=done, description=what)

    try:
        yield step
    finally:
        bar.stop()


def number(x: float) -> str:
    """A figure in three digits; in more where it would seem to be 1 and is not."""
    if x == float("inf"):
        return "∞"
    text = f"{x:.3g}" if x == 1 or f"{x:.3g}" != "1" else f"{x:.4g}"
    return _EXPONENT.sub(r"e\1", text)


# isoform check, isoform replay

HEADERS = {
    "pass": "pass",
    "wrong": "wrong",
    "broken declaration": "broken decl.",
    "error": "error",
    "bad refusal": "bad refusal",
    "expected": "known",
    "unsupported": "unsup.",
    "undeclared": "undecl.",
    "not run": "not run",
}
"""Verdicts, and known failures, as the heads of narrow columns."""


def counts(summary: Summary) -> dict[str, int]:
    """How many checks came to what, in the order of :data:`HEADERS`."""
    found = {str(verdict): n for verdict, n in summary.counts.items()}
    found["expected"] = len(summary.expected)
    return {key: found[key] for key in HEADERS if found.get(key)}


def status(summary: Summary) -> tuple[str, str]:
    """One word for an implementation, and the style it is written in."""
    if summary.failed:
        return "FAIL", "bold red"
    return ("pass", "green") if summary.ran else ("nothing ran", "yellow")


def print_run(to: Console, run: Run, found: Sequence[Summary], failures: int) -> None:
    """Print what a run says: failures first, so that the table is what is left on the screen."""
    for summary in found:
        if summary.failures:
            _print_failures(to, summary, failures)
    _print_expected(to, found)
    _print_idle(to, run)
    _print_table(to, found)


def _print_table(to: Console, found: Sequence[Summary]) -> None:
    columns = [key for key in HEADERS if any(key in counts(summary) for summary in found)]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", overflow="fold")
    table.add_column("")
    for key in columns:
        table.add_column(HEADERS[key], justify="right")
    table.add_column("error / budget", justify="right")
    for summary in found:
        word, style = status(summary)
        table.add_row(
            Text(summary.implementation, "bold"),
            Text(word, style),
            *(_count(key, counts(summary).get(key, 0)) for key in columns),
            _worst(summary.worst),
        )
    to.print(table)


def _count(key: str, n: int) -> Text:
    if not n:
        return Text("·", "dim")
    failing = key in ("wrong", "broken declaration", "error", "bad refusal")
    return Text(f"{n}", "red" if failing else "")


def _worst(worst: Worst | None) -> Text:
    if worst is None:
        return Text("·", "dim")
    return Text(number(worst.share), "red" if worst.share > 1 else "")


MESSAGES = 3
"""Messages that are shown of each failed case, where several failed; the others are named."""


def _print_failures(to: Console, summary: Summary, most: int) -> None:
    many = len(summary.failures)
    line(
        to,
        (summary.implementation, "bold"),
        f": {summary.failed} {_plural('check', summary.failed)} failed",
        f" in {many} {_plural('case', many)}",
    )
    if many > 1:
        _print_tally(to, summary)
    for failure in summary.failures[:most]:
        _print_failure(to, failure, None if many == 1 else MESSAGES)
    if many > most:
        left = f"… and {many - most} more {_plural('case', many - most)}"
        line(to, (f"{left}; --failures {many} shows all\n", "dim"), indent=2)


def _print_tally(to: Console, summary: Summary) -> None:
    """In how many cases each check failed, a result a line."""
    for result, parts in summary.tally.items():
        failed = ", ".join(f"{part} ×{n}".strip() for part, n in parts.items())
        paragraph(to, (result, "red"), f"  {failed}", indent=2)
    to.print()


def _print_failure(to: Console, failure: Failure, most: int | None) -> None:
    line(to, ("✗ ", "red"), (failure.case, "bold"), indent=2)
    messages = failure.messages
    for name, message in messages[:most]:
        paragraph(to, (name, "red"), f"  {message}", indent=4)
    if left := [name for name, _ in messages[len(messages[:most]) :]]:
        paragraph(to, (f"also {', '.join(left)}", "dim"), indent=4)
    line(to, ("$ ", "dim"), (failure.command, "cyan"), "\n", indent=4)


def _print_expected(to: Console, found: Sequence[Summary]) -> None:
    for summary in found:
        for why, n in Counter(why for _, why in summary.expected).items():
            paragraph(
                to,
                (summary.implementation, "bold"),
                f": {n} {_plural('check', n)} failed as expected: ",
                why,
            )
        for why, n in Counter(why for _, why in summary.mended).items():
            paragraph(
                to,
                (summary.implementation, "bold"),
                f": {n} {_plural('check', n)} passed, though expected to fail: ",
                why,
            )
    if any(summary.expected or summary.mended for summary in found):
        to.print()


def _print_idle(to: Console, run: Run) -> None:
    """Say why something was not run or is not supported: once, whoever it is true of."""
    from isoform.conformance.summary import idle
    from isoform.conformance.verdicts import Verdict

    found = {verdict: idle(run, verdict) for verdict in (Verdict.NOT_RUN, Verdict.UNSUPPORTED)}
    for verdict, reasons in found.items():
        for why, who in reasons.items():
            whose = ", ".join(f"{name} ×{len(cases)}" for name, cases in who.items())
            paragraph(to, f"{verdict}: {why}", (f"  {whose}", "dim"))
    if any(found.values()):
        to.print()


def print_briefly(to: Console, found: Iterable[Summary]) -> None:
    """Print a line for every failed case, and nothing else."""
    for summary in found:
        for failure in summary.failures:
            named = [name for name, _ in failure.messages]
            names = ", ".join(named[:4]) + (f" and {len(named) - 4} more" if named[4:] else "")
            line(to, (f"{summary.implementation} {failure.case}: ", ""), (names, "red"))


def _plural(noun: str, n: int) -> str:
    return noun if n == 1 else f"{noun}s"


# isoform list


def print_implementations(to: Console, entries: Mapping[str, dict[str, Any]]) -> None:
    """Print who can be judged, and what is missing where one cannot."""
    from isoform.conformance.dtypes import FORMATS

    widest = max(map(len, entries), default=0)
    for name, entry in entries.items():
        if entry["available"]:
            declared = entry["capabilities"].values()
            known = {dtype for each in declared for dtype in each["dtypes"]}
            devices = sorted({device for each in declared for device in each["devices"]})
            dtypes = [each.short for key, each in FORMATS.items() if key in known]
            offered = _list([*entry["capabilities"]])
            note = f"{offered}; {entry['framework']} arrays, {_list(devices)}, {_list(dtypes)}"
        else:
            note = str(entry["why"]).removeprefix(f"{name} ")
        mark = ("✓ ", "green") if entry["available"] else ("✗ ", "yellow")
        paragraph(to, mark, (name.ljust(widest), "bold"), "  ", (note, "dim"))


def print_capabilities(to: Console, name: str, declared: Mapping[str, Any]) -> None:
    """Print what one implementation declares."""
    line(to, (name, "bold"))
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in described(declared).items():
        table.add_row(Text(f"  {key}"), Text(value))
    to.print(table)
    to.print()


def described(declared: Mapping[str, Any]) -> dict[str, str]:
    """Capabilities, which are plain data, in words."""
    from isoform.conformance.signatures import SIGNATURES

    low, high = declared["head_dims"]
    multiple = declared["head_dim_multiple"]
    every = f", multiples of {multiple}" if multiple > 1 else ""
    if declared.get("head_dim_power_of_two"):  # not in what was written before there was any
        every += ", powers of two"
    divides = declared.get("length_multiple", 1)  # nor this
    signature = SIGNATURES[declared["operation"]]
    attention = {
        "grouped heads": _yes(declared["grouped_heads"]),
        "returns lse": _yes(declared["lse"]),
    }
    return {
        "operation": str(declared["operation"]),
        "arrays": str(declared["framework"]),
        **({"sharding": str(declared["sharding"])} if "sharding" in declared else {}),
        "dtypes": _list(declared["dtypes"]),
        "devices": _list(declared["devices"]),
        "architectures": _list(declared["architectures"], "any"),
        "head dims": f"{low} to {high}{every}",
        "lengths": f"from {declared['min_length']}"
        + (f", multiples of {divides}" if divides > 1 else "")
        + ("" if declared.get("cross_lengths", True) else ", of queries and keys alike"),
        "operands": _list(declared["operands"]),
        "gradients of": _list(declared["gradients"]),
        **(attention if signature.lse else {}),
        "deterministic": _yes(declared["deterministic"]),
        "memory": f"{declared['memory']} in the length",
        "arithmetic": ", ".join(
            f"{step} {declared['arithmetic'][step]}" for step in signature.arithmetic
        ),
    }


def _list(names: Sequence[str], empty: str = "none") -> str:
    """Names in the order that the contract has them in."""
    from isoform.reference.contract import DIFFERENTIABLE, FLOAT_DTYPES

    order = [*FLOAT_DTYPES, "mask", *DIFFERENTIABLE]
    known = [name for name in order if name in names]
    return ", ".join([*known, *(name for name in names if name not in known)]) or empty


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def print_cases(to: Console, cases: Sequence[Case]) -> None:
    """Print cases with their sizes and tags; one a line where the output is piped."""
    for case in cases:
        more = f"{case.shape}  {' '.join(sorted(case.tags))}"
        if to.is_terminal:
            line(to, case.id)
            paragraph(to, (more, "dim"), indent=4)
        else:
            line(to, f"{case.id}  {more}")
    if to.is_terminal:
        line(to, (f"\n{len(cases)} {_plural('case', len(cases))}", "dim"))


# isoform compare


def print_comparison(to: Console, comparison: Comparison, *, every: bool) -> None:
    """Print how two implementations differ: for every result the case where most, or each case."""
    a, b = comparison.a, comparison.b
    cases = tuple(dict.fromkeys(x.case for x in comparison.differences))
    if every or len(cases) == 1:
        for case in cases:
            line(to, (case, "bold"))
            of_case = [x for x in comparison.differences if x.case == case]
            _print_differences(to, comparison, of_case, name_cases=False)
    else:
        largest = comparison.largest()
        for dtype in dict.fromkeys(x.dtype for x in largest):
            line(to, (dtype, "bold"), (", each result where the two differ most", "dim"))
            of_dtype = [x for x in largest if x.dtype == dtype]
            _print_differences(to, comparison, of_dtype, name_cases=True)
    for why, n in Counter(comparison.skipped.values()).items():
        paragraph(to, f"not compared: {why}", (f"  ×{n}", "dim"))
    if cases:
        verdict = "both within budget" if comparison.within else "not both within budget"
        style = "green" if comparison.within else "bold red"
        count = f"{len(cases)} {_plural('case', len(cases))}"
        paragraph(to, f"{a} and {b} on {count}: ", (verdict, style))


def _print_differences(
    to: Console, comparison: Comparison, differences: Sequence[Difference], *, name_cases: bool
) -> None:
    """A table of ``differences``, a result a row, and below it where each is largest."""
    a, b = comparison.a, comparison.b
    wide = to.width >= 100
    table = Table(box=None, padding=(0, 2 if wide else 1, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    for head in ("max abs", "rel. Frob.", "ULP p50", "p99", "max"):
        table.add_column(head, justify="right")
    for name in (a, b) if wide else ():
        table.add_column(f"{name}: error / budget", justify="right")
    for x in differences:
        figures = [
            number(figure)
            for figure in (
                x.between.max_abs,
                x.between.frobenius,
                x.between.ulp_p50,
                x.between.ulp_p99,
                x.between.ulp_max,
            )
        ]
        shares = [Text(*_share(side)) for side in (x.a, x.b)]
        table.add_row(x.result, *figures, *(shares if wide else ()))
    to.print(table)
    for x in differences:
        if not wide:
            both = (f"{a} ", _share(x.a), f", {b} ", _share(x.b))
            paragraph(to, f"{x.result}: error / budget ", *both, indent=2)
        _print_where(to, comparison, x, x.case if name_cases else "")
    to.print()


def _share(side: Side) -> tuple[str, str]:
    return number(side.share), "" if side.within else "red"


def _print_where(to: Console, comparison: Comparison, x: Difference, case: str) -> None:
    """The coordinate where the two differ most, and what is wrong with NaN and infinity."""
    if x.between.max_abs > 0:
        values = (
            f"{comparison.a} {x.between.worst_value:.9g}, "
            f"{comparison.b} {x.between.worst_reference:.9g}, definition {x.definition:.9g}"
        )
        where = f"{x.result} at {list(x.between.worst)}" + (f" of {case}" if case else "")
        paragraph(to, (f"{where}: {values}", "dim"), indent=2)
    if x.apart:
        paragraph(to, f"{x.result}: {x.apart} elements where only one is finite", indent=2)
    for name, side in ((comparison.a, x.a), (comparison.b, x.b)):
        if side.fault:
            paragraph(to, (f"{x.result}, {name}: {side.fault}", "red"), indent=2)


# isoform shrink


def print_shrunk(to: Console, found: Shrunk, again: str) -> None:
    """Print a shrunk call: what fails, on which sizes, holding what, and how to see it again."""
    line(to, (found.check, "bold"), f" fails on {found.case.shape}, {found.case.dtype}")
    paragraph(to, found.outcome.message, indent=2)
    for name, what in found.contents.items():
        line(to, f"{name}: {what}", indent=2)
    for name, x in found.case.options:
        line(to, f"{name}={x!r}", indent=2)
    search = f"cut out of {found.origin}; {found.tried} calls tried in {found.seconds:.0f} s"
    paragraph(to, (search if found.ended else f"{search}, not to the end", "dim"))
    line(to, ("again: ", "dim"), again)


# isoform fuzz


def print_fuzzed(to: Console, found: Fuzzed, again: str) -> None:
    """Print what a fuzz run found: each way of going wrong, where it is kept, and how to see it."""
    for like, n in found.counts.items():
        kind, operation, check = like
        kept = [each for each in found.findings if each.like == like]
        line(to, (kind, "bold red"), f" in {operation}: {check}", (f"  ×{n}", "dim"))
        paragraph(to, kept[0].message, indent=2)
        for each in kept:
            line(to, (f"{each.case}  ", "dim"), each.file, indent=2)
        seen = f"{again} --seed {found.seed} --only {kept[0].number}"
        line(to, ("again: ", "dim"), seen, indent=2)
    calls = f"{found.calls} calls in {found.seconds:.0f} s, {found.invalid} of them invalid, "
    calls += f"{found.refused} declined as declared; seed {found.seed}"
    verdict = f"{sum(found.counts.values())} findings" if found.counts else "nothing found"
    style = "bold red" if found.counts else "green"
    paragraph(to, f"{found.implementation}: ", (verdict, style), (f"  {calls}", "dim"))


# isoform compare --explain


def print_explanation(to: Console, found: Explanation) -> None:
    """Print what was read at each step, and where the two part."""
    line(to, (found.case, "bold"), (f", tiles of {found.tile}", "dim"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("step: what is read", no_wrap=True)
    for head in (found.a, found.b, "apart"):
        table.add_column(head, justify="right")
    for name, *figures in found.rows:
        cells = [Text(number(figure), "red" if figure > 1 else "") for figure in figures]
        table.add_row(name, *cells)
    to.print(table)
    paragraph(to, ("error over budget, and the difference over it; more than 1 is wrong", "dim"))
    for remark in found.remarks:
        paragraph(to, (remark, "dim"))
    for fault in found.faults:
        at = ", ".join(f"{axis}={index}" for axis, index in fault.coordinate.items())
        line(
            to, (f"{fault.implementation} leaves the definition at: ", "bold"), (fault.step, "red")
        )
        queries, keys = (f"{first}–{end - 1}" for first, end in (fault.queries, fault.keys))
        paragraph(to, f"tile: queries {queries}, keys {keys}; furthest off at {at}", indent=2)
        says = f"seen: {fault.seen}: {fault.value:.9g}, the definition says {fault.definition:.9g}"
        paragraph(to, f"{says} ({number(fault.excess)} of its budget)", indent=2)
        paragraph(to, f"inferred: {fault.inferred}", indent=2)
    if found.parted:
        paragraph(to, f"{found.a} and {found.b} part at: ", (found.parted, "bold red"))
    elif found.faults:
        paragraph(to, f"{found.a} and {found.b} do not part: both are wrong alike")
    else:
        paragraph(
            to,
            f"{found.a} and {found.b} are within budget at every step of the forward pass; ",
            "gradients are not walked through",
        )

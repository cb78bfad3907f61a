"""Sphinx: pages of the reference that are made of the code and of the records, not written.

A page says ``<!-- generated: NAME -->`` where one of these comes: the command line, of its own
parser; the files that commands write, of the classes that write them; what is supported, of what
implementations declare and of the recorded runs.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import typer
from public_names import entries, sections

from isoform.conformance import matrix, run, verdicts
from isoform.conformance.cli import Code, app
from isoform.conformance.implementation import Implementation
from isoform.conformance.metrics import Errors
from isoform.conformance.registry import Unavailable, find
from isoform.kernels.benchmark import records as benchmark
from isoform.kernels.benchmark.timing import Quartiles
from isoform.reference.contract import Capabilities

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "ci" / "results"


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A table in Markdown."""
    head = [*head]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines) + "\n"


def _cell(x: Any) -> str:
    return str(x).replace("|", "\\|").replace("\n", " ")


# --- the command line ---


def command_line() -> str:
    """Every command: what it does, its arguments and options, examples."""
    group: Any = typer.main.get_command(app)
    with group.make_context("isoform", [], resilient_parsing=True) as context:
        parts = [
            _command(group.get_command(context, name)) for name in group.list_commands(context)
        ]
    codes = table(
        ("code", "meaning"), ((code.value, code.name.lower().replace("_", " ")) for code in Code)
    )
    return "\n".join([*parts, "## Exit codes\n", codes])


def _command(command: Any) -> str:
    taken = [one for one in command.params if one.param_type_name == "argument"]
    options = [
        one for one in command.params if one.param_type_name == "option" and one.name != "help"
    ]
    shown = {one: one.metavar or one.name.upper() for one in taken}
    usage = " ".join(name + "..." * (one.nargs < 0) for one, name in shown.items())
    text = [
        f"## isoform {command.name}\n",
        f"```text\nisoform {command.name} [OPTIONS] {usage}".rstrip() + "\n```\n",
    ]
    text.append(_prose(command.help or "") + "\n")
    if taken:
        rows = ((f"`{name}`", _prose(one.help or "")) for one, name in shown.items())
        text.append(table(("argument", "what it is"), rows))
    rows = ((_names(one), _prose(one.help or ""), _default(one)) for one in options)
    text.append(table(("option", "what it does", "default"), rows))
    examples = re.findall(r"\[cyan\](.*?)\[/\]", command.epilog or "")
    if examples:
        text.append("```console\n" + "\n".join(f"$ {one}" for one in examples) + "\n```\n")
    return "\n".join(text)


def _names(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len, reverse=True))
    metavar = "" if option.is_flag else f" `{option.metavar or option.name.upper()}`"
    return names + metavar


def _default(option: Any) -> str:
    value = option.default
    if option.is_flag or value in (None, (), [], "") or callable(value):
        return ""
    return f"`{getattr(value, 'value', value)}`"


def _prose(text: str) -> str:
    text = re.sub(r"\[/?(?:bold|cyan|dim|green|red|yellow|italic)?\]", "", text)
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


# --- files ---

DOCUMENTS: tuple[tuple[str, str, tuple[type, ...]], ...] = (
    (
        "A run",
        f"`isoform check --json`, `isoform demo`: one JSON document, schema {run.SCHEMA}, with the "
        "keys `schema` and `cases_version` besides. NaN and infinities are the strings `nan`, "
        "`inf` and `-inf`. `isoform.conformance.run.Run.from_json` reads it.",
        (run.Run, verdicts.Outcome, verdicts.Part, Errors),
    ),
    (
        "A line of a matrix",
        f"`ci/results/peers.jsonl`: a line of JSON for each implementation and operation, schema "
        f"{matrix.SCHEMA}. `isoform report --matrix` takes files of them.",
        (matrix.Record, matrix.Cell),
    ),
    (
        "A line of a benchmark",
        f"`ci/results/*benchmarks.jsonl`: a line of JSON for each competitor and case, schema "
        f"{benchmark.SCHEMA}; what is `surroundings` here stands beside the other keys. "
        "`isoform report --benchmarks` draws it.",
        (benchmark.Record, benchmark.Surroundings, Quartiles),
    ),
)


def files() -> str:
    """The files that commands write: each key, its type, what it is."""
    parts = []
    for title, text, classes in DOCUMENTS:
        parts.append(f"## {title}\n\n{text}\n")
        for cls in classes:
            said = entries(sections(cls.__doc__ or "").get("Attributes", ""))
            rows = []
            for field in dataclasses.fields(cls):
                if field.name not in said:
                    raise ValueError(f"{cls.__name__}.{field.name} is in a file, and undocumented")
                rows.append((f"`{field.name}`", f"`{_type(field.type)}`", _math(said[field.name])))
            parts.append(f"### {cls.__name__}\n\n" + table(("key", "type", "what it is"), rows))
    return "\n".join(parts)


def _type(annotation: Any) -> str:
    return str(annotation).replace("collections.abc.", "")


def _math(text: str) -> str:
    """What docstrings mark up, in Markdown."""
    text = re.sub(r":(?:class|func|meth|data|mod|attr):`~?\.*([^`]*)`", r"`\1`", text)
    return text.replace("``", "`")


# --- what is supported ---


def support() -> str:
    """What implementations declare, and what was recorded of them."""
    return "\n".join(
        [
            "## Declared\n",
            "What each registered implementation says that it does. A declaration is judged too: "
            "what is declared must be right, and what is not must be refused with every reason.\n",
            *_declared(),
            "## Judged on GPUs\n",
            "Runs of every case by `ci/gpu_record.py`: how many checks, the newest run of each "
            "implementation, operation and GPU.\n",
            _on_gpus(),
            "## Other people's kernels\n",
            "`ci/results/peers.jsonl`, by `ci/peers.py`. A cell is how many of the checks that "
            "were made failed; a dash, that it declines or that nothing was seen.\n",
            *_peers(),
        ]
    )


def _declared() -> Iterable[str]:
    found: dict[str, list[Implementation]] = {}
    for entry in sorted(entry_points(group="isoform.implementations"), key=lambda one: one.name):
        if entry.name.startswith("parallel/") and entry.name != "parallel/ring-zigzag":
            continue  # they declare the same
        try:
            for one in find(entry.name).offers:
                found.setdefault(one.operation, []).append(one)
        except Unavailable as error:
            raise RuntimeError(f"the table would lack {entry.name}: {error}") from error
    head = (
        "",
        "dtypes",
        "devices",
        "head dims",
        "asked for besides",
        "gradients",
        "lse",
        "repeats",
        "memory",
    )
    for operation, offered in found.items():
        yield f"### {operation}\n\n" + table(head, (_capabilities(one) for one in offered))


def _capabilities(one: Implementation) -> Iterable[str]:
    has: Capabilities = one.capabilities
    every = f", multiples of {has.head_dim_multiple}" if has.head_dim_multiple > 1 else ""
    every += ", powers of two" if has.head_dim_power_of_two else ""
    low, high = has.head_dims
    dims = f"{low} to {high}{every}" if high < 10**6 else f"{low} and up{every}"
    name = "parallel/*" if one.name.startswith("parallel/") else one.name
    return (
        f"`{name}`",
        ", ".join(_short(has.dtypes)),
        ", ".join(sorted(has.devices)),
        dims,
        ", ".join(f"`{x}`" for x in sorted(has.operands)) or "nothing",
        ", ".join(sorted(has.gradients)) or "none",
        "yes" if has.lse else "no",
        "the same bits" if has.deterministic else "no",
        has.memory,
    )


def _short(dtypes: Iterable[str]) -> list[str]:
    names = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
    return [short for name, short in names.items() if name in dtypes]


def _on_gpus() -> str:
    newest: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for line in (RESULTS / "gpu.jsonl").read_text().splitlines():
        record = json.loads(line)
        size = "full" if record["cases"] < record["left_out"] and record["cases"] < 100 else "CPU's"
        operation = record.get("operation", "evoformer_attention")
        newest[record["implementation"], operation, record["gpu"], size] = record
    rows = []
    for (name, operation, gpu, size), record in sorted(newest.items()):
        counts: Counter[str] = Counter()
        for verdict in record["verdicts"].values():
            counts.update(verdict)
        failing = sum(n for verdict, n in counts.items() if verdicts.Verdict(verdict).fails)
        date, cases = record["date"][:10], f"{record['cases']} of {size} size"
        rows.append(
            (
                f"`{name}`",
                operation,
                gpu,
                date,
                cases,
                counts["pass"],
                counts["unsupported"],
                failing,
            )
        )
    head = ("", "operation", "GPU", "date", "cases", "pass", "declined", "fail")
    return table(head, rows)


SHOWN = (
    "fp16",
    "bf16",
    "fp32",
    "fp64",
    "models",
    "length",
    "no-key",
    "garbage",
    "nan",
    "gradients",
    "deterministic",
)


def _peers() -> Iterable[str]:
    found = matrix.read(RESULTS / "peers.jsonl")
    labels = {one.name: one.label for one in matrix.BEHAVIOURS}
    for operation in dict.fromkeys(record.operation for record in found):
        rows = [record for record in found if record.operation == operation and not record.not_run]
        ran = {record.implementation for record in rows}
        absent = [
            record
            for record in found
            if record.operation == operation and record.not_run and record.implementation not in ran
        ]
        present = [name for name in SHOWN if any(name in record.cells for record in rows)]
        head = ("", "where", *(labels[name] for name in present), "error / budget, p99")
        yield f"### {operation}, of others\n\n" + table(
            head, (_peer(record, present) for record in rows)
        )
        if absent:
            yield (
                "Not run so far: "
                + "; ".join(f"`{record.implementation}`" for record in absent)
                + ".\n"
            )


def _peer(record: matrix.Record, present: Iterable[str]) -> Iterable[str]:
    place = record.environment.get("gpu") or record.environment.get("device", "")
    yield f"`{record.implementation}`"
    yield f"{place}, {record.environment['date'][:10]}"
    for name in present:
        cell = record.cells.get(name)
        if cell is None or not cell.checked:
            yield "–"
        else:
            yield (
                f"**{cell.failures}** of {cell.checked}"
                if cell.failures
                else f"0 of {cell.checked}"
            )
    yield f"{record.grade['p99']:.2g}" if record.grade else "–"


PAGES: dict[str, Callable[[], str]] = {
    "command-line": command_line,
    "files": files,
    "support": support,
}


def setup(app: Any) -> dict[str, Any]:
    """Join Sphinx."""

    def read(app: Any, name: str, source: list[str]) -> None:
        source[0] = re.sub(
            r"<!-- generated: ([\w-]+) -->", lambda match: PAGES[match[1]](), source[0]
        )

    app.connect("source-read", read)
    return {"parallel_read_safe": True}

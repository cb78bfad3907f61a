"""The command line ``isoform``.

Heavy modules are imported by the commands that need them: ``isoform --help`` is there at once, and
what is not installed (PyTorch) is missed only by those who ask for it.

Exit codes: 0 all passed, 1 something is wrong, 2 the command line is, 3 nothing ran,
130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from isoform.conformance.case import Case
    from isoform.conformance.implementation import Implementation
    from isoform.conformance.run import Run


class Code(IntEnum):
    """Exit codes, for scripts."""

    PASS = 0
    WRONG = 1
    USAGE = 2
    NOTHING_RAN = 3
    INTERRUPTED = 130


class Group(StrEnum):
    """Groups of checks."""

    conformance = "conformance"
    gradients = "gradients"
    precision = "precision"


class Device(StrEnum):
    """Kinds of device."""

    cpu = "cpu"
    cuda = "cuda"


class Framework(StrEnum):
    """Array libraries."""

    numpy = "numpy"
    torch = "torch"


CODES = "Exit codes: 0 all passed, 1 something is wrong, 2 usage, 3 nothing ran, 130 interrupted."


def _epilog(*examples: str, codes: bool = True) -> str:
    """Examples, a line each, and what the exit codes mean."""
    # \b keeps older versions of Typer from joining the lines
    lines = "\n".join(["\b[bold]Examples[/]", *(f"[cyan]{example}[/]" for example in examples)])
    return f"{lines}\n\n{CODES}" if codes else lines


class _Command(TyperCommand):
    """A command whose help flows, and whose ``--json`` without a file is the standard output."""

    def __init__(self, *args: Any, help: str | None = None, **more: Any) -> None:  # noqa: A002
        paragraphs = (" ".join(part.split()) for part in (help or "").split("\n\n"))
        super().__init__(*args, help="\n\n".join(paragraphs), **more)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse ``args``, with ``-`` put after a ``--json`` that nothing follows."""
        given: list[str] = []
        for position, arg in enumerate(args):
            given.append(arg)
            following = args[position + 1 : position + 2]
            bare = not following or (following[0].startswith("-") and following[0] != "-")
            if arg == "--json" and bare:
                given.append("-")
        return super().parse_args(ctx, given)


app = typer.Typer(
    name="isoform",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_epilog(
        "isoform list",
        "isoform check torch-sdpa --tag quick",
        "isoform check --impl mymodule:attention",
        "isoform compare torch-reference torch-sdpa --tag model",
        "isoform check --html report.html",
    ),
)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without κ shall still show the rest
    app()


# What several commands take.


def _complete_implementations(incomplete: str) -> list[str]:
    from isoform.conformance.registry import registered

    return [name for name in registered() if name.startswith(incomplete)]


def _complete_operations(incomplete: str) -> list[str]:
    from isoform.conformance.signatures import SIGNATURES

    return [name for name in SIGNATURES if name.startswith(incomplete)]


def _complete_cases(incomplete: str) -> list[str]:
    from isoform.conformance.operations import CASES

    return [case_id for case_id in CASES if case_id.startswith(incomplete)]


def _complete_tags(incomplete: str) -> list[str]:
    from isoform.conformance.operations import CASES

    return sorted(
        {tag for case in CASES.values() for tag in case.tags if tag.startswith(incomplete)}
    )


Impl = Annotated[
    list[str] | None,
    typer.Option(
        "--impl",
        metavar="MODULE:OBJECT",
        help="Judge an object or a function that is not registered. Modules in the current "
        "directory are found. May be given several times.",
    ),
]
Pattern = Annotated[
    list[str] | None,
    typer.Option(
        "--case",
        "-c",
        metavar="PATTERN",
        help="Only cases with this id, or that match this shell pattern. Several: any of them.",
        autocompletion=_complete_cases,
    ),
]
Tag = Annotated[
    list[str] | None,
    typer.Option(
        "--tag",
        "-t",
        metavar="TAG",
        help="Only cases with this tag, such as quick, model, edge. Several: all of them.",
        autocompletion=_complete_tags,
    ),
]
Dtype = Annotated[
    list[str] | None,
    typer.Option(
        "--dtype",
        "-d",
        metavar="DTYPE",
        help="Only cases of this dtype: fp16, bf16, fp32, fp64. Several: any of them.",
    ),
]
Groups = Annotated[
    list[Group] | None,
    typer.Option(
        "--group",
        "-g",
        metavar="GROUP",
        help="Only this group of checks: conformance, gradients or precision. "
        "Several: any of them.",
    ),
]
OnDevice = Annotated[Device, typer.Option("--device", help="Where to run the implementations.")]
Large = Annotated[
    bool,
    typer.Option("--large", help="Run full model sizes on the CPU too: minutes each, many GB."),
]
Arrays = Annotated[
    Framework,
    typer.Option("--framework", help="Whose arrays a bare function given by --impl takes."),
]
OfOperation = Annotated[
    str,
    typer.Option(
        "--operation",
        metavar="OPERATION",
        help="Which operation a bare function given by --impl is, such as attention. "
        "[dim]What its operands say, if not said; for q, k, v: evoformer_attention.[/]",
        autocompletion=_complete_operations,
    ),
]
Json = Annotated[
    str,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the full record as JSON; - is the standard output, with nothing else there.",
    ),
]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML file.")
]
Junit = Annotated[
    Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML, for CI systems.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only say what failed, a line each; no progress bar.")
]
Failures = Annotated[
    int, typer.Option("--failures", metavar="N", min=0, help="Show this many failed cases in full.")
]


def _fail(message: str, code: Code = Code.USAGE) -> NoReturn:
    """Say on the standard error what is wrong, and leave."""
    from isoform.conformance.console import console, line

    line(console(stderr=True), ("isoform: ", "red" if code is Code.USAGE else "yellow"), message)
    raise typer.Exit(code)


def _say(message: str) -> None:
    """A note on the standard error."""
    from isoform.conformance.console import console, line

    line(console(stderr=True), (message, "dim"))


def _find(name: str, framework: str, operation: str = "") -> Implementation | str:
    """The implementation that ``name`` or ``module:OBJECT`` names, or why there is none."""
    from isoform.conformance.case import UnknownName
    from isoform.conformance.frameworks import framework as library
    from isoform.conformance.registry import Unavailable, find
    from isoform.conformance.signatures import SIGNATURES

    if operation and operation not in SIGNATURES:
        return str(UnknownName("operation", operation, SIGNATURES.keys()))
    module, _, attribute = name.partition(":")
    if module.endswith(".py"):
        return f"{name}: name the module, not its file: {Path(module).stem}:{attribute}"
    try:
        found = find(name, framework=framework, operation=operation or None)
        library(found.framework)
    except (UnknownName, Unavailable, TypeError) as problem:
        return str(problem)
    except ModuleNotFoundError as cause:  # its array library
        hint = "; or, if it takes NumPy arrays, say --framework numpy" if ":" in name else ""
        return f"{Unavailable(name, cause)}{hint}"
    except Exception as problem:  # of the module, while it was imported
        return f"{name} cannot be loaded: {_where(problem)}{type(problem).__name__}: {problem}"
    return found


def _where(problem: Exception) -> str:
    """The file and line that an exception comes from."""
    import traceback

    frames = traceback.extract_tb(problem.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""


def _load(name: str, framework: str, operation: str = "") -> Implementation:
    """The implementation that ``name`` names; leaves if there is none."""
    found = _find(name, framework, operation)
    if isinstance(found, str):
        _fail(found)
    return found


def _implementations(
    names: Sequence[str], framework: str, operation: str, device: str
) -> tuple[list[Implementation], dict[str, str]]:
    """All that are named, each once, and where those were found that are not registered.

    With no names, all that are registered and can run on this device.
    """
    from isoform.conformance.registry import registered

    if not names:
        there = []
        for name in registered():
            if isinstance(found := _find(name, framework), str):
                _say(f"not judged: {found}")
            elif any(device in one.capabilities.devices for one in found.offers):
                there.append(found)
        return there, {}
    loaded = {name: _load(name, framework, operation) for name in dict.fromkeys(names)}
    called = [implementation.name for implementation in loaded.values()]
    chosen = [  # two that have the same name are called what they were given as
        replace(found, name=name) if called.count(found.name) > 1 else found
        for name, found in loaded.items()
    ]
    sources = {
        implementation.name: name
        for name, implementation in zip(loaded, chosen, strict=True)
        if ":" in name
    }
    return chosen, sources


def _cases(
    patterns: Sequence[str] | None,
    tags: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    once: Sequence[str] = (),
) -> tuple[list[Case], frozenset[str]]:
    """The cases asked for, and which of ``once``: ids that stand for checks without a case."""
    from isoform.conformance.case import UnknownName, select
    from isoform.conformance.operations import CASES, OPERATIONS

    probe = next(iter(OPERATIONS.values())).probe  # any case will do: only its id is looked at
    known = CASES | {name: replace(probe, id=name) for name in once}
    try:
        chosen = select(known, patterns=patterns or (), tags=tags or (), dtypes=dtypes or ())
    except UnknownName as problem:
        _fail(str(problem))
    cases = [case for case in chosen if case.id in CASES]
    named = frozenset(case.id for case in chosen) - CASES.keys()
    if not cases and not (patterns and named):
        _fail("nothing ran: no case has all of these properties", Code.NOTHING_RAN)
    return cases, named if patterns else frozenset(once)


def _architecture(device: Device) -> str:
    """The architecture of the GPU; leaves if there is none."""
    if device is Device.cpu:
        return ""
    try:
        import torch
    except ModuleNotFoundError:
        _fail("--device cuda needs torch: install it with 'pip install \"isoform[torch]\"'")
    if not torch.cuda.is_available():
        _fail("--device cuda: PyTorch sees no GPU here", Code.NOTHING_RAN)
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@contextmanager
def _written_to(path: Path | None) -> Iterator[None]:
    """Turn an error of writing into one that names the file."""
    try:
        yield
    except OSError as problem:
        _fail(f"cannot write {path}: {problem.strerror}")


def _write_json(document: str, target: str) -> None:
    """Write to a file, or with ``-`` to the standard output."""
    if target == "-":
        typer.echo(document, nl=not document.endswith("\n"))
    elif target:
        from isoform.conformance.run import write_whole

        with _written_to(Path(target)):
            write_whole(document, Path(target))


def _conclude(
    run: Run,
    *,
    json: str = "",
    junit: Path | None = None,
    html: Path | None = None,
    quiet: bool = False,
    failures: int = 5,
    interrupted: bool = False,
    note: str = "",
) -> NoReturn:
    """Print a run, write what was asked for, and leave with the code that fits."""
    from isoform.conformance.console import console, print_briefly, print_run
    from isoform.conformance.summary import summaries

    found = summaries(run)
    to = console(stderr=json == "-")
    if quiet:
        print_briefly(to, found)
    elif found:
        print_run(to, run, found, failures)
    _write_json(run.as_json(), json)
    if junit is not None:
        from isoform.conformance.junit import junit as as_junit
        from isoform.conformance.run import write_whole

        with _written_to(junit):
            write_whole(as_junit(run), junit)
    if html is not None:
        from isoform.conformance.report import save

        with _written_to(html):
            save(run, html)
        note = f"report: {html}"
    if note and not quiet:
        _say(note)
    if interrupted:
        _fail("interrupted; this is what had been judged until then", Code.INTERRUPTED)
    if any(summary.failed for summary in found):
        raise typer.Exit(Code.WRONG)
    if not any(summary.ran for summary in found):
        _fail("nothing ran", Code.NOTHING_RAN)
    raise typer.Exit(Code.PASS)


# The commands.


def _version(shown: bool) -> None:
    if shown:
        version()
        raise typer.Exit


@app.callback()
def isoform(
    shown: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Judge implementations of attention against one written definition.

    Every result and every gradient is held against a float64 oracle, on the shapes of real models
    and on what breaks kernels, within budgets that are measured, not chosen.
    """


@app.command(
    "list",
    cls=_Command,
    epilog=_epilog(
        "isoform list",
        "isoform list --capabilities torch-sdpa",
        "isoform list --cases --tag model --dtype bf16",
        "isoform list --json",
        codes=False,
    ),
)
def list_(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMPL",
            help="Only these implementations; MODULE:OBJECT is taken too.",
            autocompletion=_complete_implementations,
        ),
    ] = None,
    capabilities: Annotated[
        bool, typer.Option("--capabilities", help="Print what each implementation declares.")
    ] = False,
    cases: Annotated[bool, typer.Option("--cases", help="Print the cases instead.")] = False,
    case: Pattern = None,
    tag: Tag = None,
    dtype: Dtype = None,
    framework: Arrays = Framework.torch,
    operation: OfOperation = "",
    json: Json = "",
) -> None:
    """List implementations and whether they can run here, their capabilities, or the cases."""
    from isoform.conformance.console import (
        console,
        print_capabilities,
        print_cases,
        print_implementations,
    )

    if cases or case or tag or dtype:
        chosen, _ = _cases(case, tag, dtype)
        if json:
            _write_json(_cases_as_json(chosen), json)
        else:
            print_cases(console(), chosen)
        return
    entries = _entries(names or (), framework, operation)
    if json:
        import json as js

        _write_json(js.dumps(entries, indent=1), json)
    elif capabilities:
        for name, entry in entries.items():
            if entry["available"]:
                for declared in entry["capabilities"].values():
                    print_capabilities(console(), name, declared)
            else:
                _say(f"{entry['why']}")
    else:
        print_implementations(console(), entries)


def _entries(names: Sequence[str], framework: str, operation: str) -> dict[str, dict[str, Any]]:
    """Implementations as plain data: those named, or all that are registered."""
    from isoform.conformance.registry import registered
    from isoform.conformance.run import declared

    entries: dict[str, dict[str, Any]] = {}
    for name in names or registered():
        found = _load(name, framework, operation) if names else _find(name, framework)
        if isinstance(found, str):
            entries[name] = {"available": False, "why": found}
            continue
        entries[found.name] = {
            "available": True,
            "framework": found.framework,
            "capabilities": declared(found),
        }
    return entries


def _plain_option(x: Any) -> Any:
    """An argument as JSON can hold it: what is no number and no word, as Python writes it."""
    return x if x is None or isinstance(x, bool | int | float | str) else repr(x)


def _cases_as_json(cases: Sequence[Case]) -> str:
    import json

    return json.dumps(
        [
            {
                "id": case.id,
                "operation": case.operation,
                "shape": vars(case.shape),
                "dtype": case.dtype,
                "operands": sorted(case.operands),
                "values": case.values,
                "layout": case.layout,
                "options": {name: _plain_option(x) for name, x in case.options},
                "differentiate": case.differentiate,
                "large": case.large,
                "tags": sorted(case.tags),
                "note": case.note,
            }
            for case in cases
        ],
        indent=1,
    )


@app.command(
    cls=_Command,
    epilog=_epilog(
        "isoform check",
        "isoform check torch-sdpa torch-flex --tag quick",
        "isoform check numpy --case 'evoformer/triangle-*' --dtype fp32",
        "isoform check --impl mymodule:attention --tag quick",
        "isoform check torch-sdpa --json run.json --junit junit.xml --html report.html",
    ),
)
def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMPL",
            help="Registered implementations (see [cyan]isoform list[/]). Without any, and without "
            "--impl: all that can run here.",
            autocompletion=_complete_implementations,
        ),
    ] = None,
    impl: Impl = None,
    case: Pattern = None,
    tag: Tag = None,
    dtype: Dtype = None,
    group: Groups = None,
    device: OnDevice = Device.cpu,
    large: Large = False,
    framework: Arrays = Framework.torch,
    operation: OfOperation = "",
    json: Json = "",
    junit: Junit = None,
    html: Html = None,
    quiet: Quiet = False,
    failures: Failures = 5,
) -> None:
    """Judge implementations against the definition.

    Results, refusals, gradients, precision, side effects, wrong calls and memory, on every case
    unless told otherwise. Each failure names the check, the coordinate, and the command that shows
    it again.
    """
    from isoform.conformance.console import progress
    from isoform.conformance.judge import MEMORY_LENGTHS
    from isoform.conformance.operations import OPERATIONS
    from isoform.conformance.run import Interrupted, run
    from isoform.conformance.verdicts import GROUPS

    groups = group or GROUPS
    invalid = {operation.probe.id: name for name, operation in OPERATIONS.items()}
    memory = {
        operation.memory_case(length).id: name
        for name, operation in OPERATIONS.items()
        for length in MEMORY_LENGTHS
    }
    cases, once = _cases(case, tag, dtype, sorted(invalid | memory))
    chosen, sources = _implementations(
        [*(names or ()), *(impl or ())], framework, operation, device
    )
    architecture = _architecture(device)

    interrupted = False
    with progress(len(chosen) * (len(cases) + 1), shown=not quiet) as step:
        try:
            record = run(
                chosen,
                cases,
                groups=groups,
                device=device,
                architecture=architecture,
                large=large,
                invalid_calls={invalid[name] for name in once & invalid.keys()},
                memory={memory[name] for name in once & memory.keys()},
                progress=lambda whom, what: step(f"{whom.name} {what.id}"),
            )
        except Interrupted as interruption:
            record, interrupted = interruption.run, True
    _conclude(
        replace(record, sources=sources),
        json=json,
        junit=junit,
        html=html,
        quiet=quiet,
        failures=failures,
        interrupted=interrupted,
    )


@app.command(
    cls=_Command,
    epilog=_epilog(
        "isoform compare torch-reference torch-sdpa --tag quick",
        "isoform compare numpy mymodule:attention --case evoformer/length-17/fp32/all-operands",
        "isoform compare torch-reference torch-flex --dtype bf16 --json",
    ),
)
def compare(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="An implementation: a registered name, or MODULE:OBJECT.",
            autocompletion=_complete_implementations,
        ),
    ],
    b: Annotated[
        str,
        typer.Argument(metavar="B", help="Another.", autocompletion=_complete_implementations),
    ],
    case: Pattern = None,
    tag: Tag = None,
    dtype: Dtype = None,
    every: Annotated[
        bool, typer.Option("--every", help="Print each case, not only where the two differ most.")
    ] = False,
    device: OnDevice = Device.cpu,
    large: Large = False,
    framework: Arrays = Framework.torch,
    operation: OfOperation = "",
    json: Json = "",
) -> None:
    """Run two implementations on the same operands and show how far apart they are.

    For every result: the largest difference, the relative Frobenius norm, units of the last
    place, each one's error over its budget, and the worst coordinate with both values and the
    definition's. Fails (1) where one of the two is outside its budget, not where they merely
    differ.
    """
    from isoform.conformance.compare import compare as measure
    from isoform.conformance.console import console, print_comparison, progress

    cases, _ = _cases(case, tag, dtype)
    first, second = _load(a, framework, operation), _load(b, framework, operation)
    if first.name == second.name:
        first, second = replace(first, name=a), replace(second, name=b if a != b else f"{b} again")
    architecture = _architecture(device)
    with progress(len(cases)) as step:
        comparison = measure(
            first,
            second,
            cases,
            device=device,
            architecture=architecture,
            large=large,
            progress=lambda case: step(case.id),
        )
    print_comparison(console(stderr=json == "-"), comparison, every=every)
    _write_json(comparison.as_json(), json)
    if not comparison.differences:
        _fail("nothing ran: there was nothing to compare", Code.NOTHING_RAN)
    raise typer.Exit(Code.PASS if comparison.within else Code.WRONG)


@app.command(
    cls=_Command,
    epilog=_epilog(
        "isoform check --tag quick --json run.json",
        "isoform report run.json -o report.html",
        codes=False,
    ),
)
def report(
    record: Annotated[
        Path,
        typer.Argument(
            metavar="RUN.json",
            help="What [cyan]isoform check --json[/] wrote.",
            exists=True,
            dir_okay=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Where to. [dim]RUN.html[/] if not said."
        ),
    ] = None,
) -> None:
    """Make an HTML report of a run: one file, with its plots, that needs no network."""
    from isoform.conformance.report import save
    from isoform.conformance.run import Run

    try:
        found = Run.from_json(record.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as problem:
        _fail(f"{record} is no record of a run: {problem}")
    target = output or record.with_suffix(".html")
    with _written_to(target):
        save(found, target)
    typer.echo(target)


@app.command(
    cls=_Command,
    epilog=_epilog(
        "isoform replay step.safetensors",
        "isoform replay step.safetensors --impl torch-sdpa --impl mymodule:attention",
        "isoform replay step.safetensors --impl torch-sdpa --call call-0003 --html report.html",
    ),
)
def replay(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="What isoform.conformance.capture recorded in a running model.",
            exists=True,
            dir_okay=False,
        ),
    ],
    impl: Annotated[
        list[str] | None,
        typer.Option(
            "--impl",
            metavar="IMPL",
            help="An implementation: a registered name, or MODULE:OBJECT. May be given several "
            "times. Without any: all that can run here.",
            autocompletion=_complete_implementations,
        ),
    ] = None,
    call: Annotated[
        list[str] | None,
        typer.Option(
            "--call",
            metavar="CALL",
            help="Only these calls, such as call-0003, or shell patterns of them. Several: any of "
            "them.",
        ),
    ] = None,
    group: Groups = None,
    device: OnDevice = Device.cpu,
    framework: Arrays = Framework.torch,
    operation: OfOperation = "",
    json: Json = "",
    junit: Junit = None,
    html: Html = None,
    quiet: Quiet = False,
    failures: Failures = 5,
) -> None:
    """Judge implementations on attention calls that were captured in a running model.

    The operands are the model's own: its dtypes, masks, biases and, where the backward pass was
    captured too, its output gradients.
    """
    from isoform.conformance.case import UnknownName
    from isoform.conformance.console import progress
    from isoform.conformance.replay import cases
    from isoform.conformance.replay import replay as judge_captured
    from isoform.conformance.run import Interrupted
    from isoform.conformance.verdicts import GROUPS

    try:
        most = len(cases(file)) + 1
    except ValueError as problem:
        _fail(str(problem))
    chosen, sources = _implementations(impl or (), framework, operation, device)
    architecture = _architecture(device)
    interrupted = False
    try:
        with progress(len(chosen) * most, shown=not quiet) as step:
            record = judge_captured(
                file,
                chosen,
                calls=call or (),
                groups=group or GROUPS,
                device=device,
                architecture=architecture,
                progress=lambda whom, what: step(f"{whom.name} {what.id}"),
            )
    except UnknownName as problem:
        _fail(str(problem))
    except Interrupted as interruption:
        record, interrupted = interruption.run, True
    _conclude(
        replace(record, sources=sources),
        json=json,
        junit=junit,
        html=html,
        quiet=quiet,
        failures=failures,
        interrupted=interrupted,
    )


@app.command(
    cls=_Command, epilog=_epilog("isoform demo", "isoform demo -o somewhere --json run.json")
)
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Where the files go.")
    ] = Path("report"),
    json: Json = "",
    quiet: Quiet = False,
    failures: Failures = 5,
) -> None:
    """Judge several implementations on a real protein and on the shapes of real models.

    A small, untrained Evoformer is fed an alignment and the distances of a crystal structure; its
    attention is captured, and the implementations are judged on it. Leaves the report, the record
    of the run, the captured operands and a figure of the input.
    """
    from isoform.conformance.console import console, progress
    from isoform.conformance.registry import Unavailable
    from isoform.conformance.run import Interrupted

    interrupted = False
    to = None if quiet else console(stderr=json == "-")
    try:
        from isoform.conformance.demo import REPORT
        from isoform.conformance.demo import demo as show

        with progress(None, shown=not quiet) as step:
            record = show(
                output,
                console=to,
                progress=lambda whom, what: step(f"{whom.name} {what.id}"),
            )
    except ModuleNotFoundError as missing:
        told = "pip install" in str(missing)
        _fail(str(missing if told else Unavailable("isoform demo", missing)))
    except Interrupted as interruption:
        record, interrupted = interruption.run, True
    note = "" if interrupted else f"report: {output / REPORT}"
    _conclude(record, json=json, quiet=quiet, failures=failures, interrupted=interrupted, note=note)


@app.command(
    cls=_Command,
    epilog=_epilog("isoform calibrate", "isoform calibrate rotary_embedding", codes=False),
)
def calibrate(
    operations: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="OPERATION", help="The operations to calibrate. Without any: all of them."
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where: cpu or cuda.")] = "cpu",
) -> None:
    """Measure how much error implementations known to be right make, and put it in force.

    For developers of isoform: whoever changes cases, condition, twin or metrics calibrates anew and
    commits the record, which is part of the package. What was seen on other devices is kept. Takes
    a few minutes.
    """
    from isoform.conformance.budgets import calibration_path
    from isoform.conformance.case import UnknownName
    from isoform.conformance.console import progress
    from isoform.conformance.operations import OPERATIONS
    from isoform.conformance.registry import Unavailable

    chosen = list(dict.fromkeys(operations or OPERATIONS))
    for operation in chosen:
        if operation not in OPERATIONS:
            _fail(str(UnknownName("operation", operation, OPERATIONS.keys())))
    try:
        from isoform.conformance.calibrate import calibrate as measure
        from isoform.conformance.calibrate import save
    except ModuleNotFoundError as missing:
        _fail(str(Unavailable("isoform calibrate", missing)))
    for operation in chosen:
        smaller = [case for case in OPERATIONS[operation].cases.values() if not case.large]
        try:
            with progress(len(smaller)) as step:
                record = measure(operation, device=device, progress=lambda case: step(case.id))
            save(record)
        except RuntimeError as fault:
            _fail(str(fault))
        _say(f"recorded in {calibration_path(operation)}")


@app.command(cls=_Command)
def version() -> None:
    """Print the version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        typer.echo(f"isoform {installed('isoform')}")
    except PackageNotFoundError:
        typer.echo("isoform, from a source tree")


if __name__ == "__main__":
    main()

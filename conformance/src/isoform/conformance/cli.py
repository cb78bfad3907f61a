"""The command line ``isoform``.

Heavy modules are imported by the commands that need them: ``isoform --help`` is there at once, and
what is not installed (PyTorch) is missed only by those who ask for it.

Exit codes: 0 all passed, 1 something is wrong, 2 the command line is, 3 nothing ran,
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from isoform.conformance.case import Case
    from isoform.conformance.implementation import Implementation
    from isoform.conformance.lists import Entry
    from isoform.conformance.ranks import Ranks
    from isoform.conformance.run import Run
    from isoform.parallel.training.world import World


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


class Communicator(StrEnum):
    """What joins ranks."""

    simulated = "simulated"
    mpi = "mpi"
    torch = "torch"
    torch_nccl = "torch-nccl"
    cupy_nccl = "cupy-nccl"


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


class _Commands(TyperGroup):
    """All commands; some are named by two words, as ``plan genome`` beside ``plan``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` begin with, and what follows."""
        together = " ".join(args[:2])
        if len(args) > 1 and together in self.commands:
            args = [together, *args[2:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="isoform",
    cls=_Commands,
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


def _complete_topologies(incomplete: str) -> list[str]:
    from isoform.parallel.planner import topologies

    return [name for name in topologies() if name.startswith(incomplete)]


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
OverRanks = Annotated[
    int | None,
    typer.Option(
        "--ranks",
        metavar="P",
        min=1,
        help="Over how many ranks to run those that run over many, [cyan]parallel/…[/]; they are "
        "started here. [dim]4 if not said.[/] Without any names: only those.",
    ),
]
JoinedBy = Annotated[
    Communicator | None,
    typer.Option(
        "--communicator",
        help="What the ranks are. simulated: threads of one process, which name a deadlock. mpi: "
        "processes started by mpiexec. torch: processes joined by gloo, with PyTorch tensors; with "
        "--device cuda a process to a GPU, joined by NCCL. torch-nccl, cupy-nccl: the same, by "
        "NCCL of PyTorch or of CuPy. [dim]simulated if not said, on GPUs torch.[/]",
    ),
]
Limit = Annotated[
    float,
    typer.Option(
        "--limit",
        metavar="SECONDS",
        help="What a call over ranks may take before mpi's or torch's are all ended.",
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
Skips = Annotated[
    list[Path] | None,
    typer.Option(
        "--skip",
        metavar="FILE",
        help="Do not run what this file lists: a case or pattern and, behind a #, a reason, a line "
        "each.",
    ),
]
KnownFaults = Annotated[
    list[Path] | None,
    typer.Option(
        "--xfail",
        metavar="FILE",
        help="What this file lists is known to fail: a case or pattern, a check if one alone is "
        "meant, and, behind a #, a reason. What does not fail any more fails the run.",
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only say what failed, a line each; no progress bar.")
]
Failures = Annotated[
    int, typer.Option("--failures", metavar="N", min=0, help="Show this many failed cases in full.")
]


Captured = Annotated[
    Path | None,
    typer.Option(
        "--file",
        metavar="FILE",
        help="Instead of a case: a call kept in a file, by capture, shrink or fuzz.",
        exists=True,
        dir_okay=False,
    ),
]
OneCall = Annotated[
    str,
    typer.Option("--call", metavar="CALL", help="Which call of the file, if it holds several."),
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


def _over(
    size: int | None, communicator: Communicator | None, limit: float, device: Device
) -> tuple[Ranks | None, Device]:
    """The ranks asked for, or None, and the device that is meant; leaves where they cannot be had.

    Those of NCCL are on GPUs, whether that is said or not.
    """
    if size is None and communicator is None:
        return None, device
    from isoform.conformance.ranks import RankError, Ranks

    default = Communicator.torch if device is Device.cuda else Communicator.simulated
    ranks = Ranks(size or Ranks.size, (communicator or default).value, limit).on(device)
    if device is Device.cuda and ranks.device != device:
        _fail(
            f"--device cuda: ranks of {ranks.communicator} compute on processors; those of "
            "--communicator torch, torch-nccl or cupy-nccl have a GPU each"
        )
    try:
        ranks.require()
    except ImportError as missing:
        _fail(str(missing))
    except RankError as absent:
        _fail(str(absent), Code.NOTHING_RAN)
    return ranks, Device(ranks.device)


def _implementations(
    names: Sequence[str], framework: str, operation: str, device: str, over: Ranks | None = None
) -> tuple[list[Implementation], dict[str, str]]:
    """All that are named, each once, and where those were found that are not registered.

    With no names, all that are registered and can run on this device: over ranks where ``over``
    says which, else those that run in one place.
    """
    from isoform.conformance.registry import registered

    if not names:
        there = []
        for name in registered():
            if isinstance(found := _find(name, framework), str):
                _say(f"not judged: {found}")
                continue
            if (found.spread is None) != (over is None):
                continue
            found = found if over is None else found.on(over)
            if any(device in one.capabilities.devices for one in found.offers):
                there.append(found)
        return there, {}
    loaded = {name: _load(name, framework, operation) for name in dict.fromkeys(names)}
    if over is not None:
        if all(found.spread is None for found in loaded.values()):
            _fail(f"--ranks, --communicator: none of {', '.join(loaded)} runs over ranks")
        loaded = {name: found.on(over) for name, found in loaded.items()}
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


def _listed(files: Sequence[Path] | None, once: Sequence[str], checks: bool) -> tuple[Entry, ...]:
    """The entries of lists, whose cases may be of ``once`` too; leaves where one is wrong."""
    from isoform.conformance.case import UnknownName
    from isoform.conformance.lists import read
    from isoform.conformance.operations import CASES

    try:
        known = [*CASES, *once]
        return tuple(entry for file in files or () for entry in read(file, known, checks=checks))
    except (OSError, ValueError, UnknownName) as problem:
        _fail(str(problem))


def _one_case(case_id: str, file: Path | None, call: str) -> Case:
    """The case called ``case_id``, or the call of ``file``; leaves unless it is one."""
    from isoform.conformance.case import UnknownName, select
    from isoform.conformance.operations import CASES

    if bool(case_id) == (file is not None):
        _fail("say which call: --case ID, or --file FILE, and --call where it holds several")
    known: Mapping[str, Case] = CASES
    pattern = case_id
    if file is not None:
        from isoform.conformance.replay import cases as recorded

        try:
            known = recorded(file)
        except ValueError as problem:
            _fail(str(problem))
        pattern = f"*/{call or '*'}"
    try:
        found = select(known, patterns=[pattern])
    except UnknownName as problem:
        _fail(str(problem))
    if len(found) > 1:
        calls = ", ".join(each.id.rpartition("/")[2] if file else each.id for each in found[:4])
        _fail(f"{len(found)} calls are meant, one is wanted: {calls} …")
    return found[0]


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
    gone: Sequence[Entry] = (),
    note: str = "",
) -> NoReturn:
    """Print a run, write what was asked for, and leave with the code that fits.

    What is known to fail and does not any more, ``gone`` of the lists given, fails a run too.
    """
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
    for entry in gone:
        _say(f"{entry}: does not fail any more: take it out")
    if interrupted:
        _fail("interrupted; this is what had been judged until then", Code.INTERRUPTED)
    if gone or any(summary.failed or summary.mended for summary in found):
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
        "isoform list --peers",
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
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Print other people's kernels that can be judged by name."),
    ] = False,
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
    entries = _peers() if peers else _entries(names or (), framework, operation)
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


def _peers() -> dict[str, dict[str, Any]]:
    """Peers as plain data: what they declare, or why they are not run here."""
    from isoform.conformance.peers import PEERS

    entries = {}
    for name, peer in PEERS.items():
        entries[name] = {"available": False, "why": f"{peer.function} {peer.why_not()}"}
        if not peer.why_not():
            entries[name] = _entries([name], "torch", "")[name]
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
        "isoform check parallel/ring-zigzag --ranks 4 --communicator mpi",
        "isoform check parallel/ring-zigzag --ranks 2 --communicator torch --device cuda",
        "isoform check torch-sdpa --json run.json --junit junit.xml --html report.html",
        "isoform check --impl mymodule:attention --skip skip.txt --xfail xfail.txt",
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
    ranks: OverRanks = None,
    communicator: JoinedBy = None,
    limit: Limit = 60.0,
    json: Json = "",
    junit: Junit = None,
    html: Html = None,
    skip: Skips = None,
    xfail: KnownFaults = None,
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
    from isoform.conformance.lists import excused, gone, skipped
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
    left_out = _listed(skip, (), checks=False)
    known = _listed(xfail, sorted(invalid | memory), checks=True)
    over, device = _over(ranks, communicator, limit, device)
    chosen, sources = _implementations(
        [*(names or ()), *(impl or ())], framework, operation, device, over
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
                skip=lambda case_id: skipped(case_id, left_out),
                progress=lambda whom, what: step(f"{whom.name} {what.id}"),
            )
        except Interrupted as interruption:
            record, interrupted = interruption.run, True
    _conclude(
        replace(
            record,
            sources=sources,
            outcomes=tuple(excused(outcome, known) for outcome in record.outcomes),
        ),
        json=json,
        junit=junit,
        html=html,
        quiet=quiet,
        failures=failures,
        interrupted=interrupted,
        gone=[] if interrupted else gone(record.outcomes, known),
    )


@app.command(
    cls=_Command,
    epilog=_epilog(
        "isoform compare torch-reference torch-sdpa --tag quick",
        "isoform compare numpy mymodule:attention --case evoformer/length-17/fp32/all-operands",
        "isoform compare torch-reference torch-flex --dtype bf16 --json",
        "isoform compare numpy mymodule:attention --case evoformer/length-65/fp32/all-operands "
        "--explain",
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
    file: Captured = None,
    call: OneCall = "",
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Of one case: walk through the definition and say at which step, tile and "
            "coordinate the two part.",
        ),
    ] = False,
    tile: Annotated[
        int,
        typer.Option("--tile", metavar="N", min=1, help="Queries and keys of a tile, to explain."),
    ] = 64,
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

    if explain or file is not None:
        cases = [_one_case(next(iter(case or ()), ""), file, call)]
    else:
        cases, _ = _cases(case, tag, dtype)
    first, second = _load(a, framework, operation), _load(b, framework, operation)
    if first.name == second.name:
        first, second = replace(first, name=a), replace(second, name=b if a != b else f"{b} again")
    architecture = _architecture(device)
    if explain:
        _explain(first, second, cases[0], tile, device, json)
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


def _explain(
    a: Implementation, b: Implementation, case: Case, tile: int, device: Device, json: str
) -> NoReturn:
    """Print where two implementations part, and leave."""
    from isoform.conformance.console import console, print_explanation
    from isoform.conformance.explain import Unexplained
    from isoform.conformance.explain import explain as walk

    try:
        found = walk(a, b, case, tile=tile, device=device)
    except Unexplained as problem:
        _fail(str(problem), Code.NOTHING_RAN)
    print_explanation(console(stderr=json == "-"), found)
    if json:
        import json as js

        from isoform.conformance.run import plain

        _write_json(js.dumps(plain(found.as_json()), indent=1), json)
    raise typer.Exit(Code.WRONG if found.faults else Code.PASS)


def _write_matrix(paths: Sequence[Path], target: Path) -> None:
    """Write the page of implementations × behaviours, and say where it is."""
    from isoform.conformance.matrix import html, read
    from isoform.conformance.run import write_whole

    try:
        found = [record for path in paths for record in read(path)]
    except ValueError as problem:
        _fail(str(problem))
    with _written_to(target):
        write_whole(html(found), target)
    typer.echo(target)


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
        Path | None,
        typer.Argument(
            metavar="[RUN.json]",
            help="What [cyan]isoform check --json[/] wrote.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    benchmarks: Annotated[
        Path | None,
        typer.Option(
            "--benchmarks",
            metavar="RECORDS.jsonl",
            help="Benchmarks to be drawn too, or alone: what [cyan]python -m "
            "isoform.kernels.benchmark --record[/] wrote.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    scaling: Annotated[
        Path | None,
        typer.Option(
            "--scaling",
            metavar="RECORDS.jsonl",
            help="Attention over several GPUs, to be drawn too, or alone: what [cyan]python -m "
            "isoform.parallel.benchmark.scaling --record[/] wrote.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    matrix: Annotated[
        list[Path] | None,
        typer.Option(
            "--matrix",
            metavar="RECORD",
            help="Instead: a page of implementations × behaviours, of runs (RUN.json) and of "
            "records such as ci/results/peers.jsonl. May be given several times.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Where to. [dim]RUN.html[/] if not said."
        ),
    ] = None,
) -> None:
    """Make an HTML report of a run, of benchmarks, or of several: one file, with its plots, that
    needs no network.
    """
    if matrix:
        if record or benchmarks or scaling:
            _fail("--matrix makes a page of its own: name its records with --matrix alone")
        _write_matrix(matrix, output or matrix[0].with_suffix(".html"))
        return
    from isoform.conformance.benchmarks import boards
    from isoform.conformance.report import save
    from isoform.conformance.run import Run
    from isoform.conformance.scaling import charts
    from isoform.kernels.benchmark.records import RecordError

    source = record or benchmarks or scaling
    if source is None:
        _fail("nothing to report: name a RUN.json, or --benchmarks or --scaling RECORDS.jsonl")
    found = Run(())
    if record is not None:
        try:
            found = Run.from_json(record.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError) as problem:
            _fail(f"{record} is no record of a run: {problem}")
    try:
        drawn = boards(benchmarks) if benchmarks is not None else ()
    except (RecordError, UnicodeDecodeError) as problem:
        _fail(f"no benchmarks: {problem}")
    try:
        over = charts(scaling) if scaling is not None else ()
    except (ValueError, UnicodeDecodeError) as problem:
        _fail(f"no records of scaling: {problem}")
    target = output or source.with_suffix(".html")
    with _written_to(target):
        save(found, target, boards=drawn, charts=over)
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
    epilog=_epilog(
        "isoform shrink mymodule:attention --case evoformer/length-65/fp32/all-operands",
        "isoform shrink torch-sdpa --file step.safetensors --call call-0003 -o small.safetensors",
    ),
)
def shrink(
    name: Annotated[
        str,
        typer.Argument(
            metavar="IMPL",
            help="Who fails: a registered name, or MODULE:OBJECT.",
            autocompletion=_complete_implementations,
        ),
    ],
    case: Annotated[
        str,
        typer.Option(
            "--case", "-c", metavar="ID", help="A case it fails.", autocompletion=_complete_cases
        ),
    ] = "",
    file: Captured = None,
    call: OneCall = "",
    only: Annotated[
        str,
        typer.Option(
            "--check",
            metavar="CHECK",
            help="The check to keep, such as out/condition. [dim]The first that fails, if not "
            "said.[/]",
        ),
    ] = "",
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Where the call is written.")
    ] = Path("shrunk.safetensors"),
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=1, help="Search this long at most.")
    ] = 60.0,
    device: OnDevice = Device.cpu,
    framework: Arrays = Framework.torch,
    operation: OfOperation = "",
    json: Json = "",
    quiet: Quiet = False,
) -> None:
    """Cut a failing call down to the smallest that still fails the same check.

    Axes are shortened, operands left out or filled with zeros, ones and integers, options dropped.
    What is left is written to a file, and the command that judges it again is printed. Ctrl-C
    ends the search with the smallest call found until then.
    """
    from isoform.conformance.console import console, print_shrunk, progress
    from isoform.conformance.run import Run, declared
    from isoform.conformance.shrink import Passes, save
    from isoform.conformance.shrink import shrink as cut_down
    from isoform.conformance.summary import CAPTURED, command

    implementation = _load(name, framework, operation)
    chosen = _one_case(case, file, call)
    if implementation.of(chosen.operation) is None:
        _fail(f"{name} does not offer {chosen.operation}")
    try:
        with progress(None, shown=not quiet) as step:
            found = cut_down(
                implementation,
                chosen,
                check=only,
                device=device,
                architecture=_architecture(device),
                seconds=seconds,
                progress=step,
            )
    except Passes as problem:
        _fail(str(problem), Code.NOTHING_RAN)
    with _written_to(output):
        kept = save(found, output)
    record = Run(
        (replace(found.outcome, case=kept.id),),
        {implementation.name: declared(implementation)},
        {CAPTURED: str(output), "device": str(device)},
        {implementation.name: name} if ":" in name else {},
    )
    again = command(record, record.outcomes[0])
    print_shrunk(console(stderr=json == "-"), found, again)
    if json:
        import json as js

        document = found.as_json() | {"file": str(output), "command": again}
        _write_json(js.dumps(document, indent=1), json)
    raise typer.Exit(Code.WRONG)


@app.command(
    cls=_Command,
    epilog=_epilog(
        "isoform fuzz mymodule:attention --minutes 5",
        "isoform fuzz torch-sdpa --minutes 1 --seed 7 --json found.json",
        "isoform fuzz torch-sdpa --seed 7 --only 1234",
    ),
)
def fuzz(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMPL",
            help="Registered names, or MODULE:OBJECT. Without any: all that can run here.",
            autocompletion=_complete_implementations,
        ),
    ] = None,
    minutes: Annotated[
        float,
        typer.Option("--minutes", metavar="N", min=0.01, help="How long, for all together."),
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            min=0,
            help="What the calls are drawn from. [dim]Another each time, if not said.[/]",
        ),
    ] = None,
    only: Annotated[
        int | None,
        typer.Option("--only", metavar="N", min=0, help="Make this one call of the seed's."),
    ] = None,
    limit: Annotated[
        float,
        typer.Option(
            "--limit", metavar="S", min=1, help="A call that takes more seconds counts as a hang."
        ),
    ] = 60.0,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="DIR", help="Where what is found is written."),
    ] = Path("fuzz"),
    device: OnDevice = Device.cpu,
    framework: Arrays = Framework.torch,
    operation: OfOperation = "",
    json: Json = "",
    quiet: Quiet = False,
) -> None:
    """Draw random calls, valid and invalid, until time is up, and keep what goes wrong.

    The calls are made in a process of their own: what dies of a signal or hangs is found too, and
    so are writes beside operands and outputs, and wrong numbers. Ctrl-C ends it with the summary.
    """
    import random

    from isoform.conformance.console import console, print_fuzzed, progress
    from isoform.conformance.fuzz import as_json
    from isoform.conformance.fuzz import fuzz as draw_calls

    chosen, sources = _implementations(names or (), framework, operation, device)
    if not chosen:
        _fail("nothing ran: no implementation can run here", Code.NOTHING_RAN)
    _architecture(device)  # leaves if there is none
    drawn_from = random.randrange(2**31) if seed is None else seed
    runs = []
    with progress(None, shown=not quiet) as step:
        for implementation in chosen:
            try:
                found = draw_calls(
                    implementation,
                    sources.get(implementation.name, implementation.name),
                    seconds=60 * minutes / len(chosen),
                    seed=drawn_from,
                    directory=output,
                    options={"framework": framework, "operation": operation or None},
                    device=device,
                    limit=limit,
                    only=only,
                    progress=step,
                )
            except RuntimeError as problem:
                _fail(str(problem))
            runs.append(found)
            if found.interrupted:
                break
    for found in runs:
        again = ["isoform", "fuzz", sources.get(found.implementation, found.implementation)]
        again += ["--framework", "numpy"] if framework == "numpy" else []
        again += ["--operation", operation] if operation else []
        again += ["--device", str(device)] if device is not Device.cpu else []
        print_fuzzed(console(stderr=json == "-"), found, " ".join(again))
    _write_json(as_json(runs), json)
    if any(found.interrupted for found in runs):
        _fail("interrupted; this is what had been found until then", Code.INTERRUPTED)
    if any(found.counts for found in runs):
        raise typer.Exit(Code.WRONG)
    if not any(found.calls for found in runs):
        _fail("nothing ran", Code.NOTHING_RAN)
    raise typer.Exit(Code.PASS)


@app.command(
    cls=_Command,
    epilog=_epilog(
        "isoform plan --length 1M --heads 32 --kv-heads 8 --head-dim 128 --ranks 64",
        "isoform plan --length 512K --heads 16 --ranks 256 --topology mine.toml --plot time.png",
        "isoform plan --length 64K --heads 8 --ranks 4 --tflops 80 --level 4,20,5",
        codes=False,
    ),
)
def plan(
    length: Annotated[
        str,
        typer.Option(
            "--length", "-L", metavar="L", help="Positions in the sequence: 4096, 512K, 1M (2²⁰)."
        ),
    ],
    heads: Annotated[int, typer.Option("--heads", metavar="H", min=1, help="Query heads.")],
    ranks: Annotated[int, typer.Option("--ranks", "-P", metavar="P", min=1, help="Ranks.")],
    kv_heads: Annotated[
        int | None,
        typer.Option(
            "--kv-heads", metavar="G", min=1, help="Key/value heads; H of them, if not said."
        ),
    ] = None,
    head_dim: Annotated[
        int, typer.Option("--head-dim", metavar="D", min=1, help="Channels of a head.")
    ] = 128,
    batch: Annotated[int, typer.Option("--batch", metavar="B", min=1, help="Examples.")] = 1,
    dtype: Annotated[
        str, typer.Option("--dtype", "-d", metavar="DTYPE", help="fp16, bf16, fp32 or fp64.")
    ] = "bf16",
    causal: Annotated[
        bool, typer.Option("--causal/--full", help="Whether queries see no later position.")
    ] = True,
    window: Annotated[
        str,
        typer.Option(
            "--window",
            metavar="N",
            help="How far a query looks, both ways; or LEFT,RIGHT, where -1 is no end.",
        ),
    ] = "",
    documents: Annotated[
        str,
        typer.Option(
            "--documents",
            metavar="N",
            help="The sequence is packed with documents of N positions, which do not see each "
            "other.",
        ),
    ] = "",
    sharding: Annotated[
        list[str] | None,
        typer.Option(
            "--sharding",
            metavar="KIND",
            help="Only this division: contiguous, zigzag, striped, or striped:BLOCK. Several: any "
            "of them.",
        ),
    ] = None,
    topology: Annotated[
        str,
        typer.Option(
            "--topology",
            metavar="NAME",
            help="The machine: h100 (nodes of eight, 400 Gb/s each), laptops, or a .toml file.",
            autocompletion=_complete_topologies,
        ),
    ] = "h100",
    link: Annotated[
        list[str] | None,
        typer.Option(
            "--level",
            metavar="LEVEL",
            help="Instead of a topology: RANKS,GB/s,µs. How many consecutive ranks are joined, how "
            "much one can send, and how long a message takes besides. Several: near ones first; "
            "the last may leave out RANKS and joins all.",
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            "--tflops", metavar="T", help="How fast a rank computes attention, in 10¹² a second."
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory", metavar="GB", help="Of a rank; what needs more is declined."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw the time against the number of ranks: a .png, .svg or .pdf file.",
        ),
    ] = None,
    up_to: Annotated[
        int, typer.Option("--up-to", metavar="P", min=1, help="Draw up to this many ranks.")
    ] = 4096,
    json: Json = "",
) -> None:
    """Predict what attention over many ranks costs, by strategy and sharding, best first.

    Bytes and messages are exact, and so is the balance of work. Memory is that of arrays in the
    NumPy strategies, to a few percent. Time is a model: bandwidths, latencies, and a rate.

    Exit codes: 0 something will do, 1 nothing fits the memory, 2 usage.
    """
    from isoform.conformance import planning
    from isoform.conformance.console import console, progress

    try:
        asked = planning.request(
            length=length,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            batch=batch,
            dtype=dtype,
            ranks=ranks,
            causal=causal,
            window=window,
            document=documents,
            shardings=sharding or (),
            topology=topology,
            levels=link or (),
            tflops=tflops,
            memory=memory,
        )
        found = asked.plan()
        if plot is not None:
            counts = planning.world_sizes(up_to, ranks)
            with progress(len(counts)) as step, _written_to(plot):
                planning.save_plot(asked, plot, counts, step)
    except planning.WrongRequest as problem:
        _fail(str(problem))
    if json != "-":
        planning.print_plan(console(), asked, found)
    _write_json(planning.as_json(asked, found), json)
    if plot is not None:
        _say(f"plot: {plot}")
    raise typer.Exit(Code.PASS if found.ranked else Code.WRONG)


@app.command(
    "plan genome",
    cls=_Command,
    epilog=_epilog(
        "isoform plan genome --model 25B --gpus 64 --memory 40GB",
        "isoform plan genome --model 2.5B --memory 80GB --length 512K",
        "isoform plan genome --gpus 16 --memory 40GB --plot memory.png --json plan.json",
        "isoform plan genome --paper",
        "isoform plan genome --record genome.jsonl",
        codes=False,
    ),
)
def plan_genome(
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME", help="25M, 250M, 2.5B, 25B or 33B.")
    ] = "25B",
    gpus: Annotated[int, typer.Option("--gpus", metavar="P", min=1, help="Ranks.")] = 1,
    memory: Annotated[
        str, typer.Option("--memory", metavar="SIZE", help="Of a GPU: 40GB, or 80GiB.")
    ] = "80GB",
    host: Annotated[
        str, typer.Option("--host", metavar="SIZE", help="Of the host's memory, for each GPU.")
    ] = "128GB",
    length: Annotated[
        str,
        typer.Option(
            "--length", "-L", metavar="L", help="What is held at this length, not at the longest."
        ),
    ] = "",
    dtype: Annotated[
        str, typer.Option("--dtype", "-d", metavar="DTYPE", help="fp16, bf16, fp32 or fp64.")
    ] = "bf16",
    positions: Annotated[
        str,
        typer.Option(
            "--positions", metavar="KIND", help="rotary, or learned, with a row for every token."
        ),
    ] = "rotary",
    sequence: Annotated[
        int | None,
        typer.Option(
            "--sequence", metavar="N", min=1, help="Only layouts with so many ranks to a sequence."
        ),
    ] = None,
    tensor: Annotated[
        int | None,
        typer.Option("--tensor", metavar="N", min=1, help="Only those that share tensors so."),
    ] = None,
    pipeline: Annotated[
        int | None, typer.Option("--pipeline", metavar="N", min=1, help="Only so many stages.")
    ] = None,
    head_groups: Annotated[
        int, typer.Option("--head-groups", metavar="N", min=1, help="Groups of heads.")
    ] = 4,
    tile: Annotated[
        int, typer.Option("--tile", metavar="N", min=1, help="Tokens in a tile of MLP and loss.")
    ] = 16384,
    every: Annotated[
        int, typer.Option("--every", metavar="N", min=1, help="Keep one input of so many blocks.")
    ] = 1,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Beside the lengths that were reported of GenSLM's models."),
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(
            "--record",
            metavar="FILE",
            help="Beside what python -m isoform.parallel.benchmark.genome has measured.",
        ),
    ] = None,
    within: Annotated[
        float,
        typer.Option("--within", metavar="PERCENT", min=0, help="How far --record may be off."),
    ] = 10.0,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", help="Draw what holds memory: a .png, .svg or .pdf file."
        ),
    ] = None,
    json: Json = "",
) -> None:
    """Say how long a sequence a genome model can be trained on, and what holds the memory.

    Of the older scheme, of every technique, and of all but one of them, by the layout of ranks that
    is best for each. It is arithmetic, item by item, within 10 % of peaks that were measured.

    Exit codes: 0 something fits, 1 nothing does, or a record is off by more, 2 usage.
    """
    from isoform.conformance.console import console

    try:
        from isoform.conformance import planning_genome as genome
    except ModuleNotFoundError as missing:
        from isoform.conformance.registry import Unavailable

        _fail(str(Unavailable("isoform plan genome", missing)))
    from isoform.conformance import planning

    to, shown = console(), json != "-"
    try:
        if paper + (record is not None) + (plot is not None) > 1:
            raise planning.WrongRequest("--paper, --record and --plot do not go together")
        if record is not None:
            compared = genome.read_record(record)
            if shown:
                genome.print_compared(to, compared, within / 100)
            _write_json(genome.compared_as_json(compared), json)
            good = all(abs(one.error) <= within / 100 for one in compared)
            raise typer.Exit(Code.PASS if good else Code.WRONG)
        if paper:
            from isoform.parallel.training.published import rows

            table = rows()
            if shown:
                genome.print_published(to, table)
            _write_json(genome.published_as_json(table), json)
            raise typer.Exit(Code.PASS)
        degrees = {"sequence": sequence, "tensor": tensor, "pipeline": pipeline}
        asked = genome.request(
            model=model,
            gpus=gpus,
            memory=memory,
            host=host,
            dtype=dtype,
            positions=positions,
            degrees=degrees,
            head_groups=head_groups,
            tile=tile,
            every=every,
        )
        found = asked.found(planning.positions(length, "--length") if length else None)
        if plot is not None:
            with _written_to(plot):
                genome.save_plot(asked, found, plot)
    except planning.WrongRequest as problem:
        _fail(str(problem))
    if shown:
        genome.print_longest(to, asked, found)
    _write_json(genome.as_json(asked, found), json)
    if plot is not None:
        _say(f"plot: {plot}")
    fits = any(one is not None and one.fits for one in found.values())
    raise typer.Exit(Code.PASS if fits else Code.WRONG)


@app.command(
    "train-genome",
    cls=_Command,
    epilog=_epilog(
        "isoform train-genome",
        "isoform train-genome --fasta genome.fa.gz --steps 2000 -o run --plot curve.png",
        "torchrun --nproc-per-node 4 --no-python isoform train-genome --config run.toml -o run",
        "mpiexec -n 4 isoform train-genome --config run.toml -o run",
        codes=False,
    ),
)
def train_genome(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="A TOML file with tables data, model, switches and training. What it does not say "
            "is as in the default: a model that a processor trains in minutes.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    fasta: Annotated[
        list[Path] | None,
        typer.Option(
            "--fasta",
            metavar="FILE",
            help="Train on this genome, not on those that the settings name; gzip too. Several: on "
            "all of them. [dim]Escherichia coli K-12, if none is named.[/]",
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="The folder of the run: log, checkpoints, and the genome as it is read. One that "
            "has checkpoints goes on from the last. All ranks must see it.",
        ),
    ] = Path("genome-run"),
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", min=1, help="How many, instead of the settings'."),
    ] = None,
    device: Annotated[Device, typer.Option("--device", help="Where to train.")] = Device.cpu,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", help="Draw the losses at the end: a .png, .svg or .pdf file."
        ),
    ] = None,
    json: Annotated[
        str,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write what it came to as JSON; - is the standard output, nothing else there.",
        ),
    ] = "",
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Only say what it came to; no progress bar.")
    ] = False,
) -> None:
    """Train a language model of a genome, on one processor or on many ranks.

    The last part of the genome is held out, and predicted now and then; so is it by a Markov model
    of the other part, whose cross entropy is the line to get below.

    Started by torchrun, mpiexec or srun it is one rank of a run: ranks share each sequence, if the
    settings do not say otherwise. A run that was ended, however, goes on when the same command is
    given again: bit for bit on as many ranks, to rounding on others.

    Exit codes: 0 trained, 1 ended before that, 2 usage, 130 interrupted.
    """
    from isoform.conformance.registry import Unavailable

    try:
        from isoform.conformance import train_genome as genome
        from isoform.parallel.communicator import CommunicationError
        from isoform.parallel.training import checkpoint, loop
        from isoform.parallel.training import world as worlds
        from isoform.parallel.training.fasta import BadFasta
        from isoform.parallel.training.settings import WrongSettings
    except ModuleNotFoundError as missing:
        _fail(str(Unavailable("isoform train-genome", missing)))
    from isoform.conformance.console import console
    from isoform.reference.contract import Unsupported

    here = worlds.World()
    try:
        here = worlds.world()
        if plot is not None and plot.suffix not in genome.PICTURES:
            raise WrongSettings(f"--plot must be a {', '.join(genome.PICTURES)} file, got {plot}")
        _architecture(device)
        settings = genome.asked(config, fasta or (), steps)
        to = console(stderr=json == "-")
        with (
            worlds.joined(
                here, device=device, group=settings.switches.optimizer != "replicated"
            ) as comm,
            genome.told(to, settings, quiet=quiet or here.rank > 0) as report,
        ):
            found = loop.train(settings, output, comm=comm, device=device, report=report)
    except (WrongSettings, BadFasta, checkpoint.WrongCheckpoint, Unsupported) as problem:
        _fail(f"{_rank(here)}{problem}")
    except (CommunicationError, ImportError) as problem:
        _fail(f"{_rank(here)}{problem}")
    except OSError as problem:
        _fail(f"{_rank(here)}{problem.filename or 'a file'}: {problem.strerror or problem}")
    except loop.Diverged as problem:
        _fail(f"{_rank(here)}{problem}", Code.WRONG)
    except KeyboardInterrupt:
        _fail(
            f"{_rank(here)}interrupted; the same command goes on from the last checkpoint",
            Code.INTERRUPTED,
        )
    except RuntimeError as problem:
        if here.ranks == 1:
            raise
        _fail(  # what torch.distributed says of a rank that is gone
            f"{_rank(here)}{problem}; the same command goes on from the last checkpoint",
            Code.WRONG,
        )
    if here.rank > 0:
        return
    log = output / loop.LOG
    genome.print_outcome(to, found, settings.data.markov, log)
    if plot is not None:
        with _written_to(plot):
            genome.draw(plot, loop.read_log(log))
        _say(f"plot: {plot}")
    _write_json(genome.as_json(found, settings.data.markov), json)


def _rank(here: World) -> str:
    """Whose message it is, where there are several ranks."""
    return f"rank {here.rank}: " if here.ranks > 1 else ""


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
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, help="Processes. Without: one for every core."),
    ] = None,
) -> None:
    """Measure how much error implementations known to be right make, and put it in force.

    For developers of isoform: whoever changes cases, condition, twin or metrics calibrates anew and
    commits the record, which is part of the package. What was seen on other devices is kept. Takes
    a few minutes on two cores, less on more.
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
                record = measure(
                    operation,
                    device=device,
                    jobs=jobs or os.cpu_count() or 1,
                    progress=lambda case: step(case.id),
                )
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

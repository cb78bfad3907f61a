"""Replay: implementations judged on operands that were kept in a file.

Such a file is one ``.safetensors`` file. :mod:`isoform.conformance.capture` writes what it saw in a
running model; ``isoform shrink`` and ``isoform fuzz`` write calls that fail (:func:`write`). It
holds the tensors ``call-0003/q``, ``call-0003/pair_bias`` … and in the header, under :data:`KEY`, a
JSON document that says what each call was. Each call becomes a case,
``captured/FILE/bf16/call-0003``, held against the same oracle within the same budgets as any other.

Gradients need a cotangent. Where the model's own output gradient was captured it is that; where
there was none, or it says nothing (all zeros, NaN or infinite), one is drawn at random, and the
case's note and the run's environment say so.

Reading needs NumPy and safetensors alone, not PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from isoform.conformance.case import Case, Operands, select
from isoform.conformance.dtypes import FORMATS, Array
from isoform.conformance.implementation import DEFAULT_OPERATION, Implementation
from isoform.conformance.operation import RecordedCase
from isoform.conformance.run import Interrupted, Progress, Run, run
from isoform.conformance.signatures import SIGNATURES
from isoform.conformance.summary import CAPTURED
from isoform.conformance.verdicts import GROUPS
from isoform.reference.rotary_scaling import SCALINGS

KEY = "isoform.capture"
"""Where in the header's metadata the document is."""

SCHEMA = 1
"""Version of the document."""

RANDOM = "random-cotangent"
"""Tag of the cases that are not judged with the model's own output gradient."""


@dataclass(frozen=True)
class RecordedCall:
    """One call, of a model's attention or of any operation.

    Attributes:
        name: ``call-0003``, counted from 0 in the order of the calls.
        module: Qualified name of the module that made it; empty if none did.
        function: The function that was called.
        operands: Which operands there are, the required ones included.
        scale: Factor of the logits; None for the default.
        gradient: Whether the gradient of the output is there too.
        device: Where the operands were.
        notes: What was changed to bring the call into the form of the contract, and what was not
            captured of it.
        operation: The operation's name.
        options: The other arguments that are no arrays, as JSON has them (:func:`plain_options`).
        differentiate: Whether gradients are judged; None for where all that is attended is finite.
        strides: How operands lay in memory that were not contiguous, in bytes; by name.
    """

    name: str
    module: str
    function: str
    operands: tuple[str, ...]
    scale: float | None
    gradient: bool
    device: str
    notes: tuple[str, ...] = ()
    operation: str = DEFAULT_OPERATION
    options: Mapping[str, Any] = field(default_factory=dict)
    differentiate: bool | None = None
    strides: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class LeftOut:
    """Calls that were seen and not recorded.

    Attributes:
        module: Qualified name of the module that made them.
        function: The function that was called.
        reason: Why they were left out.
        calls: How many.
    """

    module: str
    function: str
    reason: str
    calls: int


@dataclass(frozen=True)
class Recording:
    """What a captured file says, without its tensors.

    Attributes:
        path: The file.
        calls: The calls, in order.
        left_out: What is not there, and why.
        environment: When and with which versions it was captured.
        interrupted: The exception that ended it; empty if none did.
    """

    path: Path
    calls: tuple[RecordedCall, ...]
    left_out: tuple[LeftOut, ...]
    environment: dict[str, str]
    interrupted: str = ""

    def tensors(self, call: RecordedCall) -> Operands:
        """The operands of ``call``, and ``dout`` if it was captured."""
        names = (*call.operands, *(["dout"] if call.gradient else []))
        with _opened(self.path) as file:
            found = {name: file.get_tensor(f"{call.name}/{name}") for name in names}
        return found | {
            name: laid_out(found[name], strides) for name, strides in call.strides.items()
        }


def read(path: Path | str) -> Recording:
    """What a captured file says.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a captured file, is damaged, or is of another schema.
    """
    path = Path(path)
    with _opened(path) as file:
        found = (file.metadata() or {}).get(KEY)
        present = set(file.keys())
    if found is None:
        raise ValueError(f"{path} is no captured file: its header has no {KEY!r}")
    try:
        document = json.loads(found)
        if document["schema"] != SCHEMA:
            raise ValueError(
                f"{path} is a captured file of schema {document['schema']}; "
                f"this version of isoform reads schema {SCHEMA}"
            )
        recording = Recording(
            path,
            tuple(_call(entry) for entry in document["calls"]),
            tuple(LeftOut(**entry) for entry in document["left_out"]),
            document["environment"],
            document["interrupted"],
        )
    except (KeyError, TypeError, json.JSONDecodeError) as problem:
        raise ValueError(
            f"{path} is no captured file: what its header says under {KEY!r} cannot be understood "
            f"({type(problem).__name__}: {problem})"
        ) from problem
    for call in recording.calls:
        wanted = {f"{call.name}/{name}" for name in call.operands}
        wanted |= {f"{call.name}/dout"} if call.gradient else set()
        if missing := wanted - present:
            raise ValueError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    return recording


def _call(entry: dict[str, Any]) -> RecordedCall:
    return RecordedCall(
        **entry | {"operands": tuple(entry["operands"]), "notes": tuple(entry["notes"])}
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as problem:
        raise ValueError(
            f"{path} is not a whole .safetensors file ({str(problem).splitlines()[0]})"
        ) from problem


def cases(path: Path | str) -> dict[str, Case]:
    """The captured calls as cases, by id.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a captured file, is damaged, of another schema, or holds no calls.
    """
    recording = read(path)
    if not recording.calls:
        reasons = "; ".join(f"{left.reason} ({left.calls})" for left in recording.left_out)
        raise ValueError(f"{path} holds no calls. {f'Left out: {reasons}' if reasons else ''}")
    found = (_case(recording, call) for call in recording.calls)
    return {case.id: case for case in found}


def _case(recording: Recording, call: RecordedCall) -> RecordedCase:
    tensors: dict[str, Any] = recording.tensors(call)
    dout = tensors.pop("dout", None)
    try:
        signature = SIGNATURES[call.operation]
        first = tensors[signature.required[0]]  # the output is like it, in every operation
        options = given_options(call)
        asked = signature.check(**tensors, **options)
        if dout is not None and (dout.shape, dout.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"the output gradient has another shape or dtype than {signature.required[0]}"
            )
    except (KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"{recording.path} is damaged: in {call.name}, {problem}") from problem
    lacking = _lacking(dout)
    remarks = [
        f"{call.module or call.function}, on {call.device}",
        *([f"random cotangent: {lacking}"] if lacking else []),
        *call.notes,
    ]
    case = Case(
        id=f"captured/{recording.path.stem}/{FORMATS[asked.dtype].short}/{call.name}",
        operation=call.operation,
        shape=asked.shape,
        dtype=asked.dtype,
        operands=asked.operands,
        values="captured",
        options=tuple(options.items()),
        differentiate=_finite(tensors) if call.differentiate is None else call.differentiate,
        tags=frozenset({"captured", *([RANDOM] if lacking else [])}),
        note="; ".join(remarks),
    )
    return RecordedCase(
        **vars(case), load=partial(_operands, recording, call, case, draw=bool(lacking))
    )


def _operands(recording: Recording, call: RecordedCall, case: Case, *, draw: bool) -> Operands:
    """The operands of a captured call, and the captured cotangent or a drawn one."""
    operands = recording.tensors(call)
    if draw:
        drawn = case.rng("cotangent").standard_normal(case.shape.of("out"))
        operands["dout"] = drawn.astype(FORMATS[case.dtype].dtype)
    return operands


def _lacking(dout: Array | None) -> str:
    """Why ``dout`` cannot serve as the cotangent; empty if it can."""
    if dout is None:
        return "no output gradient was captured"
    wide = dout.astype(np.float64)
    if not np.isfinite(wide).all():
        return "the captured output gradient is not finite"
    return "" if wide.any() else "the captured output gradient is zero"


def _finite(operands: Operands) -> bool:
    """Whether everything that is attended to is finite, −inf in the biases aside."""
    kept = operands["mask"][..., None, None] if "mask" in operands else True
    for name, x in operands.items():
        fine = np.isfinite(x.astype(np.float64))
        if name in ("k", "v"):
            fine |= ~np.broadcast_to(kept, x.shape)
        if name in ("mask_bias", "pair_bias"):
            fine |= x == -np.inf
        if not fine.all():
            return False
    return True


def write(path: Path, case: Case, operands: Operands, *, notes: Sequence[str] = ()) -> None:
    """Write one call to ``path``, for :func:`replay`: ``call-0000``.

    Args:
        path: The file; the directories that it is in are made.
        case: What is asked for: operation, options, and whether gradients are judged.
        operands: The operands and ``dout``; their strides are kept.
        notes: What is to be known of it.
    """
    options = dict(case.options)
    scale = options.pop("scale", None)
    call = RecordedCall(
        name="call-0000",
        module="",
        function=case.operation,
        operands=tuple(name for name in operands if name != "dout"),
        scale=None if scale is None else float(scale),
        gradient="dout" in operands,
        device="cpu",
        notes=tuple(notes),
        operation=case.operation,
        options=plain_options(options),
        differentiate=case.differentiate,
        strides={
            name: x.strides
            for name, x in operands.items()
            if not x.flags.c_contiguous and min(x.strides, default=0) >= 0
        },
    )
    document = {"schema": SCHEMA, "calls": [asdict(call)], "left_out": [], "environment": {}}
    tensors = {f"{call.name}/{name}": np.ascontiguousarray(x) for name, x in operands.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial_path, {KEY: json.dumps(document | {"interrupted": ""})})
    partial_path.replace(path)


def laid_out(x: Array, strides: Sequence[int]) -> Array:
    """The same numbers with other strides (none negative), and no others between them than 0."""
    extent = sum((size - 1) * step for size, step in zip(x.shape, strides, strict=True))
    buffer = np.zeros(extent // x.itemsize + 1 if x.size else 0, x.dtype)
    view = np.lib.stride_tricks.as_strided(buffer, x.shape, tuple(strides))
    view[...] = x
    return view


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON can hold them: a scaling of rotary embedding by its name and fields."""
    return {
        name: {"name": x.name, **asdict(x)} if name == "scaling" else x
        for name, x in options.items()
    }


def given_options(call: RecordedCall) -> dict[str, Any]:
    """The options of a recorded call, as the operation takes them."""
    options = {name: _untangled(x) for name, x in call.options.items()}
    if "scaling" in options:
        fields = dict(options["scaling"])
        options["scaling"] = SCALINGS[fields.pop("name")](**fields)
    return options if call.scale is None else {"scale": call.scale, **options}


def _untangled(x: Any) -> Any:
    """What JSON made of an option: its lists were tuples."""
    if isinstance(x, dict):
        return {key: _untangled(value) for key, value in x.items()}
    return tuple(x) if isinstance(x, list) else x


def replay(
    path: Path | str,
    implementations: Sequence[Implementation],
    *,
    calls: Sequence[str] = (),
    groups: Collection[str] = GROUPS,
    device: str = "cpu",
    architecture: str = "",
    large: bool = True,
    progress: Progress = lambda implementation, case: None,
) -> Run:
    """Judge ``implementations`` on the calls captured in a file.

    Args:
        path: A file that :func:`isoform.conformance.capture.capture` wrote.
        implementations: Whom to judge.
        calls: Only these calls: names such as ``call-0003``, case ids, or shell patterns of either.
        groups: Which groups of checks.
        device: Where to run them; the captured operands may come from elsewhere.
        architecture: The GPU's architecture, where it is one.
        large: Run on the CPU even what is too large for it. The oracle always runs there, and holds
            several arrays of all the logits in float64.
        progress: Called before each implementation is judged on each call.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a captured file, is damaged, of another schema, or holds no calls.
        UnknownName: One of ``calls`` matches none.
        Interrupted: By the user; it carries what had been judged until then.
    """
    patterns = [call if "/" in call else f"*/{call}" for call in calls]
    chosen = select(cases(path), patterns=patterns)
    return judge_recorded(
        path,
        implementations,
        chosen,
        groups=groups,
        device=device,
        architecture=architecture,
        large=large,
        progress=progress,
    )


def judge_recorded(
    path: Path | str,
    implementations: Sequence[Implementation],
    chosen: Sequence[Case],
    **options: Any,
) -> Run:
    """A run (:func:`isoform.conformance.run.run`, with ``options``) on cases of which some were
    captured to ``path``; its environment says so.

    Raises:
        Interrupted: By the user; it carries what had been judged until then.
    """
    recorded = [case for case in chosen if isinstance(case, RecordedCase)]
    drawn = [case.id.rpartition("/")[2] for case in recorded if RANDOM in case.tags]
    provenance = {
        CAPTURED: str(path),
        "captured calls": str(len(recorded)),
        "random cotangents": ", ".join(drawn) or "none: the model's own output gradients",
    }

    def described(record: Run) -> Run:
        return replace(record, environment=record.environment | provenance)

    try:
        return described(run(implementations, chosen, invalid_calls=(), memory=(), **options))
    except Interrupted as interruption:
        raise Interrupted(described(interruption.run)) from interruption

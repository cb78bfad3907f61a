"""A run and its record: everything is in it, and reading gives back what was written."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isoform.conformance import run as running
from isoform.conformance.case import CASES_VERSION, Case
from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.numpy import NUMPY, NUMPY_TILED
from isoform.conformance.implementations.torch import REFERENCE
from isoform.conformance.metrics import Errors, errors
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.run import SCHEMA, Interrupted, Run, declared, environment, run, write
from isoform.conformance.verdicts import Outcome, Part, Verdict
from isoform.reference.contract import Capabilities
from isoform.reference.numpy import evoformer_attention

MakeOutcome = Callable[..., Outcome]

SOME = [
    CASES["evoformer/length-3/fp32/all-operands"],
    CASES["evoformer/operands/bf16/bare"],
]
LARGE = CASES["evoformer/extra-msa-5120/fp32/ragged-mask"]


def zeros(q: Any, k: Any, v: Any, **more: Any) -> Any:
    out, lse = evoformer_attention(q, k, v, **more | {"return_lse": True})
    return (np.zeros_like(out), lse) if more.get("return_lse") else np.zeros_like(out)


ZEROS = replace(NUMPY, name="zeros", forward=zeros)


@pytest.fixture(scope="module")
def mixed() -> Run:
    """Two implementations, one of them wrong, on two cases."""
    return run([NUMPY, ZEROS], SOME, memory=())


# What is run


def test_every_implementation_is_judged_on_every_case(mixed: Run) -> None:
    pairs = {(outcome.implementation, outcome.case) for outcome in mixed.outcomes}
    probe = OPERATIONS[NUMPY.operation].probe.id
    assert pairs == {
        (name, case) for name in ("numpy", "zeros") for case in (*(c.id for c in SOME), probe)
    }
    assert mixed.implementations == ("numpy", "zeros")
    assert {outcome.group for outcome in mixed.outcomes} == {
        *("conformance", "gradients", "precision")
    }


def test_what_belongs_to_conformance_is_run_with_it_and_if_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        running,
        "judge_memory",
        lambda implementation, device: [
            Outcome(implementation.name, "m", "conformance", "memory", Verdict.PASS)
        ],
    )

    def checks(**wanted: Any) -> set[str]:
        outcomes = run([NUMPY], SOME[:1], **wanted).outcomes
        return {outcome.check.split("/")[0] for outcome in outcomes} & {"memory", "invalid"}

    assert checks() == {"memory", "invalid"}
    assert checks(memory=()) == {"invalid"}
    assert checks(invalid_calls=()) == {"memory"}
    assert checks(groups=["gradients", "precision"]) == set()


def test_progress_is_told_before_each_step() -> None:
    told: list[tuple[str, str]] = []

    def progress(implementation: Implementation, case: Case) -> None:
        told.append((implementation.name, case.id))

    run([NUMPY, NUMPY_TILED], SOME, groups=["precision"], progress=progress)
    assert told == [(name, case.id) for case in SOME for name in ("numpy", "numpy-tiled")]


def test_nobody_is_judged_on_another_operation() -> None:
    (other,) = (one for one in NUMPY.offers if one.operation == "rotary_embedding")
    other = replace(other, name="other")
    assert run([other, NUMPY], SOME[:1], groups=["gradients"]).implementations == ("numpy",)


def test_each_operation_that_a_name_offers_is_judged_on_its_cases() -> None:
    rotary = CASES["rotary/length-3/fp32/half"]
    found = run([NUMPY, NUMPY_TILED], [SOME[0], rotary], memory=())
    judged = {(outcome.implementation, outcome.case) for outcome in found.outcomes}
    assert judged == {
        *((name, SOME[0].id) for name in ("numpy", "numpy-tiled")),
        *((name, "evoformer/invalid/fp32/probe") for name in ("numpy", "numpy-tiled")),
        ("numpy", rotary.id),
        ("numpy", "rotary/invalid/fp32/probe"),
    }
    assert set(found.counts()) == {Verdict.PASS}
    assert found.capabilities["numpy"].keys() == {"evoformer_attention", "rotary_embedding"}
    assert found.capabilities["numpy-tiled"].keys() == {"evoformer_attention"}
    assert Run.from_json(found.as_json()) == found


def test_a_device_that_is_not_there_is_said_for_each_case() -> None:
    found = run([NUMPY], SOME, device="cuda")
    assert [outcome.case for outcome in found.outcomes] == [case.id for case in SOME]
    assert set(found.counts()) == {Verdict.NOT_RUN}
    assert not found.ran
    assert found.environment["device"] == "cuda"
    assert "gpu" not in found.environment


def test_an_interrupted_run_gives_what_it_has() -> None:
    def progress(implementation: Implementation, case: Case) -> None:
        if case is SOME[1]:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as interruption:
        run([NUMPY], SOME, progress=progress)
    record = interruption.value.run
    assert {outcome.case for outcome in record.outcomes} == {SOME[0].id}
    assert record.capabilities.keys() == {"numpy"}
    assert Run.from_json(record.as_json()) == record


# What it says


def test_counts_and_failures(mixed: Run) -> None:
    assert sum(mixed.counts().values()) == len(mixed.outcomes)
    assert set(mixed.counts("numpy")) == {Verdict.PASS}
    wrong = mixed.counts("zeros")[Verdict.WRONG]
    assert wrong >= 2
    assert mixed.counts()[Verdict.WRONG] == wrong
    assert mixed.counts("nobody") == {}
    assert len(mixed.failures) == wrong
    assert {outcome.implementation for outcome in mixed.failures} == {"zeros"}
    assert {outcome.check for outcome in mixed.failures} == {"out"}
    assert mixed.counts("zeros")[Verdict.ERROR] == 0


@pytest.mark.parametrize("verdict", Verdict, ids=str)
def test_whether_anything_ran(verdict: Verdict, make_outcome: MakeOutcome) -> None:
    idle = make_outcome(Verdict.NOT_RUN)
    assert not Run((idle,)).ran
    ran = verdict not in (Verdict.NOT_RUN, Verdict.UNSUPPORTED)
    assert Run((idle, make_outcome(verdict))).ran == ran


def test_nothing_ran_of_what_is_too_large() -> None:
    assert not run([NUMPY], [LARGE], invalid_calls=(), memory=()).ran
    assert not Run(()).ran


# The record


def test_reading_gives_back_what_was_written(mixed: Run) -> None:
    text = mixed.as_json()
    again = Run.from_json(text)
    assert again == mixed
    assert again.as_json() == text
    assert again.outcomes[0].seconds == mixed.outcomes[0].seconds
    assert isinstance(again.outcomes[0].verdict, Verdict)
    measured = next(outcome for outcome in again.outcomes if outcome.errors is not None)
    assert isinstance(measured.errors, Errors)
    assert isinstance(measured.parts[0], Part)


def test_the_document(mixed: Run) -> None:
    document = json.loads(mixed.as_json())
    assert document.keys() == {
        *("schema", "cases_version", "environment", "capabilities", "sources", "outcomes")
    }
    assert document["schema"] == SCHEMA
    assert document["cases_version"] == CASES_VERSION
    assert len(document["outcomes"]) == len(mixed.outcomes)
    operation = NUMPY.operation
    assert document["capabilities"]["numpy"] == {operation: declared(NUMPY)[operation]}
    lines = mixed.as_json().splitlines()
    assert sum('"verdict"' in line for line in lines) == len(mixed.outcomes)  # a line for each


def test_numbers_that_json_does_not_have(make_outcome: MakeOutcome) -> None:
    reference = np.array([0.0, 0.0, 1e300])
    measured = errors(np.array([0.0, 1e-3, np.inf]), reference, np.zeros(3), "float64")
    assert math.isnan(measured.frobenius)
    assert measured.ratio_max == math.inf
    outcome = replace(
        make_outcome(parts={"condition": False}),
        errors=replace(measured, frobenius=math.inf, worst_value=-math.inf),
    )
    part = replace(outcome.parts[0], figure=math.inf, limit=1.5)
    record = Run((replace(outcome, parts=(part,)),))
    text = record.as_json()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert Run.from_json(text) == record

    undefined = Run((replace(outcome, errors=measured),))
    again = Run.from_json(undefined.as_json())
    assert again.outcomes[0].errors is not None
    assert math.isnan(again.outcomes[0].errors.frobenius)
    assert again.as_json() == undefined.as_json()


def test_words_that_look_like_numbers_stay_words(make_outcome: MakeOutcome) -> None:
    outcome = make_outcome(implementation="nan", message="inf", check="-inf")
    record = Run((outcome,), sources={"nan": "inf:NAN"})
    assert Run.from_json(record.as_json()) == record


@pytest.mark.parametrize("text", ["{}", "[]", '{"schema": 0, "outcomes": []}', "3"])
def test_another_document_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a record of a run, or not of schema"):
        Run.from_json(text)


def test_no_json_is_refused() -> None:
    with pytest.raises(ValueError, match="Expecting value"):
        Run.from_json("<html>")


def test_capabilities_are_plain_data() -> None:
    found = declared(REFERENCE)["evoformer_attention"]
    assert json.loads(json.dumps(found)) == found
    assert found["framework"] == "torch"
    assert found["devices"] == ["cpu", "cuda"]
    assert found["dtypes"] == sorted(REFERENCE.capabilities.dtypes)
    assert found["arithmetic"]["accumulate"] == "wide"
    assert found.keys() - {"framework"} == vars(Capabilities("x")).keys()


def test_the_environment() -> None:
    found = environment([NUMPY], "cpu")
    assert found.keys() == {*("date", "python", "platform", "cores", "device", "isoform", "numpy")}
    assert found["numpy"] == np.__version__
    assert found["python"] == platform.python_version()
    assert found["device"] == "cpu"
    assert found["cores"] == str(os.cpu_count())
    age = datetime.now(UTC) - datetime.fromisoformat(found["date"])
    assert timedelta(0) <= age < timedelta(minutes=1)
    assert all(isinstance(value, str) for value in found.values())
    both = environment([NUMPY, REFERENCE], "cpu")
    assert both.keys() == found.keys() | {"torch"}
    assert platform.node() not in json.dumps(both)  # whose machine it is matters to nobody


def test_a_package_that_is_not_installed_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "isoform":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(running, "version", version)
    assert environment([NUMPY], "cpu")["isoform"] == "not installed"


# Writing


def test_written_and_read(mixed: Run, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "run.json"
    write(mixed, path)
    assert Run.from_json(path.read_text()) == mixed
    write(replace(mixed, outcomes=mixed.outcomes[:1]), path)
    assert len(Run.from_json(path.read_text()).outcomes) == 1
    assert [found.name for found in path.parent.iterdir()] == ["run.json"]


def test_a_record_that_cannot_be_written_leaves_the_old_one(
    mixed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    write(mixed, path)
    before = path.read_text()

    unwritable = replace(mixed, environment={"date": object()})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        write(unwritable, path)
    assert path.read_text() == before

    def half(self: Path, text: str, **more: Any) -> int:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        write(replace(mixed, outcomes=mixed.outcomes[:1]), path)
    assert path.read_text() == before

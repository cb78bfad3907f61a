"""Replay: captured calls are judged as any case is, and files that are none are told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import ml_dtypes  # noqa: F401  (bfloat16 for safetensors)
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from isoform.conformance.capture import capture
from isoform.conformance.case import UnknownName
from isoform.conformance.implementation import adopt
from isoform.conformance.implementations.numpy import NUMPY
from isoform.conformance.implementations.torch import REFERENCE, SDPA
from isoform.conformance.replay import KEY, SCHEMA, cases, read, replay
from isoform.conformance.run import Interrupted, Run
from isoform.conformance.verdicts import Verdict
from isoform.reference.torch import evoformer_attention
from isoform.reference.torch.evoformer_stack import EvoformerStack


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A padded batch of two through an Evoformer block, in float32 and in bfloat16."""
    torch.manual_seed(5)
    sizes = {"c_outer": 4, "c_multiplication": 8, "c_triangle": 8, "heads_triangle": 2}
    model = EvoformerStack(1, 16, 8, 8, c=8, heads=2, **sizes)
    msa, pair = torch.randn(2, 4, 12, 16), torch.randn(2, 12, 12, 8)
    kept = torch.ones(2, 4, 12, dtype=torch.bool)
    kept[1, 3:] = kept[1, :, 9:] = False
    pairs = kept[:, 0, :, None] & kept[:, 0, None]
    found = tmp_path_factory.mktemp("captured") / "step.safetensors"
    with capture(found):
        for dtype in (torch.float32, torch.bfloat16):
            m, z, _ = model.to(dtype)(msa.to(dtype), pair.to(dtype), kept, pairs)
            (m.square().mean() + z.square().mean()).backward()
    return found


def with_call(path: Any, dout: Any = None, **changes: Any) -> Any:
    """A file with one call of plain float32 operands, some of them changed."""
    rng = np.random.default_rng(6)
    given = {
        name: rng.standard_normal((1, 2, 5, 2, 4)).astype(np.float32) for name in ("q", "k", "v")
    }
    given["mask"] = np.arange(5) < np.array([[[3], [5]]])
    given |= changes
    call = {"name": "call-0000", "module": "m", "function": "f", "operands": [*given]}
    call |= {"scale": None, "gradient": dout is not None, "device": "cpu", "notes": []}
    tensors = given if dout is None else given | {"dout": dout}
    document = {"schema": SCHEMA, "calls": [call], "left_out": [], "environment": {}}
    metadata = {KEY: json.dumps(document | {"interrupted": ""})}
    save_file({f"call-0000/{name}": x for name, x in tensors.items()}, path, metadata=metadata)
    return path


def zeros(q, k, v, *, mask=None, pair_bias=None, gate=None):
    return q * 0


def deaf_to_masks(q, k, v, *, mask=None, pair_bias=None, gate=None):
    return evoformer_attention(q, k, v, pair_bias=pair_bias, gate=gate)


def failed(run: Run) -> set[str]:
    return {check for outcome in run.failures for check in outcome.failed_checks}


# Judging


def test_ids_shapes_and_notes_are_those_of_the_calls(path):
    found = cases(path)
    layers = ["msa_row", "msa_column", "triangle_starting", "triangle_ending"]
    ids = [f"captured/step/{dtype}/call-000" for dtype in ("fp32", "bf16")]
    assert list(found) == [f"{ids[index // 4]}{index}" for index in range(8)]
    assert [case.note for case in found.values()] == [
        f"EvoformerStack.blocks.0.{layer}, on cpu" for layer in layers * 2
    ]
    first = found["captured/step/fp32/call-0000"]
    assert first.operands == {"mask", "pair_bias", "gate"} and first.differentiate
    assert str(first.shape) == "B=2,S=4,Q=12,K=12,H=2,G=2,D=8"


def test_right_implementations_pass(path):
    run = replay(path, [NUMPY, REFERENCE, SDPA])
    assert run.failures == ()
    assert {outcome.case for outcome in run.outcomes} == set(cases(path))
    assert {outcome.check for outcome in run.outcomes} >= {
        "out",
        "lse",
        "dq",
        "dpair_bias",
        "dgate",
    }
    assert run.counts()[Verdict.PASS] > 200
    assert run.environment["captured file"] == str(path)
    assert run.environment["random cotangents"].startswith("none")


def test_wrong_implementations_fail_by_the_check_meant_for_it(path):
    run = replay(path, [adopt(zeros), adopt(deaf_to_masks)], calls=["call-0000", "call-0004"])
    assert {outcome.implementation for outcome in run.failures} == {"zeros", "deaf_to_masks"}
    for name in ("zeros", "deaf_to_masks"):
        outcomes = [outcome for outcome in run.failures if outcome.implementation == name]
        assert {"out/condition", "dv/condition"} <= failed(Run(tuple(outcomes)))
        assert len({outcome.case for outcome in outcomes}) == 2


def test_the_gradient_checks_use_the_captured_gradient(path):
    (case,) = (case for case in cases(path).values() if case.id.endswith("fp32/call-0001"))
    dout = case.load()["dout"]
    assert np.array_equal(dout, load_file(path)["call-0001/dout"])
    assert dout.any() and "random-cotangent" not in case.tags


def test_calls_can_be_picked(path):
    run = replay(path, [NUMPY], calls=["call-0002", "*/bf16/call-0004"], groups=["precision"])
    assert {outcome.case for outcome in run.outcomes} == {
        "captured/step/fp32/call-0002",
        "captured/step/bf16/call-0004",
    }
    with pytest.raises(UnknownName, match="call-0009"):
        replay(path, [NUMPY], calls=["call-0009"])


def test_an_interruption_carries_what_was_judged(path):
    def progress(implementation, case):
        if case.id.endswith("0001"):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        replay(path, [NUMPY], groups=["precision"], progress=progress)
    assert {outcome.case[-4:] for outcome in caught.value.run.outcomes} == {"0000"}
    assert caught.value.run.environment["captured file"] == str(path)


@pytest.mark.parametrize(
    ("dout", "why"),
    [
        (None, "no output gradient was captured"),
        (np.zeros((1, 2, 5, 2, 4), np.float32), "the captured output gradient is zero"),
        (
            np.full((1, 2, 5, 2, 4), np.inf, np.float32),
            "the captured output gradient is not finite",
        ),
    ],
)
def test_a_cotangent_is_drawn_where_none_was_captured_and_that_is_said(tmp_path, dout, why):
    file = with_call(tmp_path / "a.safetensors", dout)
    (case,) = cases(file).values()
    assert case.note == f"m, on cpu; random cotangent: {why}"
    drawn = case.load()["dout"]
    assert drawn.dtype == np.float32 and np.array_equal(drawn, case.load()["dout"])
    run = replay(file, [REFERENCE])
    assert run.environment["random cotangents"] == "call-0000"
    assert run.failures == () and "dq" in {outcome.check for outcome in run.outcomes}


def test_nan_is_looked_at_only_where_it_is_attended_to(tmp_path):
    dropped = np.ones((1, 2, 5, 2, 4), np.float32)
    dropped[0, 0, 3:] = np.nan
    (case,) = cases(with_call(tmp_path / "a.safetensors", k=dropped, v=dropped)).values()
    assert case.differentiate
    (case,) = cases(with_call(tmp_path / "a.safetensors", q=dropped)).values()
    assert not case.differentiate
    assert replay(tmp_path / "a.safetensors", [NUMPY, REFERENCE]).failures == ()


def test_files_of_the_same_name_are_not_confused(tmp_path):
    for directory, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / directory).mkdir()
        v = np.full((1, 2, 5, 2, 4), value, np.float32)
        file = with_call(tmp_path / directory / "same.safetensors", v=v)
        assert replay(file, [NUMPY], groups=["conformance"]).failures == ()


# Files


def test_other_files_are_refused_by_name(path, tmp_path):
    whole = path.read_bytes()
    broken = tmp_path / "broken.safetensors"
    for content in (b"", b"PK\x03\x04 not at all", whole[:100], whole[:5000], whole[:-1]):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.safetensors is not a whole"):
            read(broken)
    with pytest.raises(ValueError, match="is not a whole"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file .*missing\.safetensors"):
        replay(tmp_path / "missing.safetensors", [NUMPY])


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, f"no captured file: its header has no '{KEY}'"),
        ({KEY: "{"}, "cannot be understood"),
        ({KEY: "[]"}, "cannot be understood"),
        ({KEY: json.dumps({"schema": SCHEMA})}, r"cannot be understood \(KeyError: 'calls'\)"),
        ({KEY: json.dumps({"schema": 99})}, f"of schema 99; this version .* schema {SCHEMA}"),
    ],
)
def test_other_headers_are_refused_by_name(tmp_path, metadata, says):
    file = tmp_path / "a.safetensors"
    save_file({"weight": np.zeros(3)}, file, metadata=metadata)
    with pytest.raises(ValueError, match=rf"a\.safetensors .*{says}"):
        read(file)


def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path):
    file = with_call(tmp_path / "a.safetensors", k=np.zeros((1, 2, 5, 2, 3), np.float32))
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged: in call-0000, k must have D"):
        cases(file)
    file = with_call(tmp_path / "a.safetensors", dout=np.zeros((1, 2, 5, 2, 4)))
    with pytest.raises(ValueError, match="damaged: in call-0000, the output gradient has another"):
        cases(file)


def test_a_file_without_calls_says_what_was_left_out(tmp_path):
    x = torch.randn(1, 2, 3, 4)
    file = tmp_path / "a.safetensors"
    with pytest.warns(UserWarning, match="nothing was captured"), capture(file):
        torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)
    with pytest.raises(ValueError, match=r"holds no calls. Left out: dropout_p=0.1 .* \(1\)"):
        replay(file, [NUMPY])


def test_reading_needs_no_torch(path):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from isoform.conformance.replay import replay\n"
        "from isoform.conformance.implementations.numpy import NUMPY_TILED\n"
        "run = replay(sys.argv[1], [NUMPY_TILED], calls=['call-0004'], groups=['conformance'])\n"
        "assert run.ran and not run.failures"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=60)

"""Calibration: whoever is trusted is asked, and the number of processes makes no difference."""

from __future__ import annotations

import os
import tomllib

import pytest

from isoform.conformance.calibrate import _spread, _trusted, calibrate
from isoform.conformance.case import Case, select
from isoform.conformance.expected import PATH
from isoform.conformance.operations import CASES, OPERATIONS


def test_processes_show_what_one_shows_and_in_order() -> None:
    cases = select(CASES, patterns=["evoformer/length-[23]/*/all-operands", "rotary/length-3/*"])
    told: list[Case] = []
    before = dict(os.environ)
    one, two = (list(_spread(cases, "cpu", jobs, told.append)) for jobs in (1, 2))
    assert one == two
    assert told == 2 * cases
    assert {name for figures in one for name, *_ in figures} >= {"torch-sdpa", "numpy-float32"}
    assert all(figures for figures in one)
    assert dict(os.environ) == before


def test_a_gpu_is_calibrated_by_those_that_run_on_one() -> None:
    for operation in OPERATIONS:
        assert _trusted(operation, "cuda")
        assert len(_trusted(operation, "cpu")) > len(_trusted(operation, "cuda"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nobody_is_trusted_where_faults_of_theirs_are_known(device: str) -> None:
    """The errors of a wrong kernel are no measure of what is right."""
    entries = tomllib.loads(PATH.read_text())["failure"]
    faulty = {one["implementation"] for one in entries if one.get("device", device) == device}
    assert faulty
    for operation in OPERATIONS:
        assert not faulty & {one.name for one in _trusted(operation, device)}


def test_a_device_that_is_not_there() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="no device cuda here to calibrate on"):
        calibrate("rotary_embedding", device="cuda")

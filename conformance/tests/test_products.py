"""How sums over channels are rounded, by declaration."""

from __future__ import annotations

import numpy as np
import pytest

from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.oracle import expected, measure
from isoform.conformance.products import product_over_channels
from isoform.reference.contract import Arithmetic

CUT = Arithmetic(sums="truncated")


def drawn(rows: int, channels: int) -> np.ndarray:
    numbers = np.random.default_rng(rows).standard_normal((rows, channels))
    return numbers.astype(np.float16).astype(np.float32)


def test_a_sum_that_is_cut_off_is_never_larger_and_at_most_one_step_smaller_for_each_sixteen():
    x, y = drawn(40, 64), drawn(50, 64).T
    found = product_over_channels(CUT, "float16")(x, y)
    exact = x.astype(np.float64) @ y.astype(np.float64)
    parts = [x[:, :n].astype(np.float64) @ y[:n].astype(np.float64) for n in (16, 32, 48, 64)]
    step = np.spacing(np.max(np.abs(parts), axis=0).astype(np.float32))
    assert found.dtype == np.float32
    assert np.all(np.abs(found - exact) <= 4 * step)
    lean = np.mean((found - exact) * np.sign(exact)) / np.mean(np.abs(found - exact))
    assert lean < -0.5


@pytest.mark.parametrize(
    ("arithmetic", "dtype"), [(CUT, "float32"), (Arithmetic(), "float16"), (CUT, "float64")]
)
def test_only_declared_and_only_of_sixteen_bits(arithmetic, dtype):
    assert product_over_channels(arithmetic, dtype) is np.matmul


@pytest.mark.parametrize(
    "case_id", ["evoformer/head-dim-128/fp16/all-operands", "attention/values/fp16/large-logits"]
)
def test_the_twin_of_a_tensor_core_leans_as_it_does(case_id):
    case = CASES[case_id]
    truth = expected(case, gradients=False)

    def bias(arithmetic: Arithmetic) -> float:
        found = OPERATIONS[case.operation].twin(truth.operands, case, arithmetic, False)["lse"]
        return measure(case, arithmetic, "lse", found, truth).bias

    assert bias(CUT) > 0.3 > 2 * bias(Arithmetic())

"""Explanations: a fault planted at each step must be named, in its tile, at its coordinate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from isoform.conformance.case import Case
from isoform.conformance.cli import app
from isoform.conformance.explain import Unexplained, explain
from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.numpy import NUMPY, NUMPY_TILED
from isoform.conformance.implementations.torch import SDPA
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.replay import cases as recorded
from isoform.conformance.replay import write
from isoform.reference.contract import Capabilities, Shape
from isoform.reference.numpy.evoformer import attended, heads_first, heads_last, sigmoid

TILE = 8
CASE = replace(
    CASES["evoformer/length-65/fp32/all-operands"],
    id="evoformer/explained-10/fp32/all-operands",
    shape=Shape(1, 2, 11, 20, 2, 2, 8),
)
LARGE = replace(
    CASE, id="evoformer/explained/fp32/large-logits", values="large-logits"
)  # exp of these overflows
WITHOUT_KEYS = replace(
    CASES["evoformer/values/bf16/minus-inf-bias"],
    id="evoformer/explained/bf16/minus-inf-bias",
    shape=CASE.shape,
)  # of some queries, and of others a few less


@dataclass(frozen=True)
class Tiled:
    """Attention in tiles of 8 keys in float32, as kernels have it, with a place for a fault at
    every step; each is told the tile's number.
    """

    logits: Callable[[Any, int], Any] = lambda s, t: s
    top: Callable[[Any, Any, int], Any] = lambda old, s, t: np.maximum(old, s.max(-1))
    rescale: Callable[[Any, int], Any] = lambda alpha, t: alpha
    exp: Callable[[Any, int], Any] = lambda e, t: e
    total: Callable[[Any, int], Any] = lambda part, t: part
    product: Callable[[Any, int], Any] = lambda part, t: part
    opening: Callable[[Any], Any] = lambda x: x

    def __call__(self, q: Any, k: Any, v: Any, **given: Any) -> Any:
        f = np.float32
        mask, gate = given.get("mask"), given.get("gate")
        qh = heads_first(q, f)
        kh, vh = (heads_first(attended(x, mask), f, q.shape[3]) for x in (k, v))
        m = np.full(qh.shape[:-1], -np.inf, f)
        total, out = np.zeros_like(m), np.zeros_like(qh)
        with np.errstate(all="ignore"):
            for t, first in enumerate(range(0, k.shape[2], TILE)):
                some = slice(first, first + TILE)
                s = f(q.shape[-1] ** -0.5) * (qh @ kh[..., some, :].swapaxes(-1, -2))
                for name in ("mask_bias", "pair_bias"):
                    s = s + given[name][..., some] if given.get(name) is not None else s
                if mask is not None:
                    s = np.where(mask[:, :, None, None, some], s, f(-np.inf))
                s = self.logits(s.astype(f), t)
                new = self.top(m, s, t)
                shift = np.where(new == -np.inf, f(0), new)
                alpha = self.rescale(np.exp(m - shift), t)
                e = self.exp(np.exp(s - shift[..., None]), t)
                total = alpha * total + self.total(e.sum(-1), t)
                out = alpha[..., None] * out + self.product(e @ vh[..., some, :], t)
                m = new
            none = total == 0
            out = np.where(none[..., None], 0, out / np.where(none, 1, total)[..., None])
            lse = np.where(none, -np.inf, m + np.log(np.where(none, 1, total)))
            if gate is not None:
                out = out * self.opening(sigmoid(heads_first(gate, f)))
        out = heads_last(out, q.dtype)
        return (out, lse.astype(f)) if given.get("return_lse") else out


def implementation(*, lse: bool = True, **faults: Any) -> Implementation:
    capabilities = Capabilities("evoformer_attention", gradients=frozenset(), lse=lse)
    return Implementation("tiled", "numpy", capabilities, Tiled(**faults))


def in_tile(tile: int, change: Callable[[Any], Any]) -> Callable[[Any, int], Any]:
    return lambda x, t: change(x) if t == tile else x


def bumped(s: Any) -> Any:
    """One logit off: of row 1, head 0, query 9, the tile's key 3."""
    s = s.copy()
    s[:, 1, 0, 9, 3] += 0.01
    return s


def chopped(x: Any) -> Any:
    return (x.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


# name: the step, the key tile (None: any), the fault, and the case that shows it
PLANTED: dict[str, tuple[str, int | None, dict[str, Any], Case]] = {
    "logit": ("logits", 2, {"logits": in_tile(2, bumped)}, CASE),
    "bias-lost": ("logits", 1, {"logits": in_tile(1, lambda s: s - 0.5)}, CASE),
    "no-maximum": ("max", None, {"top": lambda old, s, t: np.zeros_like(old)}, LARGE),
    "maximum-too-low": ("max", None, {"top": lambda m, s, t: np.maximum(m, s.max(-1) - 99)}, CASE),
    "not-rescaled": ("max", None, {"rescale": lambda a, t: np.minimum(1, np.ceil(a))}, CASE),
    "exp": ("exp", None, {"exp": lambda e, t: e * (1 + 1e-3 * e)}, CASE),
    "exp-in-a-tile": ("exp", 1, {"exp": in_tile(1, lambda e: e**1.01)}, CASE),
    "sum-chopped": ("sum", None, {"total": lambda part, t: chopped(part)}, CASE),
    "tile-not-summed": ("sum", 2, {"total": in_tile(2, np.zeros_like)}, CASE),
    "product-chopped": ("product", None, {"product": lambda part, t: chopped(part)}, CASE),
    "tile-not-multiplied": ("product", 1, {"product": in_tile(1, np.zeros_like)}, CASE),
    "columns-exchanged": ("product", 2, {"product": in_tile(2, lambda x: x[..., ::-1])}, CASE),
    "gate": ("gate", None, {"opening": lambda x: x * np.float32(1.001)}, CASE),
}


def test_the_case_keeps_the_keys_that_faults_are_planted_in() -> None:
    kept = OPERATIONS[CASE.operation].operands(CASE)["mask"]
    assert kept[0, 1, 2 * TILE + 3]
    assert kept[:, :, 2 * TILE :].any(-1).all()


def test_without_a_fault_nothing_is_found() -> None:
    for case in (CASE, LARGE, WITHOUT_KEYS):
        for other in (implementation(), implementation(lse=False), NUMPY_TILED):
            found = explain(NUMPY, other, case, tile=TILE)
            assert not found.faults, found.faults
            assert not found.parted


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_named(name: str) -> None:
    step, tile, faults, case = PLANTED[name]
    found = explain(NUMPY, implementation(**faults), case, tile=TILE)
    assert [fault.implementation for fault in found.faults] == ["tiled"]
    (fault,) = found.faults
    assert found.parted == fault.step == step, fault
    assert tile is None or fault.keys == (tile * TILE, min((tile + 1) * TILE, 20))
    assert fault.excess > 1


def test_the_coordinate_is_the_planted_one() -> None:
    (fault,) = explain(NUMPY, implementation(logits=in_tile(2, bumped)), CASE, tile=TILE).faults
    assert fault.coordinate == {"b": 0, "s": 1, "h": 0, "i": 9, "j": 2 * TILE + 3}
    assert fault.queries == (8, 11)
    assert fault.value - fault.definition == pytest.approx(0.01, rel=1e-3)


def test_without_lse_a_step_is_still_told() -> None:
    for name in ("exp", "tile-not-summed", "no-maximum"):
        step, _, faults, case = PLANTED[name]
        found = explain(NUMPY, implementation(lse=False, **faults), case, tile=TILE)
        assert [fault.step for fault in found.faults] == [step], (name, found)
        assert any("lse" in remark for remark in found.remarks)
    right = implementation(lse=False)

    def twice(q: Any, k: Any, v: Any, **given: Any) -> Any:
        doubled = {name: 2 * x for name, x in given.items() if name == "mask_bias"}
        return right.forward(q, k, v, **given | doubled)

    found = explain(NUMPY, replace(right, forward=twice), CASE, tile=TILE)
    assert found.parted == "logits"
    assert "or the maximum" in found.faults[0].inferred


@pytest.mark.parametrize("lse", [True, False])
def test_lost_keys_are_said_to_be_lost(lse: bool) -> None:
    lost = implementation(lse=lse, logits=in_tile(2, lambda s: np.full_like(s, -np.inf)))
    (fault,) = explain(NUMPY, lost, CASE, tile=TILE).faults
    assert fault.step == "logits"
    assert fault.keys == (2 * TILE, 20)
    assert lse or "not seen" in fault.inferred


def test_two_that_are_wrong_alike_do_not_part() -> None:
    wrong = implementation(exp=lambda e, t: e**1.01)
    found = explain(wrong, replace(wrong, name="again"), CASE, tile=TILE)
    assert len(found.faults) == 2
    assert not found.parted


def test_captured_operands_are_walked_through(tmp_path: Path) -> None:
    path = tmp_path / "step.safetensors"
    write(path, CASE, OPERATIONS[CASE.operation].operands(CASE))
    (case,) = recorded(path).values()
    wrong = implementation(total=in_tile(2, np.zeros_like))
    assert explain(NUMPY, wrong, case, tile=TILE).parted == "sum"


def test_what_cannot_be_walked_through_is_said() -> None:
    with pytest.raises(Unexplained, match="rotary_embedding"):
        explain(NUMPY, NUMPY, CASES["rotary/length-1/fp32/half"])
    with pytest.raises(Unexplained, match="empty axis"):
        explain(NUMPY, NUMPY, CASES["evoformer/empty/fp32/no-keys"])
    bare = implementation()
    bare = replace(bare, capabilities=replace(bare.capabilities, operands=frozenset({"gate"})))
    with pytest.raises(Unexplained, match="no key can be left out"):
        explain(NUMPY, bare, CASE)


def test_the_command_line(tmp_path: Path) -> None:
    target = tmp_path / "why.json"
    names = ["compare", "numpy", "torch-sdpa", "--explain", "--json", str(target)]
    shown = CliRunner().invoke(app, [*names, "--case", "evoformer/length-17/fp32/all-operands"])
    assert shown.exit_code == 0, shown.output
    assert "within budget at every step" in " ".join(shown.output.split())
    assert json.loads(target.read_text())["parted"] == ""
    assert CliRunner().invoke(app, names).exit_code == 2  # of which case?
    assert SDPA.capabilities.lse is False

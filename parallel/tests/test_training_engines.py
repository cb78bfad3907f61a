"""PyTorch's engines and sequence parallelism on one mesh: the numbers are the one-rank model's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from isoform.parallel.launch import launch
from isoform.parallel.training.switches import EVERYTHING, Layout

STEPS = 3


def cases(programs: Any) -> list[tuple[Any, Layout]]:
    """Every pair of axes, states in every way; on 4 ranks."""
    rotary = programs.configuration()
    learned = programs.configuration(positions="learned", parallel_residual=False)
    replicated = EVERYTHING.but(tile=4, optimizer="replicated")
    heads = replicated.but(head_groups=2)
    sharded = replicated.but(optimizer="sharded")
    offloaded = sharded.but(optimizer="offloaded", strategy="ring")
    asked = [
        (heads, rotary, Layout(pipeline=2, sequence=2)),
        (replicated, learned, Layout(data=2, sequence=2)),
        (replicated, rotary, Layout(sequence=2, tensor=2)),
        (replicated, learned, Layout(pipeline=2, tensor=2)),
        (sharded, learned, Layout(data=2, sequence=2)),
        (sharded, rotary, Layout(sequence=2, tensor=2)),
        (sharded, rotary, Layout(pipeline=2, sequence=2)),
        (offloaded, rotary, Layout(sequence=4)),
    ]
    return [
        (programs.Case(switches, c, B=4, documents=(7,) if number % 2 else None), layout)
        for number, (switches, c, layout) in enumerate(asked)
    ]


def expected(case: Any) -> tuple[list[float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Losses, gradients of the first step, and parameters in the end."""
    reference = case.reference()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = reference.loss(case.tokens(step), case.labels(step), **case.places())
        loss.backward()
        if step == 0:
            gradients = {n: p.grad.clone().numpy() for n, p in reference.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients, {n: p.detach().numpy() for n, p in reference.named_parameters()}


def errors(case: Any, results: list[Any]) -> dict[str, float]:
    """The largest of losses, gradients and parameters. Of a partitioned table, which ranks have
    rows of, what a rank has must be among the rows of the whole; nothing may be left out.
    """
    losses, gradients, parameters = expected(case)
    worst = {"losses": 0.0, "gradients": 0.0, "parameters": 0.0}
    seen: set[str] = set()
    for found, first, last, _ in results:
        worst["losses"] = max(worst["losses"], float(np.abs(np.subtract(found, losses)).max()))
        for what, mine, right in (
            ("gradients", first, gradients),
            ("parameters", last, parameters),
        ):
            for name, x in mine.items():
                if name.endswith("key.bias") and what == "parameters":
                    continue  # its gradient is 0 but for rounding, which AdamW makes steps of
                y = right[name]
                if name == "position_table.weight" and x.shape != y.shape:
                    y = np.stack([y[np.abs(y - row).sum(1).argmin()] for row in x])
                worst[what] = max(worst[what], float(np.abs(x - y).max()))
                seen.add(name)
    assert seen == gradients.keys()
    return worst


def test_every_engine_with_every_other(training_programs, engine_programs):
    asked = cases(training_programs)
    results = launch(engine_programs.train, 4, asked, STEPS, 2, transport="gloo", limit=170)
    for (case, layout), found in zip(asked, zip(*results, strict=True), strict=True):
        worst = errors(case, list(found))
        assert worst["losses"] < 1e-12 and worst["gradients"] < 1e-14, (layout, worst)
        assert worst["parameters"] < 1e-9, (layout, worst)
        if case.switches.optimizer != "replicated":  # a quarter of everything, and of some a half
            held = sum(one[3] for one in found) / case.model.parameters
            assert held < 1.2, (layout, held)


def test_averages_over_ranks_are_seen(training_programs, engine_programs):
    case = training_programs.Case(EVERYTHING.but(tile=4))
    for fault, seen in (("", False), ("averaged", True)):
        results = launch(
            *(engine_programs.train, 2, [(case, Layout(sequence=2))], STEPS, 1),
            fault=fault,
            transport="gloo",
        )
        assert (errors(case, [one[0] for one in results])["gradients"] > 1e-3) == seen


def test_states_of_float32_and_sums_of_bfloat16(training_programs, engine_programs):
    case = training_programs.Case(EVERYTHING.but(tile=4), dtype="float32")
    right = expected(case)[0][0]
    for loss, parameters, gradients in launch(engine_programs.mixed, 2, case, transport="gloo"):
        assert loss == pytest.approx(right, rel=2e-2) and loss != right
        assert parameters == gradients == {torch.float32}


def test_wrong_calls_are_refused(training_programs, engine_programs):
    case = training_programs.Case(EVERYTHING)
    for said in launch(engine_programs.refused, 2, case, transport="gloo"):
        assert said[0] == "the layout is for 3 ranks, but there are 2"
        assert said[1] == "microbatches=3 must divide the batch of 2"
        assert "positions that differ between examples" in said[2]
        assert "segments that differ between examples" in said[2]
        assert said[3].startswith("compute is for sharded states")

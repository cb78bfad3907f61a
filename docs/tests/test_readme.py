"""What the README shows of recorded runs comes from the records, and can be made again."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import readme


def test_blocks_can_be_filled_again():
    text = readme.README.read_text("utf-8")
    once = readme.filled(text, readme.BLOCKS)
    assert readme.filled(once, readme.BLOCKS) == once
    with pytest.raises(ValueError, match="there is no place for times"):
        readme.filled("# Without marks", readme.BLOCKS)


def test_every_time_was_recorded_on_the_day_that_is_named():
    text = readme.README.read_text("utf-8")
    block = text.split("<!-- times:")[1].split("<!-- end of times")[0]
    device, date = re.findall(r"^(.*), bfloat16, ([\d-]+);", block, re.MULTILINE)[0]
    head, _, *rows = [line.split("|")[2:-2] for line in block.splitlines() if line.startswith("|")]
    records = readme.read(readme.RESULTS / "benchmarks.jsonl")
    count = 0
    for (name, title), column, *cells in zip(readme.COMPETITORS.items(), head, *rows, strict=True):
        assert column.strip().startswith(title)
        days = re.findall(r"\d{4}-\d\d-\d\d", column) or [date]
        recorded = {
            f"{time.median:.3g}"
            for one in records
            if one.surroundings.device == device and one.surroundings.date[:10] in days
            if one.competitor.split(",")[0] == name
            for time in (one.forward_ms, one.backward_ms)
            if time is not None
        }
        shown = {number for cell in cells for number in re.findall(r"[\d.]+", cell)}
        assert shown <= recorded, column
        count += len(shown)
    assert count > 40


def test_whoever_is_shown_as_right_or_wrong_was_recorded_so():
    table, _, rest = readme.peers().partition("\n\n")
    for record in readme.matrix.read(readme.RESULTS / "peers.jsonl"):
        if record.implementation in readme.OURS:
            continue
        assert f"`{record.implementation}`" in table + rest
        if record.grade:  # errors were measured: it ran
            (line,) = [
                line
                for line in table.splitlines()
                if f"`{record.implementation}`, {record.operation} |" in line
                and (record.environment.get("gpu") or "cpu") in line
            ]
            wrong = sum(
                record.cells[name].counts.get("wrong", 0)
                for name in readme.DTYPES
                if name in record.cells
            )
            assert f"| {f'**{wrong}**' if wrong else '0'} |" in line


def test_the_picture_shows_what_it_says():
    """Of the four kernels the right one alone is below the condition everywhere; all are near."""
    import numpy as np
    import torch

    from isoform.conformance.evoformer.condition import conditions
    from isoform.reference.numpy import evoformer_attention

    torch.manual_seed(1)
    L = 1000
    q, k, v = (size * torch.randn(1, 1, L, 1, 32).bfloat16() for size in (0.5, 1, 0.5))
    bias = 0.5 * torch.randn(1, 1, 1, L, L).bfloat16()
    operands = {"q": q, "k": k, "v": v, "pair_bias": bias}
    wide = {name: x.float().numpy().astype("f8") for name, x in operands.items()}
    out, lse = evoformer_attention(**wide, return_lse=True)
    found = conditions(wide, None, {"out": out, "lse": lse}, gradients=False)["out"]
    for name, kernel in readme.kernels():
        error = np.abs(kernel(q, k, v, bias).double().numpy() - out)
        assert error.max() < 0.1
        assert (error <= 2.0**-8 * found.relative).all() == (name == "right")

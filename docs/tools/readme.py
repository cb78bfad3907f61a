"""What the README shows of recorded runs: times beside peers, what was seen of other people's
kernels, and a picture.

``python docs/tools/readme.py`` fills the README from ``ci/results/`` after new records;
``--picture`` draws ``docs/budgets.png`` anew.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from isoform.conformance import matrix
from isoform.conformance.verdicts import Verdict
from isoform.kernels.benchmark.records import Record, latest, read

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "ci" / "results"
PICTURE = ROOT / "docs" / "budgets.png"
HOW = "made by python docs/tools/readme.py, do not edit"
COMPETITORS = {
    "isoform": "isoform",
    "FlexAttention": "FlexAttention, compiled",
    "cuEquivariance": "cuEquivariance",
    "SDPA": "PyTorch's SDPA",
    "eager": "PyTorch, eager",
}
"""Columns: what a competitor's name begins with, and its head."""

DTYPES = ("fp16", "bf16", "fp32", "fp64")


def filled(text: str, blocks: dict[str, Callable[[], str]]) -> str:
    """``text`` with each block between its marks.

    Raises:
        ValueError: Marks are missing.
    """
    for name, made in blocks.items():
        begin, end = f"<!-- {name}: {HOW} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"there is no place for {name}: put in the lines\n{begin}\n{end}")
        between = f"\n{made().strip()}\n\n"
        text = pattern.sub(between.replace("\\", r"\\"), text)
    return text


def times() -> str:
    """Milliseconds of each competitor in each case, of the latest record."""
    found = [one for one in latest(read(RESULTS / "benchmarks.jsonl")) if not one.not_run]
    found = [one for one in found if one.dtype == "bfloat16" and one.biases]
    devices = Counter(one.surroundings.device for one in found)
    ((device, _),) = devices.most_common(1)
    found = [one for one in found if one.surroundings.device == device]
    cases = dict.fromkeys(one.case for one in found)
    date = max(map(_day, found))
    columns = [
        title + _other_days(one for one in found if _column(one) == name and _day(one) != date)
        for name, title in COMPETITORS.items()
    ]
    head = ["B,S,L,H,D", *columns, "memory of ours, of eager"]
    rows = [_times([one for one in found if one.case == case]) for case in cases]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        f"{device}, bfloat16, {date}; milliseconds, forward / backward; **the fastest**:\n\n{table}"
    )


def _day(one: Record) -> str:
    return one.surroundings.date[:10]


def _column(one: Record) -> str:
    return one.competitor.split(",")[0]


def _other_days(ran: Iterable[Record]) -> str:
    """What a column says of times that were not taken on the day of the table."""
    days = sorted({_day(one) for one in ran})
    return f" ({', '.join(days)})" if days else ""


def _times(ran: Sequence[Record]) -> list[str]:
    by_name = {column: [one for one in ran if _column(one) == column] for column in COMPETITORS}
    best = {column: _fastest(ones) for column, ones in by_name.items()}
    cells = [",".join(map(str, ran[0].shape))]
    tops = [
        min((pair[which] for pair in best.values() if pair and pair[which]), default=None)
        for which in (0, 1)
    ]
    for pair in best.values():
        shown = [_ms(x, x == top) for x, top in zip(pair or (None, None), tops, strict=True)]
        cells.append(" / ".join(shown) if pair else "–")
    memory = [
        next((one.peak_bytes for one in by_name[name]), None) for name in ("isoform", "eager")
    ]
    cells.append(" of ".join(_bytes(size) for size in memory))
    return cells


def _fastest(ones: Sequence[Record]) -> tuple[float | None, float | None] | None:
    """Of a competitor's variants, the one that is faster in both passes together."""
    pairs = [
        (
            one.forward_ms.median if one.forward_ms else None,
            one.backward_ms.median if one.backward_ms else None,
        )
        for one in ones
    ]
    return min(pairs, key=lambda pair: sum(x or 0 for x in pair), default=None)


def _ms(x: float | None, fastest: bool) -> str:
    if x is None:
        return "–"
    return f"**{x:.3g}**" if fastest else f"{x:.3g}"


def _bytes(size: int | None) -> str:
    if size is None:
        return "–"
    return f"{size / 2**30:.2g} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


OURS = ("torch-reference", "torch-tiled", "torch-flex")
"""In the record of peers beside them, and judged in every run."""


def peers() -> str:
    """What was seen of other people's kernels: how many checks failed, and of what kind."""
    rows = [["implementation", "on", "pass", "wrong", "raises", "what is wrong"], ["---"] * 6]
    seen, idle = set(OURS), []
    found = matrix.read(RESULTS / "peers.jsonl")
    for record in sorted(found, key=lambda one: (one.operation, one.implementation)):
        if record.implementation in OURS or record.not_run:
            continue
        counts = _counts(record)
        seen.add(record.implementation)
        if counts["pass"] + counts["wrong"]:
            rows.append(_peer(record, counts))
        else:
            idle.append(f"`{record.implementation}` ({_place(record)})")
    absent = dict.fromkeys(one.implementation for one in found if one.implementation not in seen)
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    raised = f"Nothing but an error came from {', '.join(idle)}. " if idle else ""
    names = ", ".join(f"`{name}`" for name in absent)
    return f"{table}\n\n{raised}Wrapped and not run so far: {names}."


def _counts(record: matrix.Record) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name in DTYPES:
        if cell := record.cells.get(name):
            counts.update(cell.counts)
    return counts


def _place(record: matrix.Record) -> str:
    place = record.environment.get("gpu") or record.environment.get("device", "")
    return f"{place}, {record.environment['date'][:10]}"


def _peer(record: matrix.Record, counts: Counter[str]) -> list[str]:
    labels = {one.name: one.label for one in matrix.BEHAVIOURS if one.group != "dtype"}
    wrong = sorted(
        (-cell.counts["wrong"] / max(cell.checked, 1), labels[name])
        for name, cell in record.cells.items()
        if name in labels and cell.counts.get("wrong")
    )
    return [
        f"`{record.implementation}`, {record.operation}",
        _place(record),
        str(counts["pass"]),
        f"**{counts['wrong']}**" if counts["wrong"] else "0",
        str(sum(counts[verdict] for verdict in RAISES)),
        ", ".join(label for _, label in wrong[:4]) or "–",
    ]


RAISES = (Verdict.ERROR, Verdict.BROKEN_DECLARATION, Verdict.BAD_REFUSAL)


BLOCKS: dict[str, Callable[[], str]] = {"times": times, "peers": peers}


# --- the picture ---


def kernels() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Four attentions in bfloat16: one is right."""
    import torch

    def honest(q: Any, k: Any, v: Any, bias: Any) -> Any:
        s = torch.einsum("bsqhd,bskhd->bshqk", q, k).float() * q.shape[-1] ** -0.5 + bias
        return torch.einsum("bshqk,bskhd->bsqhd", s.softmax(-1).to(q.dtype), v)

    yield "right", honest
    yield (
        "loses the last tile of keys",
        lambda q, k, v, bias: honest(q, k[:, :, :992], v[:, :, :992], bias[..., :992]),
    )
    yield "forgets the pair bias", lambda q, k, v, bias: honest(q, k, v, 0 * bias)
    yield "returns zeros", lambda q, k, v, bias: 0 * q


def draw() -> None:
    """The picture: the same four errors against a fixed tolerance, and over their condition."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt
    import numpy as np
    import torch

    from isoform.conformance.evoformer.condition import conditions
    from isoform.reference.numpy import evoformer_attention

    torch.manual_seed(0)
    L, H, D = 1000, 2, 32
    q, k, v = (size * torch.randn(1, 1, L, H, D).bfloat16() for size in (0.5, 1, 0.5))
    bias = 0.5 * torch.randn(1, 1, H, L, L).bfloat16()
    wide = {
        name: x.float().numpy().astype("f8")
        for name, x in {"q": q, "k": k, "v": v, "pair_bias": bias}.items()
    }
    out, lse = evoformer_attention(**wide, return_lse=True)
    condition = conditions(wide, None, {"out": out, "lse": lse}, gradients=False)["out"].relative

    mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    mpl.rcParams.update({"axes.titlelocation": "left", "legend.frameon": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", dpi=160)
    for (name, kernel), color in zip(
        kernels(), ("#2b6cb0", "#6b46c1", "#dd6b20", "#c53030"), strict=True
    ):
        error = np.abs(kernel(q, k, v, bias).double().numpy() - out).ravel()
        share = error / (2.0**-8 * condition.ravel())
        left.hist(error, np.geomspace(1e-6, 1, 80), histtype="step", color=color, linewidth=1.6)
        bins = np.geomspace(1e-4, 100, 80)
        right.hist(share, bins, histtype="step", color=color, linewidth=1.6)
        right.plot([], [], color=color, label=name)
    left.axvline(0.1, color="#1f2933", linestyle="--", linewidth=1)
    left.text(0.11, left.get_ylim()[1] * 1.02, "atol=0.1")
    left.set(xscale="log", yticks=[], xlabel="absolute error")
    left.set_title("All four pass a fixed tolerance.")
    right.axvline(1, color="#1f2933", linestyle="--", linewidth=1)
    right.set(xscale="log", yticks=[], xlabel="error over u·κ, element by element")
    right.set_title("Only the right one is within what rounding explains.")
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(PICTURE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the README, or draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--picture", action="store_true", help="draw the picture anew")
    if parser.parse_args(arguments).picture:
        draw()
    else:
        README.write_text(filled(README.read_text("utf-8"), BLOCKS), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

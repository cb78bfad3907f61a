"""Judge an implementation on a GPU and append the outcome, one JSON line, to a record.

    python ci/gpu_record.py isoform.conformance.implementations.cuda:CUDA_PLAIN ci/results/gpu.jsonl

What takes the time is the oracle, in float64 on the CPU: cases are spread over processes. Cases of
full size are left out, as on a CPU, unless --large is given. Exits with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from isoform.conformance.implementation import Implementation, adopt
from isoform.conformance.judge import judge, judge_invalid_calls, judge_memory
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.run import environment
from isoform.conformance.verdicts import Outcome


def main() -> int:
    """Judge, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("implementation", help="module:OBJECT")
    parser.add_argument("record", type=Path, help="the file that a line is appended to")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) * 3 // 4))
    parser.add_argument("--tag", help="only cases with this tag")
    parser.add_argument("--operation", choices=sorted(OPERATIONS), help="only cases of this one")
    parser.add_argument("--large", action="store_true", help="the cases of full size too")
    parser.add_argument("--commit", default=None, help="where it cannot be asked of git")
    asked = parser.parse_args()

    implementation = load(asked.implementation)
    cases = [
        case.id
        for case in sorted(CASES.values(), key=lambda case: -case.shape.largest * case.shape.D)
        if implementation.of(case.operation) is not None
        and (asked.large or not case.large)
        and (asked.tag is None or asked.tag in case.tags)
        and asked.operation in (None, case.operation)
    ]
    os.environ.setdefault("OMP_NUM_THREADS", "2")  # of each process: the cores are shared
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "2")
    with ProcessPoolExecutor(asked.jobs, multiprocessing.get_context("spawn")) as pool:
        judged = pool.map(judge_case, [asked.implementation] * len(cases), cases)
        outcomes = []
        for done, (case, several) in enumerate(zip(cases, judged, strict=True), start=1):
            outcomes += several
            failed = sum(outcome.verdict.fails for outcome in several)
            sys.stderr.write(f"{done}/{len(cases)} {case}: {failed} of {len(several)} fail\n")
    if asked.tag is None and asked.operation is None:
        outcomes += judge_invalid_calls(implementation, "cuda")
        outcomes += judge_memory(implementation, "cuda")

    line = {
        **environment([implementation], "cuda"),
        "commit": asked.commit or commit(),
        **versions(),
        "implementation": implementation.name,
        "cases": len(cases),
        "operation": asked.operation or "all",
        "left_out": sum(implementation.of(case.operation) is not None for case in CASES.values())
        - len(cases),
        "verdicts": verdicts(outcomes),
        "failures": [
            f"{outcome.case} {outcome.group}/{outcome.check}: {outcome.message}"
            for outcome in outcomes
            if outcome.verdict.fails
        ],
    }
    text = json.dumps(line)
    with asked.record.open("a", encoding="utf-8") as record:
        record.write(text + "\n")
    sys.stdout.write(text + "\n")
    return int(bool(line["failures"]))


def load(name: str) -> Implementation:
    """The implementation ``module:OBJECT``."""
    module, _, attribute = name.partition(":")
    return adopt(getattr(import_module(module), attribute))


def judge_case(implementation: str, case: str) -> list[Outcome]:
    """One case, in a process of its own."""
    return judge(load(implementation), CASES[case], device="cuda", architecture=architecture())


def architecture() -> str:
    """The GPU's, such as ``"sm_90"``."""
    import torch

    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def verdicts(outcomes: Iterable[Outcome]) -> dict[str, dict[str, int]]:
    """How many checks came to each verdict, by the dtype of the case."""
    counted: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        dtype = CASES[outcome.case].dtype if outcome.case in CASES else "calls and memory"
        counted.setdefault(dtype, Counter())[outcome.verdict.value] += 1
    return {dtype: dict(counts) for dtype, counts in counted.items()}


def versions() -> dict[str, Any]:
    """Of the driver and the compiler."""
    import cupy

    from isoform.kernels.compiler import toolkit

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    return {
        "driver": driver[0],
        "cupy": cupy.__version__,
        "nvrtc": ".".join(map(str, toolkit().version)),
    }


def commit() -> str:
    """What is checked out, and whether anything was changed since."""
    described = ["git", "describe", "--always", "--abbrev=12", "--dirty"]
    return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

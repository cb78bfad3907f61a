"""Judge the peers that can run here, and append what was seen to a record, a JSON line each.

    python ci/peers.py ci/results/peers.jsonl              # all; those that cannot are recorded too
    python ci/peers.py ci/results/peers.jsonl sdpa-math xformers --device cuda --jobs 10

A peer that cannot run here is a line as well: *not run*, and what it needs. `isoform report
--matrix ci/results/peers.jsonl` makes a page of the record. What peers get wrong does not fail this
program: it is what the record is for. Which cases were left out is recorded with what was seen.

Every peer has processes of its own, over which its cases are spread: what takes the time is the
oracle, on the CPU, and a peer that spoils a GPU's context, or dies, spoils no other's record. One
that compiles for every size, or hangs, is stopped after ``--minutes``; how far it came is recorded.
What runs over ranks has a group of them for each of its processes: few ``--jobs`` are best then.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as TimeIsUp
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from isoform.conformance.case import select
from isoform.conformance.implementation import Implementation
from isoform.conformance.judge import judge, judge_invalid_calls, judge_memory
from isoform.conformance.matrix import Record, records
from isoform.conformance.operations import CASES
from isoform.conformance.peers import PEERS, RANKS, Peer
from isoform.conformance.ranks import Ranks
from isoform.conformance.registry import find
from isoform.conformance.run import Run, declared, environment
from isoform.conformance.verdicts import Outcome


def main() -> int:
    """Judge and append."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("record", type=Path, help="the file that lines are appended to")
    parser.add_argument("names", nargs="*", help="peers, or implementations of ours")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tag", help="only cases with this tag")
    parser.add_argument("--case", action="append", default=[], help="only cases of this pattern")
    parser.add_argument("--minutes", type=float, help="for each peer (default: no limit)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each process: the cores are shared
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    asked.record.parent.mkdir(parents=True, exist_ok=True)
    for name in asked.names or PEERS:
        lines = seen(name, asked)
        with asked.record.open("a", encoding="utf-8") as record:
            record.writelines(line.as_json() + "\n" for line in lines)
    return 0


def seen(name: str, asked: argparse.Namespace) -> list[Record]:
    """What was seen of ``name``."""
    peer = PEERS.get(name)
    if peer is not None and (reason := peer.why_not()):
        sys.stderr.write(f"{name}: not run here: it {reason}\n")
        return [not_run(peer, reason)]
    if peer is not None and peer.where == "ranks" and asked.device != "cuda":
        reason = f"runs on ranks with a GPU each: --device cuda, not {asked.device}"
        sys.stderr.write(f"{name}: not run: it {reason}\n")
        return [not_run(peer, reason, asked.device)]
    implementation = found(name, asked.device)
    operations = {one.operation for one in implementation.offers}
    offered = {
        case.id: case
        for case in CASES.values()
        if case.operation in operations
        and (asked.device != "cpu" or not case.large)
        and "full-size" not in case.tags
    }
    cases = sorted(
        select(offered, patterns=asked.case, tags=[asked.tag] if asked.tag else []),
        # the long ones first; where time may be up before all are judged, those of every kind
        key=lambda case: (
            asked.minutes is not None and "quick" not in case.tags,
            -case.shape.largest * case.shape.D,
        ),
    )
    start = time.monotonic()
    outcomes: list[Outcome] = []
    judged_cases = 0
    ended = ""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(asked.jobs, len(cases) + 1), spawn)
    pending = [pool.submit(judge_calls, name, asked.device)]
    pending += [pool.submit(judge_case, name, case.id, asked.device) for case in cases]
    try:
        for future in as_completed(pending, asked.minutes and 60 * asked.minutes):
            outcomes += future.result()
            judged_cases += future is not pending[0]
    except BrokenProcessPool:  # which case it was cannot be told: others were under way
        ended = f"{name} ended the process that judged it"
    except TimeIsUp:
        ended = f"{asked.minutes:g} minutes were up"
        for process in multiprocessing.active_children():  # what hangs does not end by itself
            process.kill()
    finally:
        pool.shutdown(cancel_futures=True)
    if not outcomes:
        sys.stderr.write(f"{name}: nothing seen: {ended}\n")
        return [not_run(peer, f"was not seen to answer: {ended}", asked.device)] if peer else []
    order = {case.id: place for place, case in enumerate(CASES.values())}
    outcomes.sort(key=lambda outcome: order.get(outcome.case, -1))
    judged = Run(
        tuple(outcomes),
        {implementation.name: declared(implementation)},
        environment([implementation], asked.device),
    )
    counts = {str(verdict): n for verdict, n in judged.counts().items()}
    took = f"{time.monotonic() - start:.0f} s"
    sys.stderr.write(f"{name}: {counts} {ended} ({judged_cases} cases, {took})\n")
    limits = {
        variable: value
        for variable, value in os.environ.items()
        if variable in peer_variables(peer)
    }
    if judged_cases < len(offered):
        chosen = " ".join([*([asked.tag] if asked.tag else []), *asked.case]) or "all"
        limits["cases"] = f"{chosen}: {judged_cases} of {len(offered)}"
    if ended:
        limits["ended"] = f"{ended}; what is shown was seen before"
    return [
        replace(each, environment={**each.environment, **versions(peer), **limits})
        for each in records(judged)
    ]


def found(name: str, device: str) -> Implementation:
    """The implementation called ``name``; of ours over ranks, on as many as peers are judged on,
    with a GPU each where that is the device.
    """
    implementation = find(name)
    if name in PEERS or implementation.spread is None or device != "cuda":
        return implementation
    return implementation.on(Ranks(RANKS, "torch-nccl"))


def peer_variables(peer: Peer | None) -> tuple[str, ...]:
    """Variables of the environment that a peer's choice of a kernel follows."""
    cueq = peer is not None and peer.name.startswith("cueq-")
    return ("CUEQ_TRIATTN_FALLBACK_THRESHOLD",) if cueq else ()


def judge_case(name: str, case: str, device: str) -> list[Outcome]:
    """One case, in a process of the peer's."""
    implementation = found(name, device)
    return judge(implementation, CASES[case], device=device, architecture=architecture(device))


def judge_calls(name: str, device: str) -> list[Outcome]:
    """Answers to wrong calls, and how memory grows."""
    implementation = found(name, device)
    return judge_invalid_calls(implementation, device) + judge_memory(implementation, device)


def not_run(peer: Peer, reason: str, device: str = "cpu") -> Record:
    """The line of a peer that cannot run here, or did not on ``device``."""
    operation = {"rotary": "rotary_embedding", "sequence": "attention"}
    module = peer.target.partition(":")[0].rpartition(".")[2]
    return Record(
        peer.name,
        operation.get(module, "evoformer_attention"),
        environment([], device) | versions(peer) | {"function": peer.function},
        not_run=f"{peer.function} {reason}",
    )


def versions(peer: Peer | None) -> dict[str, str]:
    """Of the packages that a peer is made of."""
    found = {}
    for package in peer.packages.values() if peer else ():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def architecture(device: str) -> str:
    """The GPU's, such as ``"sm_90"``; empty for a CPU."""
    if device == "cpu":
        return ""
    import torch

    return "sm_{}{}".format(*torch.cuda.get_device_capability())


if __name__ == "__main__":
    sys.exit(main())

"""Judge the peers that can run here, and append what was seen to a record, a JSON line each.

    python ci/peers.py ci/results/peers.jsonl              # all; those that cannot are recorded too
    python ci/peers.py ci/results/peers.jsonl sdpa-math xformers --device cuda

A peer that cannot run here is a line as well: *not run*, and what it needs. `isoform report
--matrix ci/results/peers.jsonl` makes a page of the record. What peers get wrong does not fail this
program: it is what the record is for.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from isoform.conformance.matrix import Record, records
from isoform.conformance.operations import CASES
from isoform.conformance.peers import PEERS, Peer
from isoform.conformance.registry import find
from isoform.conformance.run import environment, run


def main() -> int:
    """Judge and append."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("record", type=Path, help="the file that lines are appended to")
    parser.add_argument("names", nargs="*", help="peers, or implementations of ours")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tag", help="only cases with this tag")
    asked = parser.parse_args()
    lines = [line for name in asked.names or PEERS for line in seen(name, asked.device, asked.tag)]
    asked.record.parent.mkdir(parents=True, exist_ok=True)
    with asked.record.open("a", encoding="utf-8") as record:
        record.writelines(line.as_json() + "\n" for line in lines)
    return 0


def seen(name: str, device: str, tag: str | None) -> list[Record]:
    """What was seen of ``name``."""
    peer = PEERS.get(name)
    if peer is not None and (reason := peer.why_not()):
        sys.stderr.write(f"{name}: not run here: it {reason}\n")
        return [not_run(peer, reason)]
    implementation = find(name)
    operations = {one.operation for one in implementation.offers}
    cases = [
        case
        for case in CASES.values()
        if case.operation in operations
        and (device != "cpu" or not case.large)
        and "full-size" not in case.tags
        and (tag is None or tag in case.tags)
    ]
    judged = run([implementation], cases, device=device, architecture=architecture(device))
    found = list(records(judged))
    limits = {"cases": tag} if tag else {}
    counts = {str(verdict): n for verdict, n in judged.counts().items()}
    sys.stderr.write(f"{name}: {counts}\n")
    return [
        replace(each, environment={**each.environment, **versions(peer), **limits})
        for each in found
    ]


def not_run(peer: Peer, reason: str) -> Record:
    """The line of a peer that cannot run here."""
    operation = {"rotary": "rotary_embedding", "sequence": "attention"}
    module = peer.target.partition(":")[0].rpartition(".")[2]
    return Record(
        peer.name,
        operation.get(module, "evoformer_attention"),
        environment([], "cpu") | versions(peer) | {"function": peer.function},
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

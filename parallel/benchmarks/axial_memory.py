"""What one rank holds at most in a block of the Evoformer, forward and backward: a table.

    python parallel/benchmarks/axial_memory.py --ranks 1 2 4 8

Every tensor is counted from when PyTorch makes its memory until it lets go of it: activations,
what autograd keeps, what is sent and received, and gradients; parameters are not. It is exact and
the same on every machine. Ranks are threads, each with a count of its own.
"""

from __future__ import annotations

import argparse
import copy
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isoform.parallel.axial import evoformer_block
from isoform.parallel.communicators.simulated import simulate
from isoform.parallel.sharding import Sharding
from isoform.reference.torch.evoformer import evoformer_attention_tiled
from isoform.reference.torch.evoformer_stack import EvoformerBlock


class Peak(TorchDispatchMode):
    """Counts the bytes that this thread's tensors hold: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.counted: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.count(x.untyped_storage())
        return out

    def count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.counted:
            return

        def gone(_: Any) -> None:
            del self.counted[key]
            self.now -= size

        self.counted[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def peak(
    P: int, S: int, R: int, pieces: int | None = None, block: EvoformerBlock | None = None
) -> int:
    """The most bytes that any of P ranks holds, for S sequences and R residues in float32."""
    if block is None:
        block = EvoformerBlock(attention=evoformer_attention_tiled)
    c_m, c_z = block.msa_row.query.in_features, block.msa_row.pair_bias.in_features

    def rank(comm: Any) -> int:
        sequences, residues = Sharding.contiguous(S, P), Sharding.contiguous(R, P)
        own = copy.deepcopy(block)
        with Peak() as held:
            msa = torch.zeros(1, sequences.lengths[comm.rank], R, c_m, requires_grad=True)
            pair = torch.zeros(1, residues.lengths[comm.rank], R, c_z, requires_grad=True)
            options = {"comm": comm, "sequences": sequences, "residues": residues}
            outs = evoformer_block(own, msa, pair, **options, pieces=pieces)
            torch.autograd.backward(outs, [torch.ones_like(x) for x in outs])
        return held.most

    return max(simulate(rank, P))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--residues", type=int, default=128)
    given = parser.parse_args()
    sizes = given.sequences, given.residues
    print(f"S = {sizes[0]}, R = {sizes[1]}, published widths, float32, attention in tiles\n")
    print("| ranks | MiB on a rank | times P, of one rank | with factors in one piece |")
    print("|---|---|---|---|")
    alone = peak(1, *sizes)
    for P in given.ranks:
        most, whole = peak(P, *sizes), peak(P, *sizes, pieces=1)
        print(f"| {P} | {most / 2**20:.0f} | {P * most / alone:.2f} | {whole / 2**20:.0f} |")


if __name__ == "__main__":
    main()

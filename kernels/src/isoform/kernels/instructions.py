"""Instruction counts of hot loops: what machine code spends on a logit, with no GPU to time it.

A tensor-core kernel spends nearly all its time in one loop, and what that takes is, to first
order, how many instructions a logit costs. Those are in the machine code: it is disassembled, its
loops are found, and the instructions of the innermost ones that multiply matrices are counted by
kind. A change that adds an exponential, or a load that the compiler does not lift out of the loop,
is seen without a GPU, as is one that does away with them.

Counts are recorded with the compile gate's figures (:mod:`isoform.kernels.gate`), in
``kernels/instruction_counts.jsonl``, which also says how much they may rise. They depend on the
compiler's version as much as those.

A loop is what graph theory calls a natural one: a jump back to a place that every way to the jump
leads through, and all that lies between. Both sides of a branch in it are counted. What a warp runs
only if its threads have diverged is not.
"""

from __future__ import annotations

import json
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from isoform.kernels.compiler import Compiled, CompilerUnavailable

KINDS: Mapping[str, tuple[str, ...]] = {
    "exponentials": ("MUFU.EX2",),
    "floats": ("FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2"),
    "products": ("HMMA", "HGMMA", "UTCHMMA"),
    "shared_loads": ("LDS", "LDSM"),
    "global_loads": ("LDG", "LDGSTS"),
    "total": ("",),
}
"""What is counted: instructions whose name, up to a dot, is one of these."""

PRODUCTS = {
    "evoformer_tensor_forward": 2,
    "evoformer_tensor_backward_query": 3,
    "evoformer_tensor_backward_key": 4,
    "evoformer_tensor_backward_pair_bias": 2,
    "evoformer_tensor_backward_query_pair": 3,
    "evoformer_warpgroup_forward": 2,
    "evoformer_warpgroup_backward_query": 3,
    "evoformer_warpgroup_backward_key": 4,
    "evoformer_warpgroup_backward_pair_bias": 2,
    "evoformer_warpgroup_backward_query_pair": 6,
    "attention_tensor_forward": 2,
    "attention_tensor_backward_query": 3,
    "attention_tensor_backward_key": 4,
}
"""How many multiplications by each of the ``HEAD_DIM`` channels a logit takes part in, by source:
so many logits are done in a loop as its matrix products say. (A loop that has fewer, such as that
which sums δ before the rest where there is a gate, does more logits than are reckoned. In that of
``evoformer_warpgroup_backward_query_pair`` a team finishes a row in its turn: every fourth time,
for the logits of four.) Other sources are not counted.
"""

MASKED = frozenset(
    f"evoformer_warpgroup_{name}" for name in ("forward", "backward_query", "backward_pair_bias")
)
"""Sources where sixteen multiplications more say of a logit whether its key is dropped, if there is
no mask bias."""

ARCHITECTURES = frozenset({"sm_80", "sm_90", "sm_90a"})
"""What is looked at: others run nearly the same instructions."""

MAY_RISE = 0.03
"""By what share a count may rise, or fall without being recorded anew, in a record's first line
when there was none before; what stands there is kept.
"""

Counts = dict[str, dict[str, float]]
"""By loop, instructions of each kind."""

Recorded = dict[str, dict[str, Counts]]
"""By variant and kernel."""


@dataclass(frozen=True)
class Instruction:
    """One line of machine code.

    Attributes:
        name: Such as ``"HMMA.16816.F32.BF16"``.
        operands: The rest of it.
        guarded: Whether it is done by some threads only.
        label: The name of its place, if something jumps there.
    """

    name: str
    operands: str
    guarded: bool
    label: str = ""

    def is_one_of(self, names: Iterable[str]) -> bool:
        """Whether its name is one of ``names``, or one of them and what follows a dot."""
        return any(not name or f"{self.name}.".startswith(f"{name}.") for name in names)


# --- From machine code to loops -------------------------------------------------------------------

_SECTION = re.compile(r"^\s*\.section\s+\.text\.([\w$]+)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;"
)
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_ENDS = ("EXIT", "RET", "BRX", "JMX", "JMP", "BPT")


def disassembler() -> str:
    """Where ``nvdisasm`` is.

    Raises:
        CompilerUnavailable: It is not installed.
    """
    site = Path(sysconfig.get_path("platlib")) / "nvidia"
    for folder in (None, *(str(path) for path in sorted(site.glob("cu*/bin"), reverse=True))):
        if found := which("nvdisasm", path=folder):
            return found
    raise CompilerUnavailable(
        "nvdisasm, which lists machine code, is missing: install nvidia-cuda-nvdisasm, or put a "
        "CUDA toolkit's on PATH"
    )


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin, as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [disassembler(), "--print-code", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvdisasm failed: {done.stderr.strip()}")
    return done.stdout


def kernels(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel of a listing, by its name."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    label = ""
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            current = found.setdefault(section[1], [])
        elif named := _LABEL.match(line):
            label = label or named[1]
            if label != named[1]:  # two names of one place
                current.append(Instruction("NOP.LABEL", "", guarded=False, label=label))
                label = named[1]
        elif instruction := _INSTRUCTION.match(line):
            guarded = instruction["guard"] is not None
            name, operands = instruction["name"], instruction["operands"]
            current.append(Instruction(name, operands, guarded, label))
            label = ""
    return {name: code for name, code in found.items() if code}


def loops(code: Sequence[Instruction]) -> list[frozenset[int]]:
    """The natural loops of a kernel, each as the places of its instructions; inner ones first."""
    follows = _blocks(code)
    dominators = _dominators(follows)
    comes_from: dict[int, set[int]] = {block: set() for block in dominators}
    for block in dominators:
        for following in follows[block]:
            comes_from[following].add(block)
    bodies: dict[int, set[int]] = {}
    for block in dominators:
        for head in follows[block]:
            if head in dominators[block]:
                body, left = bodies.setdefault(head, {head}), [block]
                while left:
                    one = left.pop()
                    if one not in body:
                        body.add(one)
                        left += comes_from[one]
    starts = sorted(follows)
    ends = dict(zip(starts, [*starts[1:], len(code)], strict=True))
    found = (
        frozenset(at for block in body for at in range(block, ends[block]))
        for body in bodies.values()
    )
    return sorted(found, key=lambda body: (len(body), min(body)))


def _blocks(code: Sequence[Instruction]) -> dict[int, tuple[int, ...]]:
    """Blocks of instructions that are done one after another, by their first, and what follows."""
    places = {one.label: at for at, one in enumerate(code) if one.label}
    jumps = {at: _TARGET.findall(one.operands) for at, one in enumerate(code) if _jumps(one)}
    after = {at + 1 for at, one in enumerate(code) if at in jumps or one.is_one_of(_ENDS)}
    starts = sorted({0, *places.values(), *after} - {len(code)})
    follows: dict[int, tuple[int, ...]] = {}
    for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
        last = code[end - 1]
        targets = [places[name] for name in jumps.get(end - 1, ()) if name in places]
        only_targets = end - 1 in jumps and not last.guarded and last.operands[0] == "`"
        stops = only_targets or (last.is_one_of(_ENDS) and not last.guarded)
        onwards = [] if stops or end == len(code) else [end]
        follows[start] = tuple(dict.fromkeys(targets + onwards))
    return follows


def _jumps(one: Instruction) -> bool:
    """Whether it jumps, other than to what only diverged warps do.

    A call of a place in the same kernel is a jump that comes out far away; it does not return.
    """
    if one.is_one_of(["CALL"]):
        return _TARGET.search(one.operands) is not None
    return one.is_one_of(["BRA"]) and not one.is_one_of(["BRA.DIV"])


def _dominators(follows: Mapping[int, Sequence[int]]) -> dict[int, set[int]]:
    """Of every block that is reached, those that every way to it leads through."""
    reached, left = {0}, [0]
    while left:
        further = set(follows[left.pop()]) - reached
        reached |= further
        left += further
    order = sorted(reached)
    comes_from = {block: [one for one in order if block in follows[one]] for block in order}
    found = {block: set(order) for block in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            through = set.intersection(*(found[one] for one in comes_from[block])) | {block}
            if through != found[block]:
                found[block], changed = through, True
    return found


# --- What the loops cost --------------------------------------------------------------------------


def counted(compiled: Compiled) -> dict[str, Counts]:
    """What each kernel of a source in :data:`PRODUCTS` spends on a logit.

    Returns:
        By kernel, for each of its innermost loops with matrix products, the instructions of each
        kind per logit, cheapest first; and as ``"around"`` those of the loop around them, per turn
        of it.
    """
    per_logit = PRODUCTS[compiled.name] * int(compiled.defines["HEAD_DIM"])
    if compiled.name in MASKED and not compiled.defines["MASK_BIAS"]:
        per_logit += 16
    found = {
        name: _of(code, per_logit) for name, code in kernels(disassemble(compiled.cubin)).items()
    }
    return {name: counts for name, counts in found.items() if counts}


def _of(code: Sequence[Instruction], per_logit: int) -> Counts:
    every = loops(code)
    multiplying = [loop for loop in every if any(_macs(code[at]) for at in loop)]
    inner = [loop for loop in multiplying if not any(other < loop for other in multiplying)]
    found = []
    for loop in inner:
        # a warp's multiplications over those of a logit, over the lanes of a warp
        logits = sum(_macs(code[at]) for at in loop) / per_logit / 32
        found.append({kind: round(n / logits, 3) for kind, n in _kinds(code, loop).items()})
    found.sort(key=lambda kinds: tuple(reversed(kinds.values())))
    counts: Counts = {f"loop {number}": kinds for number, kinds in enumerate(found, start=1)}
    together = frozenset().union(*inner)
    around = next((loop for loop in multiplying if loop > together), None)
    if around is not None:
        counts["around"] = {kind: float(n) for kind, n in _kinds(code, around - together).items()}
    return counts


def _kinds(code: Sequence[Instruction], places: Iterable[int]) -> dict[str, int]:
    there = [code[at] for at in places if code[at].name != "NOP.LABEL"]
    return {kind: sum(one.is_one_of(names) for one in there) for kind, names in KINDS.items()}


def _macs(one: Instruction) -> int:
    """Multiplications of a matrix product that a warp does, by the sizes in its name."""
    if not one.is_one_of(KINDS["products"]):
        return 0
    if sizes := re.search(r"\.(\d+)x(\d+)x(\d+)", one.name):  # of four warps together
        rows, columns, depth = map(int, sizes.groups())
        return rows * columns * depth // 4
    if sizes := re.search(r"\.(16)(8)(8|16|32)\b", one.name):
        rows, columns, depth = map(int, sizes.groups())
        return rows * columns * depth
    raise ValueError(f"{one.name}: a matrix product of sizes that are not known here")


# --- The record -----------------------------------------------------------------------------------


def complaints(
    variant: str, found: Mapping[str, Counts], recorded: Recorded, may_rise: float
) -> list[str]:
    """What is dearer in ``variant`` than recorded, or so much cheaper that it is to be recorded."""
    if variant not in recorded:
        return [f"{variant}: no instruction counts are recorded"]
    before = recorded[variant]
    said = []
    for kernel in sorted({*before, *found}):
        was, now = before.get(kernel, {}), found.get(kernel, {})
        if was.keys() != now.keys():
            loops = f"{', '.join(now) or 'no loop'}, recorded are {', '.join(was) or 'none'}"
            said.append(f"{variant}: {kernel} has {loops}: record anew")
            continue
        for loop, kinds in now.items():
            per = "a turn" if loop == "around" else "a logit"
            for kind, count in kinds.items():
                recorded_count = was[loop][kind]
                figures = f"{count:g} {kind} {per}, recorded are {recorded_count:g}"
                if count > recorded_count * (1 + may_rise):
                    said.append(f"{variant}: {kernel}, {loop} has {figures}")
                elif count < recorded_count * (1 - may_rise):
                    said.append(
                        f"{variant}: {kernel}, {loop} has {figures}: that is better, record anew"
                    )
    return said


def read(record: Path) -> tuple[str, float, Recorded]:
    """The compiler's version, by what share counts may rise, and the counts."""
    first, *rows = map(json.loads, record.read_text(encoding="utf-8").splitlines())
    found: Recorded = {}
    for row in rows:
        variant, kernel, loop = (row.pop(name) for name in ("variant", "kernel", "loop"))
        found.setdefault(variant, {}).setdefault(kernel, {})[loop] = row
    return first["compiler"], first["may_rise"], found


def write(record: Path, compiler: str, found: Recorded) -> None:
    """Record the counts: the version and what may rise, then a line for each loop."""
    may_rise = read(record)[1] if record.exists() else MAY_RISE
    rows: list[dict[str, object]] = [{"compiler": compiler, "may_rise": may_rise}]
    rows += _rows(found)
    record.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _rows(found: Recorded) -> Iterator[dict[str, object]]:
    for variant, by_kernel in found.items():
        for kernel, counts in sorted(by_kernel.items()):
            for loop, kinds in counts.items():
                yield {"variant": variant, "kernel": kernel, "loop": loop, **kinds}

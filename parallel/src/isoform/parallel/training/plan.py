"""How much memory a step of training takes, item by item, before anything is run; and what fits.

A step has a few moments at which it may hold most: in the forward and in the backward of a block,
while attention or the MLP of a piece is computed; at the loss; when the optimizer steps. What lives
at such a moment is a list of :class:`Item`, each a line of arithmetic with its reason, which a
reader finds in :mod:`.model`, :mod:`.blocks`, :mod:`.attending`, :mod:`.recompute` and
:mod:`.offload`. The peak is that of the moment that holds most::

    from isoform.parallel.training.plan import Run, longest, peak
    from isoform.parallel.training.switches import EVERYTHING, Layout

    run = Run(CONFIGURATIONS["25B"], EVERYTHING.but(layout=Layout(sequence=64)), 2**19)
    print(peak(run).bytes, longest(run, Machine(memory=40e9)))

Counted are PyTorch's tensors, as ``torch.cuda.max_memory_allocated`` does. Not counted are CUDA's
context, NCCL's buffers, and what an allocator cannot use of the memory that it holds.

Peaks that are measured lie within 10 % (``test_training_plan.py``): on a processor for every
switch and every strategy over ranks, and of :mod:`isoform.parallel.benchmark.genome` on an H200,
where they are within 2 %. What ranks share of parameters, gradients and states, of tensors and
stages, is arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any, Literal, NamedTuple

from isoform.parallel.local import BLOCK_K, BLOCK_Q
from isoform.parallel.planner.memory import moments_of
from isoform.parallel.planner.plan import ITEMSIZE
from isoform.parallel.planner.plan import plan as plan_attention
from isoform.parallel.planner.work import Attended
from isoform.parallel.sharding import Sharding
from isoform.parallel.traffic import Sizes, group_size
from isoform.parallel.training import precision
from isoform.parallel.training.switches import BASELINE, EVERYTHING, Layout, Switches
from isoform.reference.contract import Unsupported
from isoform.reference.torch.genome_lm import CONFIGURATIONS, Configuration

__all__ = [
    "Compared",
    "Item",
    "Longest",
    "Machine",
    "Peak",
    "Run",
    "Scheme",
    "best",
    "compare",
    "layouts",
    "least",
    "longest",
    "moments",
    "of_length",
    "of_scheme",
    "peak",
    "schemes",
]

Kernels = Literal["own", "library", "reference"]
"""Whose attention it is on one rank: a GPU's by isoform or by PyTorch, or the reference's tiles."""

LIMIT_POSITIONS = 2**21
"""Positions at which angles of the rotary embedding are exact."""

LIMIT_ELEMENTS = 2**31 - 1
"""Numbers in a tensor: not all that PyTorch does on a GPU has been seen to count further."""

BLOCK = 64
"""Queries in a tile of the reference's attention."""

WORKSPACE = 32 * 2**20
"""What cuBLAS has on Hopper, by PyTorch's default; less elsewhere."""


class Item(NamedTuple):
    """Some memory.

    Attributes:
        name: Which part of the breakdown it belongs to.
        bytes: How much.
        why: What it is.
    """

    name: str
    bytes: int
    why: str


NAMES = (
    "parameters",
    "gradients",
    "optimizer states",
    "position table",
    "checkpoints",
    "hidden states",
    "attention",
    "exchange",
    "mask and scores",
    "MLP",
    "embedding, logits, loss",
    "tokens",
    "workspace",
)
"""The parts of a breakdown, in its order."""


@dataclass(frozen=True)
class Run:
    """A step of training that may be planned: of one sequence, on the rank that holds most.

    Attributes:
        configuration: The model's sizes.
        switches: The techniques.
        length: Tokens of the sequence, over all ranks that share it.
        dtype: In which it is computed. Optimizers of 16-bit parameters keep float32 copies.
        kernels: Whose attention; with a sequence over ranks, what each computes of a block.
    """

    configuration: Configuration
    switches: Switches
    length: int
    dtype: str = "bfloat16"
    kernels: Kernels = "library"

    def at(self, length: int) -> Run:
        """The same, of another length."""
        return replace(self, length=length)

    # --- sizes, in the letters of the arithmetic ---

    @cached_property
    def s(self) -> int:
        """Bytes of a number."""
        return ITEMSIZE[self.dtype]

    @property
    def w(self) -> int:
        """Bytes of a number in sums."""
        return max(self.s, 4)

    @cached_property
    def n(self) -> int:
        """Tokens of the rank that has most."""
        return ceil(self.length / self.switches.layout.sequence)

    @property
    def h(self) -> int:
        """Channels."""
        return self.configuration.hidden

    @property
    def f(self) -> int:
        """Channels within the MLP, of this rank."""
        return self.configuration.ffn // self.switches.layout.tensor

    @property
    def groups(self) -> int:
        """Groups of heads."""
        return self.switches.head_groups

    @property
    def heads(self) -> int:
        """Heads of the largest group, of this rank."""
        return ceil(self.configuration.heads / self.switches.layout.tensor / self.groups)

    @property
    def c(self) -> int:
        """Channels of those heads."""
        return self.heads * self.configuration.head_dim

    @property
    def x(self) -> int:
        """Bytes of hidden states, ``[n, hidden]``."""
        return self.n * self.h * self.s

    @property
    def u(self) -> int:
        """Bytes of the queries of a group, ``[n, c]``; of its keys, values and outputs as many."""
        return self.n * self.c * self.s

    @property
    def layers(self) -> int:
        """Blocks of the stage that has most."""
        return ceil(self.configuration.layers / self.switches.layout.pipeline)

    @property
    def sharers(self) -> int:
        """Ranks that have the same parameters."""
        return self.switches.layout.data * self.switches.layout.sequence

    @property
    def sharded(self) -> bool:
        """Whether parameters are shared out; one rank has nobody to share with."""
        kind = self.switches.optimizer
        return kind == "offloaded" or (kind == "sharded" and self.sharers > 1)

    @property
    def recomputed(self) -> bool:
        """Whether blocks are computed again."""
        return self.switches.checkpointing != "none"

    # --- numbers of parameters ---

    @property
    def attention_weights(self) -> int:
        """Parameters of a block's attention: rows of the output's bias are whole on every rank."""
        h, t = self.h, self.switches.layout.tensor
        return (4 * h * h + 3 * h) // t + h + 2 * h

    @property
    def mlp_weights(self) -> int:
        """Parameters of a block's MLP, and of the norm before it."""
        return 2 * self.h * self.f + self.f + self.h + 2 * self.h

    @property
    def block_weights(self) -> int:
        """Parameters of a block."""
        return self.attention_weights + self.mlp_weights

    @property
    def outer_weights(self) -> int:
        """Embedding, head and last norm. Of several stages none has both, which is little."""
        c = self.configuration
        return c.vocabulary * self.h * (1 if c.tied else 2) + 2 * self.h

    @property
    def weights(self) -> int:
        """Parameters of this rank, but for the position table."""
        return self.layers * self.block_weights + self.outer_weights

    @property
    def table(self) -> int:
        """Numbers of this rank's rows of a learned table."""
        c, s = self.configuration, self.switches
        if c.positions != "learned":
            return 0
        shared = s.layout.sequence if s.position_table == "partitioned" else 1
        return ceil(c.max_length / shared) * self.h

    @property
    def states(self) -> int:
        """Bytes of optimizer states by parameter: two moments, and of 16 bits a wider copy."""
        return 2 * self.w + (self.w if self.s < self.w else 0)

    @cached_property
    def exchange(self) -> tuple[str, int | None]:
        """The strategy over the ranks of a sequence, and its ranks near each other."""
        switches = self.switches
        if switches.strategy != "auto":
            return switches.strategy, switches.near
        sharding = Sharding(switches.sharding, self.length, switches.layout.sequence)
        found = plan_attention(
            [sharding], self.sizes, dtype=self.dtype, attended=Attended(causal=True)
        ).best
        return found.strategy, found.near

    @property
    def sizes(self) -> Sizes:
        """Those of attention, of a group of heads."""
        return Sizes(1, self.heads, self.heads, self.configuration.head_dim, self.s)


@dataclass(frozen=True)
class Peak:
    """The most that a rank holds.

    Attributes:
        moment: When.
        items: What it holds then.
        host: What it keeps in the host's memory.
    """

    moment: str
    items: tuple[Item, ...]
    host: tuple[Item, ...]

    @property
    def bytes(self) -> int:
        """On the device."""
        return sum(item.bytes for item in self.items)

    @property
    def host_bytes(self) -> int:
        """On the host."""
        return sum(item.bytes for item in self.host)

    def parts(self) -> dict[str, int]:
        """Bytes on the device by the names of :data:`NAMES`, where there are some."""
        return _by_name(self.items)

    def host_parts(self) -> dict[str, int]:
        """Bytes on the host likewise."""
        return _by_name(self.host)


def _by_name(items: Iterable[Item]) -> dict[str, int]:
    found = dict.fromkeys(NAMES, 0)
    for item in items:
        found[item.name] += item.bytes
    return {name: size for name, size in found.items() if size}


def peak(run: Run) -> Peak:
    """The moment that holds most, and what.

    Args:
        run: The step.

    Returns:
        When, and every item of device and host.

    Raises:
        ValueError: What is shared over ranks cannot be cut into so many parts.
        Unsupported: The techniques do not go together.
    """
    run.switches.check(run.configuration)
    found = moments(run)
    most = max(found, key=lambda name: sum(item.bytes for item in found[name]))
    return Peak(most, tuple(item for item in found[most] if item.bytes), tuple(host(run)))


def moments(run: Run) -> dict[str, list[Item]]:
    """Everything that a rank holds on the device, at each moment that may be that of the peak.

    Args:
        run: The step.

    Returns:
        Items by the name of the moment.
    """
    always = _always(run)
    found = {}
    for name, more in _forward(run).items():
        found[f"forward, {name}"] = [*always, *more]
    for name, more in _loss(run).items():
        found[f"loss, {name}"] = [*always, *more]
    every = run.switches.every
    first = {*range(min(2 * every, run.layers)), run.layers - 1}
    for block in sorted(first):
        for name, more in _backward(run, block).items():
            found[f"backward of block {block}, {name}"] = [*always, *more]
    found["optimizer"] = [*always, *_optimizer(run)]
    return found


# --- what lives through all of a step ---


def _always(run: Run) -> list[Item]:
    switches, s, w, weights = run.switches, run.s, run.w, run.weights
    found = [
        Item("tokens", 3 * 8 * run.n, "tokens, their labels and their positions, int64"),
        Item("position table", run.table * s, "rows of a learned table"),
        Item("position table", run.table * run.states, "their optimizer states"),
    ]
    if switches.attention == "stored":
        found.append(Item("mask and scores", run.n**2, "who may not attend to whom, bool"))
    if run.kernels != "reference":
        found.append(Item("workspace", WORKSPACE, "of matrix products"))
    if not run.sharded:
        return [
            *found,
            Item("parameters", weights * s, "every weight of the rank's blocks"),
            Item("optimizer states", weights * run.states, "two moments, and a wide copy"),
        ]
    if switches.optimizer == "sharded":
        own = ceil(weights / run.sharers)
        found += [
            Item("parameters", own * w, "this rank's share of them"),
            Item("optimizer states", own * 2 * w, "two moments of them"),
        ]
    return [
        *found,
        Item("parameters", run.outer_weights * s, "embedding, head and norm, gathered"),
        Item("parameters", 2 * run.block_weights * s, "a block gathered, and the next"),
        Item("parameters", run.block_weights * s, "the buffer in which one arrives"),
    ]


def _optimizer(run: Run) -> list[Item]:
    """Gradients are all there, and nothing of a sequence is."""
    found = [*_gradients_of(run, -1), *_table_gradient(run)]
    numbers = run.weights + run.table
    if run.sharded:
        if run.switches.optimizer == "sharded":
            own = ceil(run.weights / run.sharers)
            found.append(Item("optimizer states", own * run.w, "roots of the second moments"))
        return found
    if run.s < run.w:
        lifted = min(numbers, precision.CHUNK)
        found.append(Item("gradients", lifted * run.w, "those that are lifted to float32 at once"))
    if run.kernels == "reference":
        largest = max(run.h * run.f, run.h * run.h, run.configuration.vocabulary * run.h, run.table)
        found.append(
            Item("optimizer states", 2 * largest * run.w, "roots, and what divides a step")
        )
    return found


def _gradients_of(run: Run, block: int) -> list[Item]:
    """Those of the blocks after ``block``, of head and last norm, and for −1 of the embedding."""
    c, s = run.configuration, run.s
    after = (run.layers - 1 - block) * run.block_weights
    outer = run.outer_weights - (block >= 0) * c.vocabulary * run.h * (not c.tied)
    if not run.sharded:
        return [
            Item("gradients", (after + outer) * s, "of the blocks after this one, and the head")
        ]
    found = [
        Item(
            "gradients", run.outer_weights * (s + run.w), "of head and norm, until they are summed"
        ),
    ]
    if block >= 0:
        each = run.block_weights * (s + run.w)
        found.append(Item("gradients", each, "of a block, and its float32 copy to be summed"))
    if run.switches.optimizer == "sharded":
        own = ceil(after / run.sharers)
        found.append(
            Item("gradients", own * run.w, "this rank's share of the blocks after this one")
        )
    return found


def _table_gradient(run: Run) -> list[Item]:
    return [Item("position table", run.table * run.s, "its gradient")]


def host(run: Run) -> list[Item]:
    """What is kept in the host's memory."""
    found = []
    if run.switches.checkpointing == "offloaded":
        each, every = _kept(run), run.switches.every
        groups = ceil(run.layers / every)
        kept = (groups - 1) * (each if every == 1 else 1)
        found.append(Item("checkpoints", kept * run.x, "of all blocks, or groups, but the last"))
        within = max(min(every, run.layers) - 2, 0) * each
        found.append(Item("checkpoints", within * run.x, "of the blocks within a group"))
    if run.switches.optimizer == "offloaded":
        own = ceil(run.weights / run.sharers)
        found += [
            Item("parameters", own * run.w, "this rank's share"),
            Item("gradients", own * run.w, "of that"),
            Item("optimizer states", own * 2 * run.w, "two moments of that"),
        ]
    return [item for item in found if item.bytes]


# --- what runs past and what is kept, in units of hidden states ---


def _kept(run: Run) -> int:
    """Hidden states that a block that is computed again keeps: its input, and that of its MLP."""
    return 1 if run.configuration.parallel_residual else 2


def _checkpoints(run: Run, block: int, own: int) -> list[Item]:
    """What is kept on the device while a block is differentiated.

    Args:
        run: The step.
        block: Which block.
        own: Hidden states that it has kept so far, its input among them.
    """
    each, before = _kept(run), block // run.switches.every
    within = block % run.switches.every
    found = [Item("checkpoints", own * run.x, "what this block keeps")]
    if run.switches.checkpointing != "offloaded":
        count = before * (each if run.switches.every == 1 else 1)
        found.append(Item("checkpoints", count * run.x, "what is kept for those before it"))
        if within:
            count = within * each
            found.append(Item("checkpoints", count * run.x, "of those before it in its group"))
        return found
    fetched = bool(before or own > 1) + (within > 1)
    found.append(Item("checkpoints", fetched * run.x, "one on its way from the host"))
    if within:
        found.append(Item("checkpoints", each * run.x, "of the first block of its group"))
    return found


def _kept_forward(run: Run, own: int) -> list[Item]:
    """What is kept on the device at the end of the forward; ``own``: by the last block so far."""
    each, every = _kept(run), run.switches.every
    groups = ceil(run.layers / every)
    found = [Item("checkpoints", own * run.x, "what the last block keeps")]
    if run.switches.checkpointing == "offloaded":
        waiting = groups > 1 or own > 1
        found.append(Item("checkpoints", waiting * run.x, "one on its way to the host"))
    else:
        count = (groups - 1) * (each if every == 1 else 1)
        found.append(Item("checkpoints", count * run.x, "what is kept for those before it"))
    if every > 1:
        found.append(Item("checkpoints", run.x, "the input of its group of blocks"))
    return found


def _of_group(run: Run, block: int) -> list[Item]:
    """What a group of blocks has besides, while one of them is differentiated."""
    every = run.switches.every
    within, blocks = block % every, min(every, run.layers - block // every * every)
    if blocks == 1:
        return []
    parallel = run.configuration.parallel_residual
    count = 1 if parallel and within == blocks - 1 else 2  # of its last block the gradient is that
    return [Item("hidden states", count * run.x, "what its group gives, and the gradient of that")]


# --- the forward ---


def _forward(run: Run) -> Mapping[str, list[Item]]:
    """In the last block, when most is kept."""
    last = run.layers - 1
    if not run.recomputed:
        kept = _saved_by_blocks(run, last)
        x = Item("hidden states", 2 * run.x, "of the last block, before and after attention")
        return {
            name: [*kept, x, *more] for name, more in _attention_forward(run, saved=True).items()
        }
    y = Item("hidden states", run.x, "the sum to which pieces are added")
    found = {}
    for name, more in _attention_forward(run, saved=False).items():
        found[name] = [*_kept_forward(run, 1), y, *more]
    for name, more in _mlp_forward(run).items():
        found[name] = [*_kept_forward(run, _kept(run)), y, *more]
    return found


def _attention_forward(run: Run, *, saved: bool) -> Mapping[str, list[Item]]:
    """By what is done: what attention has, of one group of heads."""
    u, grouped = run.u, run.groups > 1
    y = Item("attention", run.x, "LayerNorm of its input")
    qkv = Item("attention", 3 * u, "queries, keys and values of a group of heads")
    found = {"projections": [y, qkv]}
    if grouped:
        joined = Item("attention", 3 * run.h * run.c * run.s, "their weights, joined")
        found["projections"].append(joined)
    if run.configuration.positions == "rotary":
        turned = Item("attention", 2 * u, "queries and keys, turned")
        found["rotation"] = [qkv, turned, *([y] if saved else [])]
    found["attention"] = [*_operands(run), *_attending(run), *([y] if saved else [])]
    found["its output"] = [
        Item("attention", u, "its output"),
        Item("attention", run.x, "what that adds to hidden states"),
        *([y, *_operands(run)] if saved else []),
    ]
    return found


def _operands(run: Run, *, saved: bool = False) -> list[Item]:
    """Queries, keys and values as attention has them, or as its backward has them if ``saved``."""
    u, rotary = run.u, run.configuration.positions == "rotary"
    # of a joined projection values are a part, which keeps the whole alive
    count = 5 if rotary and run.groups > 1 else 3
    found = [Item("attention", count * u, "queries, keys and values, as attention has them")]
    if (wide := _padded(run)) > u:
        copies = Item("attention", 3 * wide, "copies of which heads have a multiple of 8 channels")
        return [copies] if saved else [*found, copies]
    return found


def _padded(run: Run) -> int:
    """Bytes of queries of which heads have as many channels as kernels want."""
    D = run.configuration.head_dim
    if run.kernels == "reference" or run.switches.attention == "stored":
        return run.u
    return run.u // D * (-(-D // 8) * 8)


def _lse(run: Run) -> int:
    return run.n * run.heads * 4


def _attending(run: Run) -> list[Item]:
    """Attention's results, and what it needs in its forward."""
    out = Item("attention", _padded(run), "its output")
    if run.switches.attention == "stored":
        scores = run.heads * run.n**2 * run.s
        return [out, Item("mask and scores", 2 * scores, "scores, and their softmax")]
    if run.switches.layout.sequence > 1:
        return _exchanged(run, 0)
    if run.kernels == "reference":
        return [out, *_tiles(run, 3), *_lifted(run, 1)]
    lse = Item("attention", (4 if run.kernels == "library" else 1) * _lse(run), "log-sum-exp")
    return [out, lse]


def _exchanged(run: Run, way: Literal[0, 1]) -> list[Item]:
    """What a strategy over ranks has besides its operands, in the forward (0) or backward (1)."""
    strategy, near = run.exchange
    sharding = Sharding(run.switches.sharding, run.length, run.switches.layout.sequence)
    found = moments_of(strategy, sharding, run.sizes, near=near)[way]
    most = max(int(held.max()) for held in found.values())
    before = (3 if way == 0 else 5) * run.u + (way == 1) * _lse(run)
    if run.kernels != "reference":
        return [Item("exchange", most - before, f"of {strategy}: what others send, and sums")]
    # the planner's tiles are those of NumPy: of PyTorch's reference they have all keys of a block
    group = group_size(strategy, sharding.ranks, near)
    heads, queries = run.heads, run.n
    keys = run.length if strategy == "all_gather" else run.n
    if strategy in ("ulysses", "hybrid"):
        heads, queries, keys = ceil(heads / group), run.n * group, run.n * group
    rows, columns = min(BLOCK_Q, queries), min(BLOCK_K, keys)
    logits = (4, 6)[way]
    blocks = (
        heads * run.w * run.configuration.head_dim * ((1, 3)[way] * rows + (3, 5)[way] * columns)
    )
    of_numpy = blocks + logits * heads * run.w * rows * columns + rows * columns
    return [
        Item("exchange", most - before - of_numpy, f"of {strategy}: what others send, and sums"),
        Item("exchange", (3, 5)[way] * heads * run.w * rows * keys, "tiles of logits"),
        Item("exchange", 2 * rows * keys, "the mask of a tile, and where nothing is seen"),
    ]


def _tiles(run: Run, logits: int) -> list[Item]:
    """Tiles of logits that the reference works on."""
    pairs = min(BLOCK, run.n) * run.n
    return [
        Item("attention", logits * run.heads * pairs * run.w, "tiles of logits"),
        Item("attention", 2 * pairs, "the mask of a tile, and where nothing is seen"),
    ]


def _lifted(run: Run, more: int) -> list[Item]:
    """What the reference lifts to float32 of 16-bit operands."""
    if run.s == run.w:
        return [Item("attention", more * run.u, "the output, in tiles and whole")]
    wide = run.u // run.s * run.w
    return [
        Item("attention", 2 * wide, "keys and values in float32"),
        Item("attention", more * wide, "the output in float32"),
    ]


def _mlp_tokens(run: Run) -> int:
    return min(run.n, run.switches.tile) if run.switches.mlp == "tiled" else run.n


def _mlp_forward(run: Run) -> Mapping[str, list[Item]]:
    t, h, f, s = _mlp_tokens(run), run.h, run.f, run.s
    y = Item("MLP", t * h * s, "LayerNorm of a tile")
    return {
        "MLP, within": [y, Item("MLP", 2 * t * f * s, "wide channels before and after gelu")],
        "MLP, its output": [
            y,
            Item("MLP", t * f * s, "wide channels"),
            Item("MLP", t * h * s, "what they add to hidden states"),
        ],
    }


# --- the loss ---


def _loss(run: Run) -> Mapping[str, list[Item]]:
    """Of all tokens, or of a tile, which is differentiated at once."""
    c, s, w = run.configuration, run.s, run.w
    tiled = run.switches.loss == "tiled"
    t = min(run.n, run.switches.tile) if tiled else run.n
    if run.recomputed:
        kept = _kept_forward(run, _kept(run))
    else:
        kept = _saved_by_blocks(run, run.layers)
    name = "embedding, logits, loss"
    found = [
        *kept,
        Item("hidden states", run.x, "what the last block gives"),
        Item(name, t * run.h * s, "their LayerNorm"),
        Item("gradients", c.vocabulary * run.h * s, "of the head"),
    ]
    if tiled:
        found += [
            Item("hidden states", run.x, "their gradient"),
            Item("gradients", c.vocabulary * run.h * w, "of the head, summed over tiles"),
        ]
    numbers = t * c.vocabulary
    return {
        "logits": [*found, Item(name, numbers * (2 * w), "logits, and their log-softmax")],
        "its gradient": [
            *found,
            Item(name, numbers * 3 * w, "log-softmax, its gradient, and that of logits"),
        ],
        "gradient of hidden states": [
            *found,
            Item(name, numbers * (w + s) if s < w else numbers * w, "gradients of logits"),
            Item(name, t * run.h * s, "gradient of the LayerNorm"),
        ],
    }


# --- the backward ---


def _backward(run: Run, block: int) -> Mapping[str, list[Item]]:
    """Of one block."""
    gradients = _gradients_of(run, block)
    if not run.recomputed:
        return _backward_of_saved(run, block, gradients)
    parallel = run.configuration.parallel_residual
    tiles = ceil(run.n / _mlp_tokens(run)) if run.n else 1
    heads, both = run.groups, run.groups + tiles
    found = {}
    for name, more in _attention_backward(run).items():
        pieces = both if parallel else heads
        flows = Item("hidden states", (1 + (pieces > 1)) * run.x, "gradients: after, and before")
        sums = _sums(run, run.attention_weights, run.groups > 1, pieces)
        kept = [*_checkpoints(run, block, 1), *_of_group(run, block)]
        found[name] = [*gradients, *kept, flows, *sums, *more]
    for name, more in _mlp_backward(run).items():
        pieces = both if parallel else tiles
        flows = Item("hidden states", (1 + (pieces > 1)) * run.x, "gradients: after, and before")
        before = run.attention_weights if parallel else 0
        sums = [
            *_sums(run, run.mlp_weights, tiles > 1, pieces),
            Item("gradients", before * run.w, "of the block's attention, in float32"),
        ]
        kept = [*_checkpoints(run, block, _kept(run)), *_of_group(run, block)]
        found[name] = [*gradients, *kept, flows, *sums, *more]
    own = run.block_weights if parallel else max(run.attention_weights, run.mlp_weights)
    found["rounding"] = [
        *gradients,
        *_checkpoints(run, block, _kept(run)),
        *_of_group(run, block),
        Item("hidden states", 3 * run.x, "gradients: after, before, and their sum"),
        Item("gradients", own * (run.w + run.s), "of the block, in float32 and rounded"),
    ]
    return found


def _sums(run: Run, weights: int, again: bool, pieces: int) -> list[Item]:
    """Gradients of a branch while a piece is differentiated; ``again``: not its first."""
    found = [Item("gradients", weights * run.s, "of a piece")]
    if pieces > 1 and again:
        found.append(Item("gradients", weights * run.w, "of the pieces so far, in float32"))
    return found


def _attention_backward(run: Run) -> Mapping[str, list[Item]]:
    """Of a group of heads, computed again, and differentiated."""
    u, x, grouped = run.u, run.x, run.groups > 1
    y = Item("attention", x, "LayerNorm of its input")
    again = [y, *_operands(run, saved=True)]
    if grouped:
        again.append(Item("attention", 3 * run.h * run.c * run.s, "weights, joined"))
    if run.switches.layout.tensor > 1:
        again.append(Item("attention", x, "what the output adds, and it is not used"))
    return {
        "attention": [*again, *_attending(run)],
        "attention's gradient": [*again, *_differentiating(run, saved=False)],
        "projections' gradient": [
            y,
            Item("attention", 3 * u, "gradients of queries, keys and values"),
            Item("attention", 3 * u, "the same, joined")
            if grouped
            else Item("attention", 2 * x, "gradients of the LayerNorm, of two of them"),
        ],
        "LayerNorm's gradient": [y, Item("attention", 2 * x, "gradients after it and before it")],
    }


def _differentiating(run: Run, *, saved: bool) -> list[Item]:
    """What attention's backward has besides its operands, and besides its results if ``saved``."""
    u, wide = run.u, _padded(run)
    if run.switches.attention == "stored":
        scores = run.heads * run.n**2 * run.s
        results = [Item("attention", u, "its output"), Item("mask and scores", scores, "softmax")]
        # a GPU's softmax begins its backward with the product of the two
        more = scores if run.kernels != "reference" else 0
        return [
            *([] if saved else results),
            Item("attention", 2 * u, "gradients of the output, and of values"),
            Item("mask and scores", 2 * scores, "gradients of the softmax, and of scores"),
            Item("mask and scores", more, "softmax times its gradient"),
        ]
    results = [Item("attention", wide, "its output"), Item("attention", _lse(run), "log-sum-exp")]
    found = [*([] if saved else results), Item("attention", wide, "gradient of the output")]
    if run.switches.layout.sequence > 1:
        return [*found, *_exchanged(run, 1)]
    found.append(Item("attention", 3 * wide, "gradients of queries, keys and values"))
    if run.kernels == "reference":
        return [*found, *_tiles(run, 6), *_lifted(run, 3)]
    found.append(Item("attention", _lse(run), "what rows of the output times its gradient sum to"))
    if run.kernels == "library":
        found.append(Item("attention", u // run.s * 4, "gradients of queries, summed in float32"))
    return found


def _mlp_backward(run: Run) -> Mapping[str, list[Item]]:
    t, h, f, s = _mlp_tokens(run), run.h, run.f, run.s
    found = [
        Item("MLP", t * h * s, "LayerNorm of a tile"),
        Item("MLP", 3 * t * f * s, "wide channels, their gradients before and after gelu"),
    ]
    if run.switches.layout.tensor > 1:
        found.append(Item("MLP", t * h * s, "what they add, and it is not used"))
    return {"MLP": found}


# --- where nothing is computed again ---


def _saved_by_blocks(run: Run, blocks: int) -> list[Item]:
    """What autograd keeps of some blocks."""
    attention = [Item(i.name, blocks * i.bytes, i.why) for i in _saved_by_attention(run)]
    mlp = [Item(i.name, blocks * i.bytes, i.why) for i in _saved_by_mlp(run)]
    return [*attention, *mlp]


def _saved_by_attention(run: Run) -> list[Item]:
    """What autograd keeps of a block's attention."""
    u, switches = run.u, run.switches
    found = [
        Item("checkpoints", run.x, "the input of a block"),
        Item("checkpoints", run.x, "LayerNorm of it"),
    ]
    if switches.attention == "stored":
        scores = run.heads * run.n**2 * run.s
        return [
            *found,
            Item("checkpoints", 4 * u, "queries, keys, values and output"),
            Item("mask and scores", scores, "softmax of scores"),
        ]
    if run.kernels == "reference" and switches.layout.sequence == 1:
        wide = u // run.s * run.w
        return [*found, Item("checkpoints", 3 * wide + u, "queries, keys, values; output")]
    wide = _padded(run)
    return [
        *found,
        Item("checkpoints", 4 * wide, "queries, keys, values and output"),
        Item("checkpoints", u if wide > u else 0, "output without what heads are padded with"),
        Item("checkpoints", _lse(run), "log-sum-exp"),
    ]


def _saved_by_mlp(run: Run) -> list[Item]:
    """What autograd keeps of a block's MLP."""
    found = []
    if not run.configuration.parallel_residual:
        found.append(Item("checkpoints", run.x, "the input of an MLP"))
    if run.switches.mlp == "whole":
        found += [
            Item("checkpoints", run.x, "LayerNorm of it"),
            Item("checkpoints", 2 * run.n * run.f * run.s, "wide channels before and after gelu"),
        ]
    return found


def _backward_of_saved(run: Run, block: int, gradients: list[Item]) -> Mapping[str, list[Item]]:
    """Of one block of which autograd has kept what it wants."""
    kept, own = _saved_by_blocks(run, block), _saved_by_attention(run)
    dy = Item("hidden states", run.x, "gradient of what the block gives")
    if run.switches.mlp == "whole":
        wide = Item("MLP", run.n * run.f * run.s, "gradients of wide channels, one kept is gone")
        mlp = [*own, *_saved_by_mlp(run), dy, wide]
    else:
        tiles = ceil(run.n / _mlp_tokens(run))
        sums = _sums(run, run.mlp_weights, tiles > 1, tiles)
        dx = Item("hidden states", run.x, "gradient of its input")
        mlp = [*own, *_saved_by_mlp(run), dy, dx, *sums, *_mlp_backward(run)["MLP"]]
    dx = Item("hidden states", run.x, "gradient of its input, of the MLP's branch")
    more = _differentiating(run, saved=True)
    done = Item("gradients", run.mlp_weights * run.s, "of this block's MLP")
    return {
        "MLP": [*gradients, *kept, *mlp],
        "attention's gradient": [*gradients, done, *kept, *own, dy, dx, *more],
    }


# --- what fits ---


@dataclass(frozen=True)
class Machine:
    """What a rank may have.

    Attributes:
        memory: Bytes on the device.
        host: Bytes on the host, for this rank.
    """

    memory: int
    host: int

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 0:
                raise ValueError(f"{name} must not be negative, got {size}")


@dataclass(frozen=True)
class Longest:
    """The longest sequence that fits, or one of a length that was asked for.

    Attributes:
        run: Of that length, which is :data:`GRAIN` tokens where not even those fit.
        fits: Whether it does.
        limited_by: What a longer one, or one that does not fit, has not enough of.
        peak: What is held.
    """

    run: Run
    fits: bool
    limited_by: str
    peak: Peak


GRAIN = 1024
"""Lengths are multiples of this, and of twice the ranks that share a sequence."""


def longest(run: Run, machine: Machine) -> Longest:
    """The longest sequence whose step fits, by bisection.

    Learned positions get a table with a row for each token, however many they are.

    Args:
        run: The step; its length does not matter.
        machine: What a rank has.

    Returns:
        The longest, or where nothing fits the shortest that was tried.

    Raises:
        ValueError: What is shared over ranks cannot be cut into so many parts.
        Unsupported: The techniques do not go together.
    """
    run.switches.check(run.configuration)
    ranks = run.switches.layout.sequence
    grain = -(-GRAIN // (2 * ranks)) * 2 * ranks
    run = _with_strategy(_sized(run, 64 * grain))
    good, bad, reason = 0, 1, of_length(run, grain, machine).limited_by
    while not reason:
        good, bad = bad, 2 * bad
        reason = of_length(run, bad * grain, machine).limited_by
    while bad - good > 1:
        middle = (good + bad) // 2
        found = of_length(run, middle * grain, machine).limited_by
        good, bad, reason = (good, middle, found) if found else (middle, bad, reason)
    return replace(of_length(run, max(good, 1) * grain, machine), fits=good > 0, limited_by=reason)


def of_length(run: Run, length: int, machine: Machine) -> Longest:
    """A step of some length, and what it has not enough of.

    Args:
        run: The step.
        length: Of its sequence, in tokens.
        machine: What a rank has.

    Returns:
        Whether it fits, and what is held.

    Raises:
        ValueError: What is shared over ranks cannot be cut into so many parts.
        Unsupported: The techniques do not go together.
    """
    one = _sized(run, length)
    found = peak(one)
    why_not = ""
    if one.configuration.positions == "rotary" and length > LIMIT_POSITIONS:
        why_not = "2²¹ positions"
    elif one.n * one.h > LIMIT_ELEMENTS:
        why_not = "2³¹ numbers"
    elif found.bytes > machine.memory:
        why_not = "memory"
    elif found.host_bytes > machine.host:
        why_not = "host memory"
    return Longest(one, not why_not, why_not, found)


def _sized(run: Run, length: int) -> Run:
    """Of another length, with a table for it."""
    c = run.configuration
    if c.positions == "learned":
        c = replace(c, max_length=max(length, 1))
    return replace(run, configuration=c, length=length)


def _with_strategy(run: Run) -> Run:
    """With the strategy that ``"auto"`` takes, which does not depend on the length."""
    if run.switches.layout.sequence == 1:
        return run
    strategy, near = run.exchange
    return replace(run, switches=run.switches.but(strategy=strategy, near=near))


def layouts(run: Run, ranks: int) -> list[Layout]:
    """Every way to share a sequence, tensors and blocks over all ranks, that the switches allow.

    Attention that is stored has no sequence over ranks; then ranks share tensors and blocks alone.

    Args:
        run: The step; its own layout does not matter.
        ranks: How many.

    Returns:
        Those that :meth:`~isoform.parallel.training.switches.Switches.check` lets through.
    """
    found = []
    for tensor in _divisors(ranks):
        for pipeline in _divisors(ranks // tensor):
            layout = Layout(tensor=tensor, pipeline=pipeline, sequence=ranks // tensor // pipeline)
            try:
                laid_out(run.switches, layout).check(run.configuration)
            except (ValueError, Unsupported):
                continue  # one of many
            found.append(layout)
    return found


def laid_out(switches: Switches, layout: Layout) -> Switches:
    """With a layout; ranks that share tensors have a group of heads each, and no groups within."""
    return switches.but(layout=layout, head_groups=1 if layout.tensor > 1 else switches.head_groups)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def best(run: Run, among: Iterable[Layout], machine: Machine) -> Longest | None:
    """The longest of all ``among``; of equals that with fewest shared tensors and stages.

    Args:
        run: The step; its length and its layout do not matter.
        among: Layouts.
        machine: What a rank has.

    Returns:
        The longest; None where there are no layouts.
    """
    tried = [
        longest(replace(run, switches=laid_out(run.switches, layout)), machine)
        for layout in _plain_first(among)
    ]
    return max(tried, key=lambda one: one.fits * one.run.length, default=None)


def least(run: Run, length: int, among: Iterable[Layout], machine: Machine) -> Longest | None:
    """A step of some length by the layout that needs least of the device, if any fits.

    Args:
        run: The step; its layout does not matter.
        length: Of its sequence, in tokens.
        among: Layouts.
        machine: What a rank has.

    Returns:
        The step; None where there are no layouts.
    """
    tried = [
        of_length(replace(run, switches=laid_out(run.switches, layout)), length, machine)
        for layout in _plain_first(among)
    ]
    return min(tried, key=lambda one: (not one.fits, one.peak.bytes), default=None)


def _plain_first(among: Iterable[Layout]) -> list[Layout]:
    return sorted(among, key=lambda one: one.tensor * one.pipeline)


@dataclass(frozen=True)
class Scheme:
    """Switches by a name.

    Attributes:
        switches: The techniques; layouts are the plan's to choose.
        alone: No sequence is over several ranks.
    """

    switches: Switches
    alone: bool = False


def schemes(
    configuration: Configuration, *, head_groups: int = 4, tile: int = 16384, every: int = 1
) -> dict[str, Scheme]:
    """The older scheme, every technique, and all of them but one.

    Args:
        configuration: The model.
        head_groups, tile, every: Of what is switched on.

    Returns:
        By name, the older scheme and everything first.
    """
    new = EVERYTHING.but(head_groups=min(head_groups, configuration.heads), tile=tile, every=every)
    found = {
        "baseline": Scheme(BASELINE, alone=True),
        "everything": Scheme(new),
        "… on one rank each": Scheme(new, alone=True),
        "… with scores stored": Scheme(new.but(attention="stored"), alone=True),
        "… with whole logits": Scheme(new.but(loss="whole")),
        "… with a whole MLP": Scheme(new.but(mlp="whole")),
        "… with all heads at once": Scheme(new.but(head_groups=1)),
        "… without offload": Scheme(new.but(checkpointing="blocks")),
        "… without checkpoints": Scheme(new.but(checkpointing="none", head_groups=1, every=1)),
        "… with states on all ranks": Scheme(new.but(optimizer="replicated")),
        "… with states on the host": Scheme(new.but(optimizer="offloaded")),
    }
    if configuration.positions == "learned":
        found["… with a whole table"] = Scheme(new.but(position_table="whole"))
    return found


def of_scheme(
    scheme: Scheme,
    run: Run,
    ranks: int,
    machine: Machine,
    *,
    length: int | None = None,
    among: Iterable[Layout] | None = None,
) -> Longest | None:
    """The longest of a scheme over ranks, by the layout that is best of those that it may have.

    Args:
        scheme: Which.
        run: Model and dtype.
        ranks: How many.
        machine: What each has.
        length: Not the longest, but this one.
        among: Layouts; all by default.

    Returns:
        The longest, or the step of that length; None where it may have none of the layouts.
    """
    run = replace(run, switches=scheme.switches)
    allowed = layouts(run, ranks)
    found = allowed if among is None else [one for one in among if one in allowed]
    found = [one for one in found if not (scheme.alone and one.sequence > 1)]
    if length is None:
        return best(run, found, machine)
    return least(run, length, found, machine)


# --- beside what was measured ---


@dataclass(frozen=True)
class Compared:
    """A step that was measured, and its plan.

    Attributes:
        what: Model, scheme and length.
        measured: Bytes on the device.
        planned: What the plan says.
        measured_host: Bytes on the host.
    """

    what: str
    measured: int
    planned: Peak
    measured_host: int

    @property
    def error(self) -> float:
        """How far the plan is off, of what was measured; of device and host the farther."""
        off = [self.planned.bytes / self.measured - 1]
        if self.measured_host or self.planned.host_bytes:
            off.append(self.planned.host_bytes / max(self.measured_host, 1) - 1)
        return max(off, key=abs)


def compare(lines: Iterable[Mapping[str, Any]]) -> list[Compared]:
    """Every step in a record of :mod:`isoform.parallel.benchmark.genome` beside its plan.

    Args:
        lines: Of the record, in order; those that are no steps are passed over. Each step is one of
            the model and the scheme that it names, as the record's first line describes schemes.

    Returns:
        A comparison for each step, in order.

    Raises:
        ValueError: A step comes before the line that describes schemes, or names a model or a
            technique that there is not.
    """
    found: list[Compared] = []
    here: Mapping[str, Any] = {}
    for line in lines:
        if line["kind"] == "surroundings":
            here = line
        if "peak_bytes" not in line or line["kind"] == "gain":
            continue
        if line["scheme"] not in here.get("schemes", {}):
            raise ValueError(f"no line before says what the scheme {line['scheme']!r} is")
        run = _measured(line, here)
        what = f"{line['model']} {line['scheme']}"
        if "without" in line:
            what += f" without {line['without']}"
        what += f", {line['length']} tokens" + (", a window" * bool(line.get("window")))
        found.append(Compared(what, line["peak_bytes"], peak(run), line["host_bytes"]))
    return found


def _measured(line: Mapping[str, Any], here: Mapping[str, Any]) -> Run:
    """The step that a line of a record is of."""
    from isoform.parallel.benchmark.genome import WITHOUT

    if line["model"] not in CONFIGURATIONS:
        raise ValueError(f"no model is called {line['model']!r}")
    given = dict(here["schemes"][line["scheme"]])
    switches = Switches(**given | {"layout": Layout(**given["layout"])})
    without = line.get("without", "nothing")
    if without != "nothing":
        if without not in WITHOUT:
            raise ValueError(f"no technique is called {without!r}")
        switches = switches.but(**WITHOUT[without])
    kernels: Kernels = "library"
    if "nvrtc" not in here["versions"]:  # no GPU
        kernels = "reference"
    elif line.get("window") or line.get("kernel"):
        kernels = "own"  # windows are known to our kernels alone
    return Run(CONFIGURATIONS[line["model"]], switches, line["length"], here["dtype"], kernels)

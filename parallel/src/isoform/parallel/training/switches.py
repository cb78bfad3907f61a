"""What there is to switch on in training over long sequences, one field for each technique.

:data:`BASELINE` is the older scheme: one rank holds every token, the mask and the scores of
attention are stored, and so are the whole position table and all logits. :data:`EVERYTHING` is all
of it the new way. Between them every combination is legal that :meth:`Switches.check` lets through,
and the numbers are the same, so that what a technique is good for is a ratio of two runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_type_hints

from isoform.parallel.attention import Strategy
from isoform.parallel.sharding import Kind
from isoform.reference.contract import Unsupported
from isoform.reference.torch.genome_lm import Configuration

__all__ = ["BASELINE", "EVERYTHING", "Layout", "Switches"]


@dataclass(frozen=True)
class Layout:
    """How many ranks share what; one rank is at one place of a mesh of these axes, in this order.

    Attributes:
        pipeline: Stages, each with some of the blocks.
        data: Copies that see other sequences; they share optimizer states where those are sharded.
        sequence: Ranks that share each sequence.
        tensor: Ranks that share each head and each channel of an MLP.
    """

    pipeline: int = 1
    data: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, degree in vars(self).items():
            if isinstance(degree, bool) or not isinstance(degree, int):
                raise TypeError(f"{name} must be an integer, got {type(degree).__name__}")
            if degree < 1:
                raise ValueError(f"{name} must be at least 1, got {degree}")

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.pipeline * self.data * self.sequence * self.tensor


@dataclass(frozen=True)
class Switches:
    """The techniques.

    Attributes:
        layout: The degrees of parallelism.
        strategy: How attention is computed over ``layout.sequence`` ranks.
        near: For the hybrid strategy alone: ranks that exchange heads.
        sharding: Which tokens a rank has of a sequence.
        position_table: A learned table is ``"whole"`` on every rank, or ``"partitioned"`` over
            those that share a sequence. Without meaning for rotary positions.
        attention: Mask and scores are ``"stored"``, L × L, or ``"computed"`` in tiles.
        head_groups: Groups of heads that are projected and attended to one after the other, so that
            queries, keys and values of one group exist at a time. Of this many, 1 is all at once.
        loss: Logits exist ``"whole"``, or are ``"tiled"``: of ``tile`` tokens at a time.
        mlp: Likewise for the wide channels of the MLP.
        tile: Tokens in a tile of the loss and of the MLP.
        checkpointing: ``"none"`` keeps what autograd wants; ``"blocks"`` keeps the input of every
            block and computes the rest again; ``"offloaded"`` keeps that in the host's memory.
        every: Of so many blocks in a row the input is kept; those between are computed again before
            their blocks are, which is one forward more.
        optimizer: Its states are ``"replicated"``, ``"sharded"`` over the ranks that share
            parameters, or ``"offloaded"``: sharded, and in the host's memory.

    Raises:
        ValueError: A value is not one of those.
    """

    layout: Layout = field(default_factory=Layout)
    strategy: Strategy = "auto"
    near: int | None = None
    sharding: Kind = "zigzag"
    position_table: Literal["whole", "partitioned"] = "whole"
    attention: Literal["stored", "computed"] = "computed"
    head_groups: int = 1
    loss: Literal["whole", "tiled"] = "whole"
    mlp: Literal["whole", "tiled"] = "whole"
    tile: int = 4096
    checkpointing: Literal["none", "blocks", "offloaded"] = "none"
    every: int = 1
    optimizer: Literal["replicated", "sharded", "offloaded"] = "replicated"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Switches).items():
            value, known = getattr(self, name), get_args(hint)
            if known and all(isinstance(one, str) for one in known) and value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name in ("head_groups", "tile", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def check(self, configuration: Configuration) -> None:
        """Raise where the techniques do not go together, or not with a model.

        Raises:
            ValueError: What is shared over ranks cannot be cut into so many parts.
            Unsupported: With every reason.
        """
        c, layout, found = configuration, self.layout, []
        for name, size in (("heads", c.heads), ("channels of the MLP", c.ffn)):
            if size % layout.tensor:
                raise ValueError(f"tensor={layout.tensor} must divide the {size} {name}")
        if layout.pipeline > c.layers:
            raise ValueError(f"pipeline={layout.pipeline} stages are more than {c.layers} blocks")
        if c.tied and layout.pipeline > 1:
            raise ValueError(
                f"a tied head needs the embedding on its stage, but pipeline={layout.pipeline}"
            )
        if self.attention == "stored" and layout.sequence > 1:
            found.append("attention stored with a sequence over several ranks (computed only)")
        if self.head_groups > 1 and self.checkpointing == "none":
            found.append("groups of heads without checkpointing, which would keep all of them")
        if self.head_groups > 1 and layout.tensor > 1:
            found.append("groups of heads with tensor parallelism, which shares heads already")
        if self.every > 1 and self.checkpointing == "none":
            found.append("inputs of some blocks only without checkpointing, which keeps everything")
        if self.head_groups > c.heads:
            found.append(f"{self.head_groups} groups of {c.heads} heads")
        if found:
            raise Unsupported(found, "isoform.parallel.training")

    def but(self, **changes: Any) -> Switches:
        """These, with some changed."""
        return replace(self, **changes)


BASELINE = Switches(attention="stored", checkpointing="blocks", sharding="contiguous")
"""The older scheme. It computes its blocks again, as Megatron does: without that it holds less."""

EVERYTHING = Switches(
    position_table="partitioned",
    attention="computed",
    loss="tiled",
    mlp="tiled",
    checkpointing="offloaded",
    optimizer="sharded",
)
"""Every technique; the layout, and ``head_groups`` where memory asks for it, are a run's to say."""

"""Lengths at which others trained GenSLM's models, beside what :mod:`.plan` says of such runs.

The lengths are those of the long-sequence framework of DeepSpeed4Science, on A100s of 40 GB (Song
et al., arXiv 2310.04610, and its announcement of September 2023). GenSLM's repository
(``examples/long-sequences``) has the same numbers for 32, 64 and 128 GPUs and with the two models
exchanged; here they stand as the paper has them.

Nothing of the plan is fitted to them. Assumed, because no source says it of each run:

- the models are those of :data:`~isoform.reference.torch.genome_lm.CONFIGURATIONS` by these names,
  with learned positions and a row of the table for every token, in float16, a sequence at a time;
- *old* is :data:`~isoform.parallel.training.switches.BASELINE` by whichever layout of shared
  tensors and stages holds most. GenSLM's launch script shares tensors over all GPUs;
- *old on the host* is the same with optimizer states and what blocks keep in the host's memory, as
  DeepSpeed can and as the configuration in that script does with states;
- *new* shares the sequence over all GPUs, tensors and stages over none; parameters, gradients and
  optimizer states are sharded, and what blocks keep stays on the device;
- *new offloaded* keeps that on the host, of which a GPU has :data:`HOST` bytes: 1 TB for 8 of them;
- a GPU gives :data:`MEMORY` bytes to tensors, all that it is sold with.

Megatron-LM's own scheme (tensors shared, and between them the sequence) is none of our switches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from isoform.parallel.training.plan import (
    Longest,
    Machine,
    Run,
    best,
    layouts,
    longest,
    schemes,
)
from isoform.parallel.training.switches import BASELINE, Layout
from isoform.reference.torch.genome_lm import CONFIGURATIONS

__all__ = ["PUBLISHED", "Published", "Row", "rows"]

MEMORY, HOST = 40 * 10**9, 128 * 10**9
"""Bytes of a GPU, and of the host for each."""

ON_HOST = BASELINE.but(optimizer="offloaded", checkpointing="offloaded")
"""The older scheme with the host's memory."""

K = 1024
"""What lengths are counted in."""


@dataclass(frozen=True)
class Published:
    """The longest sequences that were reported, in :data:`K` tokens.

    Attributes:
        model, gpus: Of what, and on how many GPUs.
        old: Megatron-DeepSpeed as it was.
        megatron: Megatron-LM.
        new: Megatron-DeepSpeed with long sequences.
    """

    model: str
    gpus: int
    old: int
    megatron: int
    new: int


PUBLISHED = (
    Published("25B", 16, 36, 26, 192),
    Published("25B", 32, 42, 48, 448),
    Published("25B", 64, 42, 52, 512),
    Published("33B", 16, 28, 14, 128),
    Published("33B", 32, 32, 46, 384),
    Published("33B", 64, 32, 52, 448),
)


@dataclass(frozen=True)
class Row:
    """What was reported, and the plan's.

    Attributes:
        published: What was reported.
        old, old_on_host, new, new_offloaded: The plan's, as the module's text says.
    """

    published: Published
    old: Longest
    old_on_host: Longest
    new: Longest
    new_offloaded: Longest


def rows() -> list[Row]:
    """Every line of the table.

    Returns:
        As :data:`PUBLISHED`, each beside the plan's lengths.
    """
    machine, found = Machine(MEMORY, HOST), []
    for published in PUBLISHED:
        c = replace(CONFIGURATIONS[published.model], positions="learned")
        everything = schemes(c)["everything"].switches
        everything = everything.but(layout=Layout(sequence=published.gpus))
        older, on_host = (
            best(run, layouts(run, published.gpus), machine)
            for run in (Run(c, one, 0, "float16") for one in (BASELINE, ON_HOST))
        )
        assert older is not None and on_host is not None, "stages alone are always a layout"
        run = Run(c, everything, 0, "float16")
        on_device = replace(run, switches=everything.but(checkpointing="blocks"))
        found.append(
            Row(published, older, on_host, longest(on_device, machine), longest(run, machine))
        )
    return found

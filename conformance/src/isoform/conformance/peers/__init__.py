"""Other people's kernels, as implementations: ``isoform check xformers``, ``isoform list --peers``.

Each adapter calls one package's function and declares what that package documents: dtypes, head
dims, operands, gradients, arithmetic. What it adds around the call is common to all and said in
:mod:`~.adapter`. Nothing is imported before it is asked for, so that a package that is missing, or
a GPU, is a reason why a peer is *not run here*, and an adapter is never a dependency.

Peers are found by name like any implementation, but are not among those that run when nobody is
named: what they get wrong is their authors' to mend.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Literal

Where = Literal["cpu", "cuda", "ranks"]

RANKS = 2
"""On how many ranks, of a GPU each, peers over ranks are judged if nobody says on how many."""


@dataclass(frozen=True)
class Peer:
    """Somebody else's kernel.

    Attributes:
        name: What it is found by.
        target: ``module:OBJECT`` of the adapter.
        function: What is called, by its full name.
        packages: The distributions it needs, by the modules they are imported as.
        where: ``"cpu"``: on a processor and on a GPU; ``"cuda"``: on a GPU alone; ``"ranks"``: on
            several ranks with a GPU each.
        built: ``module:ATTRIBUTE`` that is true where its compiled part was loaded; empty where it
            has none, or says so itself.
    """

    name: str
    target: str
    function: str
    packages: dict[str, str]
    where: Where
    built: str = ""

    def lacking(self) -> list[str]:
        """The packages it needs that are not installed."""
        return [
            package
            for module, package in self.packages.items()
            if importlib.util.find_spec(module) is None
        ]

    def why_not(self) -> str:
        """Why it cannot run here, and what would make it; empty if it can."""
        if lacking := self.lacking():
            return f"needs {' and '.join(lacking)}: pip install {' '.join(lacking)}"
        if self.where == "cuda":
            import torch

            if not torch.cuda.is_available():
                return "needs an NVIDIA GPU"
        if self.built and not self._is_built():
            return "does not load its compiled part: it was linked with another CUDA, or PyTorch"
        if self.where == "ranks":
            from isoform.conformance.ranks import gpus_lacking

            return gpus_lacking(RANKS)
        return ""

    def _is_built(self) -> bool:
        module, _, attribute = self.built.partition(":")
        return bool(getattr(importlib.import_module(module), attribute))


TORCH = {"torch": "torch"}
_HERE = "isoform.conformance.peers"

Row = tuple[str, str, str, dict[str, str], Where]
_ROWS: tuple[Row, ...] = (
    # Evoformer attention
    *(
        (
            f"sdpa-{backend}",
            f"sdpa:{backend.upper()}",
            f"torch.nn.functional.scaled_dot_product_attention, backend {backend}",
            {},
            "cpu" if backend == "math" else "cuda",
        )
        for backend in ("math", "flash", "efficient", "cudnn")
    ),
    (
        "flex-compiled",
        "flex:FLEX_COMPILED",
        "torch.compile(torch.nn.attention.flex_attention)",
        {},
        "cuda",
    ),
    (
        "ds4sci",
        "deepspeed:DS4SCI",
        "deepspeed.ops.deepspeed4science.DS4Sci_EvoformerAttention",
        {"deepspeed": "deepspeed"},
        "cuda",
    ),
    (
        "cueq-triangle",
        "cuequivariance:TRIANGLE_ATTENTION",
        "cuequivariance_torch.triangle_attention",
        {
            "cuequivariance_torch": "cuequivariance-torch",
            "cuequivariance_ops_torch": "cuequivariance-ops-torch-cu13",
        },
        "cuda",
    ),
    (
        "cueq-pair-bias",
        "cuequivariance:ATTENTION_PAIR_BIAS",
        "cuequivariance_torch.attention_pair_bias",
        {
            "cuequivariance_torch": "cuequivariance-torch",
            "cuequivariance_ops_torch": "cuequivariance-ops-torch-cu13",
        },
        "cuda",
    ),
    (
        "xformers",
        "xformers:XFORMERS",
        "xformers.ops.memory_efficient_attention",
        {"xformers": "xformers"},
        "cuda",
    ),
    (
        "trifast",
        "trifast:TRIFAST",
        "trifast.triangle_attention",
        {"trifast": "trifast"},
        "cuda",
    ),
    (
        "openfold3-chunked",
        "openfold3:CHUNKED",
        "openfold3.core.model.primitives.attention.attention_chunked_trainable",
        {"openfold3": "openfold3"},
        "cpu",
    ),
    (
        "openfold3-lma",
        "openfold3:LOW_MEMORY",
        "openfold3.core.model.primitives.attention._lma",
        {"openfold3": "openfold3"},
        "cpu",
    ),
    # Rotary embedding
    (
        "transformers-rotary",
        "rotary:TRANSFORMERS",
        "transformers.models.llama.modeling_llama.apply_rotary_pos_emb",
        {"transformers": "transformers"},
        "cpu",
    ),
    (
        "flash-attn-rotary",
        "rotary:FLASH_ATTN",
        "flash_attn.layers.rotary.apply_rotary_emb",
        {"flash_attn": "flash-attn"},
        "cuda",
    ),
    # Attention over a sequence that ranks share
    (
        "torch-context-parallel",
        "sequence:CONTEXT_PARALLEL",
        "torch.distributed.tensor.experimental.context_parallel, backend flash",
        {},
        "ranks",
    ),
    (
        "deepspeed-ulysses",
        "sequence:DEEPSPEED_ULYSSES",
        "deepspeed.sequence.layer.DistributedAttention",
        {"deepspeed": "deepspeed"},
        "ranks",
    ),
    (
        "yunchang-ulysses",
        "sequence:YUNCHANG_ULYSSES",
        "yunchang.LongContextAttention, all ranks in Ulysses, attention TORCH_FLASH",
        {"yunchang": "yunchang"},
        "ranks",
    ),
    (
        "yunchang-ring",
        "sequence:YUNCHANG_RING",
        "yunchang.ring_pytorch_attn_func",
        {"yunchang": "yunchang"},
        "ranks",
    ),
    (
        "ring-flash-attn",
        "sequence:RING_FLASH_ATTN",
        "ring_flash_attn.zigzag_ring_flash_attn_func",
        {"ring_flash_attn": "ring-flash-attn", "flash_attn": "flash-attn"},
        "ranks",
    ),
)
BUILT = {"xformers": "xformers:_has_cpp_library"}
"""Without it, it has no operator for any call, and says so only when called."""

PEERS: dict[str, Peer] = {
    name: Peer(name, f"{_HERE}.{target}", function, TORCH | packages, where, BUILT.get(name, ""))
    for name, target, function, packages, where in _ROWS
}
"""Every peer by name."""

"""Operations of PyTorch's: how ours are made known to it, and launched for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from isoform.kernels.arguments import Struct, View
from isoform.kernels.launch import Description, Pass, prepared
from isoform.reference.contract import dtype_name

LIBRARY = torch.library.Library("isoform", "FRAGMENT")  # type: ignore[no-untyped-call]


def operation(
    name: str, run: Callable[..., Any], fake: Callable[..., Any], *, mutates: Iterable[str] = ()
) -> Any:
    """An operation of PyTorch's, on CUDA tensors.

    Not by `torch.library.custom_op`, whose first call imports the compiler of PyTorch, which takes
    longer than ours; nor is `fake` given to `torch.library.register_fake`, which looks up the file
    of every module loaded.

    Args:
        name: Its name, ``isoform::name``.
        run: What it does; its annotations are the schema.
        fake: The same without numbers: what results look like.
        mutates: The arguments that it writes to.
    """
    schema = torch.library.infer_schema(run, mutates_args=tuple(mutates))
    LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, run, "CUDA")  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, fake, "Meta")  # type: ignore[no-untyped-call]
    made = getattr(torch.ops.isoform, name).default
    if written := [
        place for place, argument in enumerate(made._schema.arguments) if argument.is_write
    ]:
        _tell_autograd(name, made, written)
    return made


def _tell_autograd(name: str, made: Any, written: list[int]) -> None:
    """Have autograd know when the arguments at the places ``written`` were, by their version, so
    that a backward that needs what they held before fails instead of computing something else.
    """

    def run(keys: Any, *arguments: Any) -> Any:
        for place in written:
            if arguments[place] is not None:
                torch.autograd.graph.increment_version(arguments[place])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return made.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)

    LIBRARY.impl(name, run, "ADInplaceOrView", with_keyset=True)  # type: ignore[no-untyped-call]


def run(
    one: Pass,
    which: Hashable,
    shape: Callable[[], Any],
    tensors: Mapping[str, Tensor],
    scale: float,
    struct: Struct,
) -> None:
    """Launch a pass on PyTorch's current stream of the tensors' device.

    Args:
        one: The pass.
        which: What it is known by, besides device, dtype, scale and how the tensors lie.
        shape: Gives the call's shape; asked only if the pass is new.
        tensors: Operands and results by name, q among them.
        scale: The factor of the logits.
        struct: What the operation's kernels are told.
    """
    q = tensors["q"]
    device = q.device.index
    key = (
        *(which, device, q.dtype, scale),
        *((name, x.shape, x.stride(), x.data_ptr() % 16) for name, x in tensors.items()),
    )

    def described() -> Description:
        views = {name: View.of(x.data_ptr(), x.shape, x.stride()) for name, x in tensors.items()}
        return shape(), dtype_name(q), views

    with torch.cuda.device(device):
        found = prepared(key, one, described, scale, struct)
        scratch = [q.new_empty(size, dtype=torch.float32) for size in found.scratch.values()]
        pointers = [x.data_ptr() for x in (*tensors.values(), *scratch)]
        found.launch(pointers, torch.cuda.current_stream(device).cuda_stream)


def architecture(device: int) -> str:
    """The architecture of a GPU, such as ``"sm_90"``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"

"""Operations of PyTorch's: how ours are made known to it, and launched for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

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


def differentiable(
    made: Any,
    differentiate: Callable[..., Any],
    setup_context: Callable[..., None] = lambda ctx, inputs, output: None,
) -> Callable[..., Any]:
    """An operation with a gradient.

    Where a compiler looks on it is differentiated by what is registered with it. Elsewhere by a
    function of autograd's own, or not at all where no gradient is wanted, which is the same in a
    fraction of the time: what :func:`torch.library.register_autograd` makes goes through the
    arguments of each call in Python.

    Args:
        made: What :func:`operation` has made; it writes to none of its arguments.
        differentiate, setup_context: As of :func:`torch.library.register_autograd`.
    """
    torch.library.register_autograd(
        made._schema.name, differentiate, setup_context=setup_context, lib=LIBRARY
    )

    def compute(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            found = made(*inputs)
        return tuple(found) if isinstance(found, list) else found  # autograd wants no lists

    class Differentiated(torch.autograd.Function):
        forward = staticmethod(compute)
        backward = staticmethod(differentiate)

    Differentiated.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
    differentiated: Callable[..., Any] = Differentiated.apply

    def call(*inputs: Any) -> Any:
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        if not unobserved(tensors):
            return made(*inputs)
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        return (differentiated if wanted else compute)(*inputs)

    return call


def unobserved(tensors: Iterable[Tensor | None]) -> bool:
    """Whether these are plain tensors, and no compiler looks on."""
    return all(type(x) in _PLAIN for x in tensors) and not torch.compiler.is_compiling()


_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))

Decision = TypeVar("Decision")
_DECIDED: dict[Hashable, Any] = {}
_MOST_DECIDED = 4096


def decided(
    decide: Callable[[], Decision], tensors: Sequence[Tensor | None], *asked: Hashable
) -> Decision:
    """What ``decide`` says, remembered.

    Args:
        decide: Looks at shape, dtype and device of the tensors, and at nothing else of them.
        tensors: Those that are operands; None for one that is not there.
        asked: All else that the decision depends on, that of which operation it is included.
    """
    if not unobserved(tensors):
        return decide()
    key = (
        *((type(one), one) for one in asked),  # True is not 1
        *(None if x is None else (x.shape, x.dtype, x.device) for x in tensors),
    )
    try:
        found: Decision = _DECIDED[key]
    except KeyError:
        if len(_DECIDED) >= _MOST_DECIDED:
            _DECIDED.clear()
        found = _DECIDED[key] = decide()
    return found


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

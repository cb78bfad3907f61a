"""Array libraries, each behind the same few functions: put operands in, run, take results out.

What differs between NumPy and PyTorch for the judge is here and nowhere else: how an array is made
(with its strides), how gradients are had, how peak memory is seen, and what another device is.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from isoform.conformance.case import Operands
from isoform.conformance.dtypes import Array
from isoform.conformance.implementation import Implementation
from isoform.conformance.signatures import SIGNATURES
from isoform.reference.contract import Unsupported

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Framework(Protocol):
    """What the judge needs of an array library."""

    def devices(self) -> tuple[str, ...]:
        """The kinds of device that are there."""

    def upload(self, operands: Operands, device: str) -> dict[str, Any]:
        """The library's arrays of the same numbers and strides."""

    def download(self, x: Any) -> Array:
        """A NumPy copy of a result."""

    def run(
        self,
        implementation: Implementation,
        operands: dict[str, Any],
        options: Mapping[str, Any],
        *,
        lse: bool,
        gradients: Sequence[str],
    ) -> dict[str, Any]:
        """One call, with ``options`` beside the operands: the library's arrays of the results by
        name.
        """

    def peak_memory(self, run: Callable[[], object], device: str) -> int:
        """Bytes that ``run`` holds at most above what was held before."""

    def poison(self, operands: dict[str, Any]) -> None:
        """Fill memory that the next call is likely to be given with NaN, and give it back."""

    def other_dtype(self, x: Any) -> Any:
        """``x`` in another float dtype."""

    def other_device(self, x: Any) -> Any:
        """``x`` on another device than the one operands are on."""


def framework(name: str) -> Framework:
    """The array library called ``name``.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    found: Framework = _NumPy() if name == "numpy" else _Torch()
    return found


def _arguments(operands: dict[str, Any], options: Mapping[str, Any], lse: bool) -> dict[str, Any]:
    """The call's arguments: only what it uses, so that narrower signatures are served too."""
    arguments = {name: x for name, x in operands.items() if name != "dout"} | dict(options)
    if lse:
        arguments["return_lse"] = True
    return arguments


def _named(returned: Any, lse: bool) -> dict[str, Any]:
    """What a forward call returned, by name."""
    if not lse:
        return {"out": returned}
    if not (isinstance(returned, tuple | list) and len(returned) == 2):
        raise TypeError(f"with return_lse, (out, lse) must be returned, got {type(returned)}")
    return {"out": returned[0], "lse": returned[1]}


def _by_backward(
    implementation: Implementation,
    operands: dict[str, Any],
    options: Mapping[str, Any],
    *,
    lse: bool,
    gradients: Sequence[str],
) -> dict[str, Any]:
    """What the operation and its own backward returned, by name.

    Raises:
        Unsupported: Gradients are wanted and there is no backward.
    """
    if gradients and implementation.backward is None:
        raise Unsupported([f"gradient of {name}" for name in gradients], implementation.name)
    results = _named(implementation.forward(**_arguments(operands, options, lse)), lse)
    if gradients:
        assert implementation.backward is not None
        signature = SIGNATURES[implementation.operation]
        saved = {name: x for name, x in operands.items() if name not in signature.forward_only}
        found = implementation.backward(operands["dout"], **_arguments(saved, options, lse=False))
        named = _gradients(found, signature.differentiable)
        results |= {f"d{name}": named(name) for name in gradients}
    return results


def _gradients(found: Any, differentiable: Sequence[str]) -> Callable[[str], Any]:
    """What a backward returned, by operand: it has attributes, or the contract's order, or is the
    only gradient that there is.
    """
    if hasattr(found, f"d{differentiable[0]}"):
        return lambda name: getattr(found, f"d{name}")
    in_order = found if isinstance(found, tuple | list) else (found,)
    return dict(zip(differentiable, in_order, strict=True)).__getitem__


def _is_float(x: Array) -> bool:
    return x.dtype.kind not in "biu"  # bfloat16's is not "f"


class _NumPy:
    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def upload(self, operands: Operands, device: str) -> dict[str, Any]:
        return dict(operands)

    def download(self, x: Any) -> Array:
        return np.array(x)

    def run(
        self,
        implementation: Implementation,
        operands: dict[str, Any],
        options: Mapping[str, Any],
        *,
        lse: bool,
        gradients: Sequence[str],
    ) -> dict[str, Any]:
        results = _by_backward(implementation, operands, options, lse=lse, gradients=gradients)
        return {name: np.asarray(x) for name, x in results.items()}

    def peak_memory(self, run: Callable[[], object], device: str) -> int:
        tracemalloc.start()
        try:
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            run()
            return tracemalloc.get_traced_memory()[1] - held
        finally:
            tracemalloc.stop()

    def poison(self, operands: dict[str, Any]) -> None:
        for _ in range(2):  # as many as a call returns arrays of a size, forward and backward
            [np.full(x.shape, np.nan).astype(x.dtype) for x in operands.values() if _is_float(x)]

    def other_dtype(self, x: Any) -> Any:
        return x.astype(np.float64 if x.dtype != np.float64 else np.float32)

    def other_device(self, x: Any) -> Any:
        return _Elsewhere(x)


@contextmanager
def _standard_error_discarded() -> Iterator[None]:
    """Discard what native code writes to the standard error."""
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(nowhere)
        os.close(saved)


class _Elsewhere:
    """An array of NumPy's shape and dtype that says it lies on a GPU, as CuPy's do."""

    device = "cuda:0"

    def __init__(self, x: Array) -> None:
        self.shape, self.dtype, self.ndim = x.shape, x.dtype, x.ndim


class _Torch:
    def __init__(self) -> None:
        import torch

        self.torch = torch

    def devices(self) -> tuple[str, ...]:
        return ("cpu", "cuda") if self.torch.cuda.is_available() else ("cpu",)

    def upload(self, operands: Operands, device: str) -> dict[str, Any]:
        return {name: self._tensor(x, device) for name, x in operands.items()}

    def _tensor(self, x: Array, device: str) -> Any:
        bits = x.view(np.int16) if x.dtype == BFLOAT16 else x
        tensor = self.torch.from_numpy(bits)
        if x.dtype == BFLOAT16:
            tensor = tensor.view(self.torch.bfloat16)
        if device == "cpu":
            return tensor
        there = self.torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
        )
        return there.copy_(tensor) if 0 not in tensor.stride() else tensor.to(device)

    def download(self, x: Any) -> Array:
        x = x.detach().cpu()
        if x.dtype == self.torch.bfloat16:
            return np.array(x.contiguous().view(self.torch.int16).numpy()).view(BFLOAT16)
        return np.array(x.numpy())

    def run(
        self,
        implementation: Implementation,
        operands: dict[str, Any],
        options: Mapping[str, Any],
        *,
        lse: bool,
        gradients: Sequence[str],
    ) -> dict[str, Any]:
        if implementation.backward is None:
            results = self._by_autograd(implementation, operands, options, lse, gradients)
        else:
            results = _by_backward(implementation, operands, options, lse=lse, gradients=gradients)
        for name, x in results.items():
            if not isinstance(x, self.torch.Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if results["out"].is_cuda:
            self.torch.cuda.synchronize()
        return results

    def _by_autograd(
        self,
        implementation: Implementation,
        operands: dict[str, Any],
        options: Mapping[str, Any],
        lse: bool,
        gradients: Sequence[str],
    ) -> dict[str, Any]:
        torch = self.torch
        leaves = {
            name: x.detach().requires_grad_() if name in gradients else x
            for name, x in operands.items()
        }
        with torch.set_grad_enabled(bool(gradients)):
            returned = implementation.forward(**_arguments(leaves, options, lse))
        results = _named(returned, lse)
        if gradients:
            found = torch.autograd.grad(
                results["out"],
                [leaves[name] for name in gradients],
                operands["dout"],
                allow_unused=True,
            )
            # an operand that the output does not depend on has gradient zero
            results |= {
                f"d{name}": torch.zeros_like(leaves[name]) if x is None else x
                for name, x in zip(gradients, found, strict=True)
            }
        return results

    def peak_memory(self, run: Callable[[], object], device: str) -> int:
        torch = self.torch
        if device == "cuda":
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            return int(torch.cuda.max_memory_allocated() - held)
        activities = [torch.profiler.ProfilerActivity.CPU]
        profile = torch.profiler.profile(activities=activities, profile_memory=True)
        with _standard_error_discarded(), profile:  # the profiler talks to itself there
            run()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
        return int(held.max(initial=0))

    def poison(self, operands: dict[str, Any]) -> None:
        for _ in range(2):
            [
                self.torch.full_like(x, self.torch.nan)
                for x in operands.values()
                if x.is_floating_point()
            ]

    def other_dtype(self, x: Any) -> Any:
        return x.to(self.torch.float64 if x.dtype != self.torch.float64 else self.torch.float32)

    def other_device(self, x: Any) -> Any:
        return x.to("meta")

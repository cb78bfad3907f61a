"""Capture: the operands of attention calls in a running PyTorch model, in one file.

::

    with capture("step.safetensors"):
        loss = model(batch)
        loss.backward()

``isoform replay step.safetensors`` then judges implementations on them
(:mod:`isoform.conformance.replay`).

What is seen, without changing the model:

- ``torch.nn.functional.scaled_dot_product_attention``. Its layout ``[..., H, L, D]`` and its one
  ``attn_mask`` are translated into the operands of the contract (:func:`_translated`); what cannot
  be is left out, with the reason.
- isoform's own functions, as a module's attribute (``layer.attention``, as in
  :mod:`isoform.reference.torch.layers`) or as a name in any Python module.
- further functions with the contract's signature, given as ``functions``.

How: while the context lasts, every such name is bound to a wrapper, found by looking through all
loaded Python modules and through the attributes of each ``torch.nn.Module`` when it is called. A
``TorchFunctionMode`` would not do: isoform's functions are plain Python to PyTorch, and inside
``torch.nn.functional.multi_head_attention_forward`` a mode is switched off.

What is *not* seen: a function held in a closure, a ``functools.partial``, a default argument or a
container (put ``recorded(function)`` there instead); code that ``torch.compile``, ``torch.jit`` or
a CUDA graph runs (``torch.compiler.set_stance("force_eager")`` runs the first uncompiled);
attention written out in matrix products, as ``torch.nn.MultiheadAttention`` does for
``need_weights=True``. Its fused inference path is switched off while the context lasts. A call made
by a call that is recorded (a tiled form's blocks) is part of it and not recorded again; one that
activation checkpointing repeats in the backward pass is left out.

Operands are copied to the CPU before the call, exactly as they were, dtype included; nothing the
model computes with is touched. On a GPU this waits for the device. The gradient of the output
arrives by a hook, if backward runs inside the context; only the first one counts.

Calls from all threads are recorded, in the order in which they began. One capture can be active in
a process; with several processes each needs a file of its own.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from isoform.conformance.replay import KEY, SCHEMA, LeftOut, RecordedCall
from isoform.reference.contract import OPTIONAL_OPERANDS, dtype_name, evoformer_call

P = ParamSpec("P")
R = TypeVar("R")
Function = Callable[..., Any]

NAMES = ("evoformer_attention", "evoformer_attention_tiled")
COMPONENTS = ("isoform.reference.torch", "isoform.kernels")
"""Which of isoform's functions are seen, and where they are looked up, if loaded."""

SDPA = torch.nn.functional.scaled_dot_product_attention


class _LeftOut(Exception):
    """A call cannot be recorded; the message says why."""


@dataclass(frozen=True)
class _Question:
    """One call in the contract's form.

    Attributes:
        operands: The operands, the model's own tensors or views of them.
        scale: Factor of the logits, or None.
        arrange: Brings the function's output, and its gradient, into the shape of the contract.
        notes: What was changed.
    """

    operands: dict[str, Any]
    scale: float | None
    arrange: Callable[[Tensor], Tensor] = lambda out: out
    notes: tuple[str, ...] = ()


Reader = Callable[..., _Question]


@dataclass
class _Entry:
    """A call being recorded."""

    order: int
    call: RecordedCall
    tensors: dict[str, Tensor]
    arrange: Callable[[Tensor], Tensor]
    size: int


@dataclass
class Capture:
    """A capture that is going on, or is over.

    Attributes:
        path: The file that is written in the end.
        max_calls: How many calls are recorded at most.
        max_bytes: How many bytes their tensors have at most.
        modules: Shell patterns of module names; none means all.
        interrupted: The exception that ended it; empty if none did.
    """

    path: Path
    max_calls: int
    max_bytes: int
    modules: tuple[str, ...] = ()
    interrupted: str = ""
    _entries: list[_Entry] = field(default_factory=list, repr=False)
    _left_out: Counter[tuple[str, str, str]] = field(default_factory=Counter, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _begun: int = field(default=0, repr=False)
    _held: int = field(default=0, repr=False)
    _bytes: int = field(default=0, repr=False)

    @property
    def calls(self) -> tuple[RecordedCall, ...]:
        """The calls recorded so far."""
        ordered = sorted(self._entries, key=lambda entry: entry.order)
        return tuple(
            replace(entry.call, name=f"call-{index:04}", gradient="dout" in entry.tensors)
            for index, entry in enumerate(ordered)
        )

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The calls seen and not recorded so far, by reason."""
        return tuple(LeftOut(*key, count) for key, count in self._left_out.items())

    def summary(self) -> str:
        """What was recorded and what was not, in a few lines."""
        gradients = sum(call.gradient for call in self.calls)
        lines = [
            f"{len(self.calls)} calls captured, {gradients} of them with their output gradient, "
            f"{self._bytes / 2**20:.1f} MiB"
        ]
        lines += [
            f"left out: {left.calls} calls of {left.function} in {left.module or 'no module'}: "
            f"{left.reason}"
            for left in self.left_out
        ]
        return "\n".join(lines)

    # What the wrappers call.

    def begin(self, function: str, read: Reader, args: Any, kwargs: Any) -> _Entry | None:
        """Copy the operands of a call that is about to be made; None if it is left out."""
        module = _place.names[-1] if _place.names else ""
        if self.modules and not any(fnmatchcase(module, pattern) for pattern in self.modules):
            return None
        try:
            return self._begin(module, function, read, args, kwargs)
        except _LeftOut as reason:
            self._leave_out(module, function, str(reason))
        except Exception as problem:  # whatever goes wrong here, the model shall not suffer
            self._leave_out(module, function, f"{type(problem).__name__}: {problem}")
        return None

    def _begin(self, module: str, function: str, read: Reader, args: Any, kwargs: Any) -> _Entry:
        if torch._C._current_graph_task_id() != -1:
            raise _LeftOut("recomputed in the backward pass")
        question = read(*args, **kwargs)
        for name, x in question.operands.items():
            _check_tensor(name, x)
        try:
            evoformer_call(**question.operands, scale=question.scale)
        except (TypeError, ValueError) as problem:
            raise _LeftOut(f"not a call of the contract: {problem}") from None
        wants_gradient = torch.is_grad_enabled() and any(
            x.requires_grad for x in question.operands.values()
        )
        sizes = [x.numel() * x.element_size() for x in question.operands.values()]
        size = sum(sizes) + (sizes[0] if wants_gradient else 0)
        order = self._reserve(size)
        try:
            copies = {name: _copy(x) for name, x in question.operands.items()}
        except BaseException:
            self._release(size)
            raise
        call = RecordedCall(
            name="",
            module=module,
            function=function,
            operands=tuple(copies),
            scale=None if question.scale is None else float(question.scale),
            gradient=False,
            device=str(question.operands["q"].device),
            notes=question.notes,
        )
        return _Entry(order, call, copies, question.arrange, size)

    def _reserve(self, size: int) -> int:
        with self._lock:
            if self._held >= self.max_calls:
                raise _LeftOut(f"max_calls={self.max_calls} was reached")
            if self._bytes + size > self.max_bytes:
                raise _LeftOut(f"max_bytes={self.max_bytes} would be exceeded")
            self._begun += 1
            self._held += 1
            self._bytes += size
            return self._begun

    def _release(self, size: int) -> None:
        with self._lock:
            self._held -= 1
            self._bytes -= size

    def _leave_out(self, module: str, function: str, reason: str) -> None:
        with self._lock:
            self._left_out[module, function, reason] += 1

    def end(self, entry: _Entry, returned: Any) -> None:
        """Record a call that has returned, and wait for the gradient of its output."""
        out = returned[0] if isinstance(returned, tuple | list) else returned
        q = entry.tensors["q"]
        try:
            fits = entry.arrange(out.detach()).shape == q.shape
        except Exception:
            fits = False
        if not fits:
            self.abandon(entry)
            self._leave_out(entry.call.module, entry.call.function, "its output has another shape")
            return
        with self._lock:
            self._entries.append(entry)
        if out.requires_grad:
            out.register_hook(functools.partial(self._gradient, entry))

    def abandon(self, entry: _Entry) -> None:
        """Forget a call that raised."""
        self._release(entry.size)

    def _gradient(self, entry: _Entry, gradient: Tensor) -> None:
        if _active is not self or "dout" in entry.tensors:
            return
        wanted = entry.tensors["q"].dtype
        try:
            if gradient.dtype != wanted:
                raise _LeftOut(
                    f"it is {dtype_name(gradient)}, not {dtype_name(entry.tensors['q'])}"
                )
            _check_tensor("the output gradient", gradient)
            entry.tensors["dout"] = _copy(entry.arrange(gradient))
        except Exception as problem:
            note = f"the output gradient was not captured: {problem}"
            entry.call = replace(entry.call, notes=(*entry.call.notes, note))

    # What the file holds.

    def write(self) -> None:
        """Write the file, whole or not at all."""
        ordered = sorted(self._entries, key=lambda entry: entry.order)
        calls = self.calls
        tensors = {
            f"{call.name}/{name}": x
            for call, entry in zip(calls, ordered, strict=True)
            for name, x in entry.tensors.items()
        }
        document = {
            "schema": SCHEMA,
            "calls": [asdict(call) for call in calls],
            "left_out": [asdict(left) for left in self.left_out],
            "environment": _environment(any(call.device.startswith("cuda") for call in calls)),
            "interrupted": self.interrupted,
        }
        metadata = {"format": "pt", KEY: json.dumps(document)}
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        try:
            partial.touch()
            mode = (
                partial.stat().st_mode
            )  # as any file's; safetensors writes it for the owner alone
            save_file(tensors, partial, metadata=metadata)
            partial.chmod(mode)
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)


def _environment(on_gpu: bool) -> dict[str, str]:
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": str(torch.__version__),
    }
    try:
        found["isoform"] = version("isoform")
    except PackageNotFoundError:  # run from a source tree
        found["isoform"] = "not installed"
    if on_gpu:
        found["gpu"] = torch.cuda.get_device_name()
    return found


class _Place(threading.local):
    """Where a thread is: in which modules, and whether inside a call that is recorded."""

    def __init__(self) -> None:
        self.of: object = None
        self.modules: list[nn.Module] = []
        self.names: list[str] = []
        self.inside = False

    def start(self, of: object) -> None:
        """Forget what another capture has left."""
        if self.of is not of:
            self.of, self.modules, self.names = of, [], []


_place = _Place()
_active: Capture | None = None


@contextmanager
def capture(
    path: Path | str,
    *,
    functions: Iterable[Function] = (),
    modules: Iterable[str] = (),
    max_calls: int = 64,
    max_bytes: int = 2**30,
) -> Iterator[Capture]:
    """Record the operands of the attention calls made inside the context.

    The file appears when the context ends, whole or not at all. If the body raises, what had been
    recorded until then is written, marked as interrupted, since the last calls before an error are
    often what one wants to see; if that is nothing, no file is written. A body that ends well
    without a call that could be recorded leaves a file that says so, and a warning.

    Args:
        path: The file to write; an older one is replaced. Conventionally ``….safetensors``.
        functions: Further functions with the contract's signature to be seen, besides isoform's.
        modules: Only calls from modules whose qualified name matches one of these shell patterns,
            such as ``"*.blocks.0.*"``; all by default.
        max_calls: Calls after this many are left out.
        max_bytes: Calls whose tensors would take more than this in all are left out.

    Yields:
        The capture: ``.calls``, ``.left_out`` and ``.summary()`` say how far it got.

    Raises:
        RuntimeError: Another capture is active.
    """
    global _active
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    session = Capture(path, max_calls, max_bytes, tuple(modules))
    if _active is not None:
        raise RuntimeError(f"a capture to {_active.path} is active already")
    _active = session
    try:
        with _rebound(functions):
            yield session
    except BaseException as problem:
        session.interrupted = f"{type(problem).__name__}: {problem}"
        if session.calls:
            session.write()
        raise
    else:
        session.write()
        if not session.calls:
            warnings.warn(f"nothing was captured to {path}. {_why(session)}", stacklevel=3)
    finally:
        _active = None


def _why(session: Capture) -> str:
    if session.left_out:
        return session.summary()
    return (
        "No call was seen: compiled code, closures and attention written out in matrix products "
        "are not; isoform.conformance.capture.recorded wraps a function for them"
    )


# Wrappers, and where they are put.


def recorded(attention: Callable[P, R]) -> Callable[P, R]:
    """``attention``, whose calls are recorded whenever a capture is active.

    For functions that :func:`capture` cannot find by itself: put this in their place for good. Out
    of a capture, and in compiled code, it does nothing but call.

    Args:
        attention: A function with the signature of
            :func:`isoform.reference.torch.evoformer_attention`. Arguments that the contract does
            not know are passed on and noted.
    """
    return _spied(attention, _of_the_contract)


def _spied(function: Callable[P, R], read: Reader) -> Callable[P, R]:
    name = _name(function)

    @functools.wraps(function)
    def spy(*args: P.args, **kwargs: P.kwargs) -> R:
        session = _active
        if session is None or _place.inside or _is_traced():
            return function(*args, **kwargs)
        entry = session.begin(name, read, args, kwargs)
        _place.inside = True
        try:
            returned = function(*args, **kwargs)
        except BaseException:
            if entry is not None:
                session.abandon(entry)
            raise
        finally:
            _place.inside = False
        if entry is not None:
            session.end(entry, returned)
        return returned

    return spy


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    if function is SDPA:
        return "torch.nn.functional.scaled_dot_product_attention"
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"


# One wrapper for each function, for good: a module imported during a capture keeps it.
_standing_spy = functools.cache(_spied)


@contextmanager
def _rebound(functions: Iterable[Function]) -> Iterator[None]:
    """Bind every name of the known functions to their wrappers, and follow the modules called."""
    known: dict[int, tuple[Function, Function]] = {}
    for function in (*_own_functions(), *functions):
        known[id(function)] = function, _standing_spy(function, _of_the_contract)
    known[id(SDPA)] = SDPA, _standing_spy(SDPA, _translated)
    undo: list[tuple[dict[str, Any], str, Function, Function]] = []

    def rebind(names: dict[str, Any]) -> None:
        for key, value in list(names.items()):
            if (found := known.get(id(value))) is not None:
                names[key] = found[1]
                undo.append((names, key, *found))

    named: WeakKeyDictionary[nn.Module, dict[int, str]] = WeakKeyDictionary()
    seen: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()

    def enter(module: nn.Module, inputs: Any) -> None:
        if _is_traced():  # or the hook would be compiled too
            return
        _place.start(of=known)
        if module not in seen:
            seen[module] = None
            rebind(vars(module))
        root = _place.modules[0] if _place.modules else module
        if root not in named:
            named[root] = {id(child): name for name, child in root.named_modules()}
        name = named[root].get(id(module), f"({type(module).__name__})")
        _place.modules.append(module)
        _place.names.append(".".join(filter(None, (type(root).__name__, name))))

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if _is_traced():
            return
        while _place.modules:  # those that raised may not have left
            _place.names.pop()
            if _place.modules.pop() is module:
                break

    hooks = (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    )
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for loaded in list(sys.modules.values()):
            if isinstance(loaded, ModuleType) and _is_searched(loaded.__name__):
                rebind(vars(loaded))
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for hook in hooks:
            hook.remove()
        for names, key, function, spy in undo:
            if names.get(key) is spy:
                names[key] = function
        _place.start(of=None)


def _is_traced() -> bool:
    """Whether this is being compiled, and there are no numbers yet."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def _own_functions() -> Iterator[Function]:
    for name, loaded in list(sys.modules.items()):
        if name.startswith(COMPONENTS):
            yield from (vars(loaded)[wanted] for wanted in NAMES if wanted in vars(loaded))


def _is_searched(module: str) -> bool:
    """Whether names in ``module`` are rebound: not here, and in PyTorch only in one place."""
    if module.split(".")[0] == "torch":
        return module == "torch.nn.functional"
    return module != __name__


# From arguments to the operands of the contract.


def _of_the_contract(*args: Any, **kwargs: Any) -> _Question:
    """The operands of a call that has the contract's signature."""
    positional = dict(zip(("q", "k", "v"), args, strict=False))
    if (
        len(args) > 3
        or positional.keys() & kwargs.keys()
        or {"q", "k", "v"} - {*positional, *kwargs}
    ):
        raise _LeftOut("not a call of the contract: q, k and v, then named operands")
    given = positional | kwargs
    operands = {
        name: given[name]
        for name in ("q", "k", "v", *OPTIONAL_OPERANDS)
        if given.get(name) is not None
    }
    ignored = sorted(given.keys() - {"q", "k", "v", *OPTIONAL_OPERANDS, "scale", "return_lse"})
    notes = [f"further arguments were not captured: {', '.join(ignored)}"] if ignored else []
    if given.get("return_lse"):
        notes.append("a gradient through lse, if there was one, was not captured")
    return _Question(operands, given.get("scale"), notes=tuple(notes))


def _translated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> _Question:
    """The operands of a call of PyTorch's scaled dot product attention.

    ``query [*N, H, L, D]`` becomes ``q [B, S, L, H, D]``. ``attn_mask`` becomes what it depends on:

    =============================  =====================================  ============
    attn_mask                      operand                                B, S
    =============================  =====================================  ============
    the key and *N                 ``mask`` or ``mask_bias``              N₁, the rest
    query, key, head               ``pair_bias``                          1, all of *N
    query, key, head and N₁        ``pair_bias``                          N₁, the rest
    query, key, head and *N        ``pair_bias``                          all of *N, 1
    =============================  =====================================  ============

    A boolean one that depends on the query, and ``is_causal``, become a pair bias of 0 and −inf. An
    axis that is expanded (stride 0) counts as one that nothing depends on. One axis ``*N`` alone
    (``[N, H, L, D]``, as models have it) is the rows S, with B = 1.

    Under autocast the operands are rounded as the function rounds them.

    Raises:
        _LeftOut: The contract has no such call.
    """
    if dropout_p > 0:
        raise _LeftOut(f"dropout_p={dropout_p:g} makes the result random")
    if is_causal and attn_mask is not None:
        raise _LeftOut("is_causal beside attn_mask")
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if x is not None:
            _check_tensor(name, x)
    notes: list[str] = []
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if dtype is not None:
        notes.append(f"autocast to {str(dtype).removeprefix('torch.')}")
    q, k, v = (_as_autocast(_with_heads(x), dtype) for x in (query, key, value))
    rows, (H, L, _), K = q.shape[:-3], q.shape[-3:], k.shape[-2]
    if not rows == k.shape[:-3] == v.shape[:-3]:
        raise _LeftOut("the leading axes of query, key and value differ")
    if k.shape[-3] != H and not enable_gqa:
        raise _LeftOut("key heads are broadcast without enable_gqa")

    bias = attn_mask
    if is_causal:
        bias = torch.ones(L, K, dtype=torch.bool, device=q.device).tril()
        notes.append("is_causal became a pair bias of 0 and −inf")
    B, S = (1, rows[0]) if len(rows) == 1 else (rows[0], prod(rows[1:]))
    operands: dict[str, Any] = {}
    if bias is not None:
        if query.ndim == 3 and bias.ndim == 3:
            bias = bias[:, None]
        bias = _as_autocast(_needed(bias, len(rows) + 3), dtype)
        if bias.shape[-3:-1] == (1, 1):
            bias = bias.expand(*rows, 1, 1, K)
            if bias.dtype == torch.bool:
                operands["mask"] = bias.reshape(B, S, K)
            else:
                operands["mask_bias"] = bias.reshape(B, S, 1, 1, K)
        else:
            if prod(bias.shape[:-3]) == 1:
                B, S = 1, prod(rows)
            elif len(rows) == 1 or prod(bias.shape[1:-3]) > 1:
                B, S = prod(rows), 1
                bias = bias.expand(*rows, *bias.shape[-3:])
            bias = bias.expand(*bias.shape[:-3], H, L, K).reshape(B, 1, H, L, K)
            if bias.dtype == torch.bool:
                bias = q.new_zeros(bias.shape).masked_fill(~bias, -torch.inf)
                if not is_causal:
                    notes.append("a boolean attn_mask became a pair bias of 0 and −inf")
            operands["pair_bias"] = bias

    def arrange(x: Tensor) -> Tensor:
        x = _with_heads(x)
        return x.reshape(B, S, *x.shape[-3:]).transpose(2, 3)

    operands = {"q": arrange(q), "k": arrange(k), "v": arrange(v), **operands}
    return _Question(operands, scale, arrange, tuple(notes))


def _with_heads(x: Tensor) -> Tensor:
    """``[N, L, D]`` and ``[L, D]`` with the axes that they lack before L: ``[N, 1, L, D]``."""
    x = x[None] if x.ndim == 2 else x
    return x[:, None] if x.ndim == 3 else x


def _needed(bias: Tensor, axes: int) -> Tensor:
    """``bias`` with so many axes, each of size 1 that nothing depends on; the last is left."""
    bias = bias.reshape((1,) * (axes - bias.ndim) + bias.shape)
    for axis in range(axes - 1):
        if bias.stride(axis) == 0:
            bias = bias.narrow(axis, 0, 1)
    return bias


def _as_autocast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``x`` as a function gets it that autocast gives ``dtype``."""
    return x if dtype is None or x.dtype in (torch.bool, torch.float64) else x.to(dtype)


def _check_tensor(name: str, x: Any) -> None:
    """Raise unless ``x`` is a plain tensor with numbers in it."""
    if type(x) not in (Tensor, nn.Parameter):
        raise _LeftOut(f"{name} is of type {type(x).__name__}")
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise _LeftOut(f"{name} is inside a torch.func transform")
    if x.is_nested or x.layout != torch.strided or x.device.type == "meta":
        raise _LeftOut(f"{name} is nested, sparse or without numbers")


def _copy(x: Tensor) -> Tensor:
    """The same numbers on the CPU, contiguous."""
    return torch.empty(x.shape, dtype=x.dtype, device="cpu").copy_(x.detach())

"""Building kernels with the C++ compiler at hand, and launching them.

A program is one ``.cu`` file with its ``-D`` definitions, compiled to a shared library that exports
one function: launch this kernel, on this grid, with these bytes as its argument structure. What
runs the threads is compiled once and linked to it: read and compiled again in each variant of a
kernel, it would be two thirds of the time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from isoform.kernels.compiler import cache_folder, forget_old

CUDA = Path(__file__).parents[1] / "cuda"
"""Where the kernels lie."""

INCLUDE = Path(__file__).parent / "include"
"""The headers that stand for CUDA's."""

RUNTIME = Path(__file__).parent / "runtime.cpp"
"""What runs the threads: the same for all programs, so it is compiled once and linked to each."""

CACHE_BYTES = 512 * 2**20
"""How much is kept of compiled programs, each of some hundred kilobytes, a megabyte or two under
the sanitizers; the least recently used go."""

Order = Literal["forward", "reverse"] | int
"""The order in which threads, and blocks, take turns; a number seeds a shuffle, anew each turn."""

ORDERS: tuple[Order, ...] = ("forward", "reverse", 1)
"""What a kernel without atomic additions must give bitwise equal results in."""

_OPTIONS = (
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-shared"),
    "-fvisibility=hidden",  # two variants of a kernel must not share what has the same name
    "-ffp-contract=off",  # the same roundings on every processor
    "-fno-strict-aliasing",  # as CUDA's compiler: kernels read floats as vectors of floats
)
_SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=vptr")

# What `__global__` and `extern __shared__` are after the preprocessor.
_KERNEL = re.compile(r'__attribute__\(\(used, visibility\("default"\)\)\)\s+void\s+(\w+)\s*\(')
_DYNAMIC = re.compile(r"\bextern\s+thread_local\b[^;]*?(\w+)\s*\[\s*\]\s*;")

_UNIT = """\
#include "cuda_emulator.h"
#include "{source}"

static const isoform::emulate::Kernel kernels[] = {{
{kernels}
}};

extern "C" __attribute__((visibility("default"))) const char* isoform_launch(
    const char* name, const unsigned* grid, const unsigned* block, const void* arguments,
    std::size_t bytes, std::size_t shared_bytes, std::int64_t order) {{
    return isoform::emulate::launch(kernels, {count}, name, grid, block, arguments, bytes,
                                    shared_bytes, order);
}}
"""

# All `extern __shared__` arrays of a block are one piece of memory, whatever they are called.
_SHARED = """\
extern "C" {{
alignas(1024) thread_local unsigned char isoform_dynamic_shared[227 << 10];
}}
{names}
"""
_NAME = r'asm(".globl {name}\n.hidden {name}\n.set {name}, isoform_dynamic_shared");'


class HostCompilerUnavailable(RuntimeError):
    """There is no C++ compiler to emulate with."""


class CompilationFailed(RuntimeError):
    """The C++ compiler rejects a kernel; the message is the compiler's."""


class KernelFault(RuntimeError):
    """A kernel did what CUDA leaves undefined; the message names the threads and source lines."""


@dataclass(frozen=True)
class Program:
    """A compiled ``.cu`` file.

    Attributes:
        name: The file's name, without ``.cu``.
        defines: The definitions that it was compiled with.
        library: The shared library.
    """

    name: str
    defines: Mapping[str, int | str]
    library: Path

    def launch(
        self,
        kernel: str,
        *,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: bytes,
        shared_bytes: int = 0,
        order: Order = "forward",
    ) -> None:
        """Run a grid to its end.

        Args:
            kernel: Name of the ``__global__`` function.
            grid: Blocks along x, y, z; axes left out are 1.
            block: Threads along x, y, z, 1024 at most; axes left out are 1.
            arguments: The bytes of the kernel's argument structure. The memory that its pointers
                name must outlive the call.
            shared_bytes: Size of the dynamic shared memory.
            order: In which order threads and blocks take turns.

        Raises:
            ValueError: The grid, the block or the order is no such thing.
            KernelFault: The kernel does not exist, takes other arguments, or did what CUDA leaves
                undefined. What it wrote until then stays written.
        """
        sizes = [_axes(name, size) for name, size in (("grid", grid), ("block", block))]
        seed = {"forward": -1, "reverse": -2}.get(str(order), order)
        if not isinstance(seed, int) or (seed < 0 and seed == order):
            raise ValueError(f"order must be 'forward', 'reverse' or a seed from 0 up, got {order}")
        if 0 in sizes[0]:
            return
        with _ONE_AT_A_TIME:
            message = _launcher(self.library)(
                kernel.encode(), *sizes, arguments, len(arguments), shared_bytes, seed
            )
        if message:
            raise KernelFault(message.decode())


def build(
    name: str,
    *,
    defines: Mapping[str, int | str] = MappingProxyType({}),
    folder: Path = CUDA,
) -> Program:
    """Compile ``NAME.cu``, or find it compiled: libraries are kept on disk.

    In a process under AddressSanitizer (:mod:`isoform.kernels.emulate.sanitized`) the program is
    compiled with the sanitizers.

    Args:
        name: The file's name, without ``.cu``.
        defines: What ``-D`` defines.
        folder: Where the file and its own headers lie.

    Raises:
        HostCompilerUnavailable: No C++ compiler is found.
        CompilationFailed: It rejects the source.
    """
    command = _command(defines, folder)
    library = _kept(
        f"{name}.so",
        (Path(__file__), RUNTIME, *_sources(INCLUDE), *_sources(folder)),
        command,
        lambda library: _compile(command, folder / f"{name}.cu", library),
    )
    return Program(name, dict(defines), library)


def check(
    name: str,
    *,
    defines: Mapping[str, int | str] = MappingProxyType({}),
    folder: Path = CUDA,
) -> None:
    """Have the compiler read ``NAME.cu`` and make nothing: its types and its assertions hold.

    Args:
        name, defines, folder: As for :func:`build`, which takes ten times as long.

    Raises:
        HostCompilerUnavailable, CompilationFailed: As for :func:`build`.
    """
    source = str(folder / f"{name}.cu")
    command = _command(defines, folder)
    _run([*command, "-fsyntax-only", "-include", "cuda_emulator.h", "-x", "c++", source])


def host_compiler() -> str:
    """The C++ compiler: ``CXX`` if set, else g++, clang++ or c++.

    Raises:
        HostCompilerUnavailable: There is none.
    """
    chosen = os.environ.get("CXX")
    for program in [chosen] if chosen else ["g++", "clang++", "c++"]:
        if found := shutil.which(program):
            return found
    missing = f"CXX names {chosen}, which is not found" if chosen else "no C++ compiler is found"
    raise HostCompilerUnavailable(
        f"{missing}: install g++ or clang++ (Debian and Ubuntu: apt install g++), "
        "or set CXX to one, to emulate CUDA kernels"
    )


def sanitized() -> bool:
    """Whether this process runs under AddressSanitizer."""
    return hasattr(ctypes.CDLL(None), "__asan_init")


def _compiler() -> list[str]:
    """The compiler with the options that everything is compiled with."""
    return [host_compiler(), *_OPTIONS, *(_SANITIZERS if sanitized() else ())]


def _command(defines: Mapping[str, int | str], folder: Path) -> list[str]:
    """The compiler with its options, and where its headers are."""
    return [
        *_compiler(),
        *(f"-D{key}={value}" for key, value in sorted(defines.items())),
        *(f"-I{INCLUDE}", f"-I{folder}"),
    ]


_ONE_AT_A_TIME = threading.Lock()  # a library has one block's state, and ctypes lets threads run


def _axes(name: str, sizes: tuple[int, ...]) -> ctypes.Array[ctypes.c_uint]:
    """Sizes along x, y and z."""
    whole = (*sizes, 1, 1, 1)[:3]
    low = 1 if name == "block" else 0
    if not 1 <= len(sizes) <= 3 or not all(low <= size < 2**31 for size in whole):
        raise ValueError(f"{name} must have one to three sizes from {low} up, got {sizes}")
    return (ctypes.c_uint * 3)(*whole)


@cache
def _launcher(library: Path) -> ctypes._NamedFuncPointer:
    launcher = ctypes.CDLL(str(library)).isoform_launch
    launcher.restype = ctypes.c_char_p
    sizes = ctypes.POINTER(ctypes.c_uint)
    launcher.argtypes = [
        *(ctypes.c_char_p, sizes, sizes, ctypes.c_char_p),
        *(ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int64),
    ]
    return launcher


@cache
def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _sources(folder: Path) -> list[Path]:
    """What a change of must lead to another library."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _cache() -> Path:
    """Where compiled programs are kept: beside the GPU's machine code."""
    folder = cache_folder().parent / "emulate"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _kept(
    name: str, sources: Iterable[Path], command: list[str], make: Callable[[Path], object]
) -> Path:
    """The file of the cache that ``make`` makes of these sources by this command.

    If it is there, nothing is made; and it appears whole or not at all.
    """
    key = hashlib.sha256()
    for part in (_version(command[0]), *command, name):
        key.update(part.encode() + b"\0")
    for source in sources:
        key.update(source.read_bytes() + b"\0")
    stem, dot, kind = name.partition(".")
    file = _cache() / f"{stem}-{key.hexdigest()[:32]}{dot}{kind}"
    if file.exists():
        with suppress(FileNotFoundError, PermissionError):
            os.utime(file)  # used just now
        return file
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = Path(scratch) / name
        make(made)
        made.replace(file)
    forget_old(file.parent, CACHE_BYTES)
    return file


def _runtime() -> Path:
    """The compiled runtime."""
    command = [*_compiler(), f"-I{INCLUDE}"]
    return _kept(
        "runtime.o",
        (Path(__file__), RUNTIME, *_sources(INCLUDE)),
        command,
        lambda made: _run([*command, "-c", str(RUNTIME), "-o", str(made)]),
    )


def _compile(command: list[str], source: Path, library: Path) -> None:
    """Compile ``source`` to ``library``; what else is made lies beside it."""
    text = _run([*command, "-E", "-P", "-include", "cuda_emulator.h", "-x", "c++", str(source)])
    kernels = dict.fromkeys(_KERNEL.findall(text))
    entries = (
        f'    {{"{kernel}", isoform::emulate::Entry<&{kernel}>::bytes, '
        f"isoform::emulate::Entry<&{kernel}>::call}},"
        for kernel in kernels
    )
    if not kernels:
        raise CompilationFailed(f"{source.name} has no __global__ function")
    names = [_NAME.format(name=name) for name in dict.fromkeys(_DYNAMIC.findall(text))]
    unit, shared = (library.parent / name for name in ("unit.cpp", "shared.cpp"))
    unit.write_text(
        _UNIT.format(source=source.name, kernels="\n".join(entries), count=len(kernels))
    )
    shared.write_text(_SHARED.format(names="\n".join(names)))
    _run([*command, str(unit), str(shared), str(_runtime()), "-o", str(library)])


def _run(command: list[str]) -> str:
    """What a compiler prints, or its errors."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompilationFailed(f"{Path(command[0]).name} failed:\n{done.stderr.strip()}")
    return done.stdout

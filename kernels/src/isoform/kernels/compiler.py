"""From CUDA C++ to a running kernel, at first use: NVRTC, a disk cache, the assembler's report.

A source ``isoform/kernels/cuda/NAME.cu`` goes through three hands, and each is one function here:

1. :func:`compile_source` has NVRTC, NVIDIA's compiler as a library, make machine code (a *cubin*)
   of it for one architecture. This needs neither a GPU nor a driver, so that a machine without
   either can check that every variant of every kernel compiles.
2. :func:`cached` keeps that cubin on disk, so that the next process does not compile.
3. :func:`load` hands the cubin to the driver, once per process and device.

Variants of a source are chosen by preprocessor definitions (``defines``). Machine code, rather than
PTX for the driver to finish, because the driver's own assembler may be older than the compiler, and
because only an assembler that we run tells how many registers a kernel takes and whether it spills
them (:func:`resources`).

NVRTC is reached through CuPy, which users have already; it finds the library in the wheels of the
``cuda12`` and ``cuda13`` extras, in Conda, or in a CUDA toolkit, and the headers are looked for in
the same places by the same package, ``cuda.pathfinder``. Nothing is imported until it is needed.

Environment:
    ISOFORM_CACHE_DIR: where machine code is kept; else the user's cache directory.
    ISOFORM_LINEINFO: if not empty, machine code tells profilers which source line it comes from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from stat import S_ISREG
from types import MappingProxyType
from typing import Any

SOURCES = Path(__file__).parent / "cuda"
"""Where the kernels and their headers are."""

OLDEST = 70
"""Volta: the oldest architecture (70 stands for sm_70) that the kernels are written for."""

CACHE_BYTES = 64 * 2**20
"""How much the disk cache keeps, of cubins of up to half a megabyte; the least recently used go."""

INSTALL = (
    "install isoform[cuda13], or isoform[cuda12] where the driver is of CUDA 12 (the first lines "
    "of nvidia-smi tell)"
)

SPECIFIC = frozenset(
    f"evoformer_warpgroup_{name}"
    for name in (
        *("forward", "backward_query", "backward_key", "backward_pair_bias"),
        "backward_query_pair",
    )
)
"""Sources with instructions that one architecture has and its successors do not: they are compiled
for ``sm_90a`` where others are for ``sm_90``."""

CUT_OFF = b"\0"
"""The last byte of machine code, which CuPy takes for the end of a C string and does not return.

It belongs to the last program header, and is 0. Drivers load a file without it; ``nvdisasm`` and
other readers of ELF files say that it is damaged. One byte too many harms nobody.
"""

REFUSED_BY_DRIVER = frozenset(
    {
        "CUDA_ERROR_INVALID_IMAGE",
        "CUDA_ERROR_NO_BINARY_FOR_GPU",
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
    }
)

Define = int | str
NOTHING: Mapping[str, Define] = MappingProxyType({})


class CompilerUnavailable(RuntimeError):
    """Kernels cannot be compiled or loaded on this machine as it is; the message has the remedy."""


class CompileError(RuntimeError):
    """A source does not compile; the message is the compiler's, with file names and lines."""


@dataclass(frozen=True)
class Compiled:
    """Machine code of one variant of one source.

    Attributes:
        name: The source: ``NAME.cu``.
        architecture: What it runs on, e.g. ``"sm_90"``.
        defines: The preprocessor definitions that chose the variant.
        cubin: The machine code, an ELF file.
        log: What compiler and assembler said: warnings, and what :func:`resources` reads.
    """

    name: str
    architecture: str
    defines: Mapping[str, Define]
    cubin: bytes
    log: str


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of the GPU, as its assembler reports it.

    Attributes:
        registers: Registers per thread. 0 for a function that was not inlined: its registers are
            counted in the kernels that call it.
        spill_stores: Bytes per thread written to memory for want of registers.
        spill_loads: Bytes per thread read back.
        shared_bytes: Shared memory per block that the source declares; what a launch asks for
            (``extern __shared__``) comes on top.
        stack_bytes: Local memory per thread: spills, and arrays that registers cannot index.
    """

    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0


@dataclass(frozen=True)
class Toolkit:
    """The compiler and the headers found on this machine.

    Attributes:
        nvrtc: CuPy's bindings of NVRTC.
        version: The compiler's, e.g. ``(13, 0)``.
        architectures: What it compiles for, e.g. ``(75, 80, 90)``.
        include: The folders with the CUDA headers.
        headers: The headers' version.
    """

    nvrtc: Any
    version: tuple[int, int]
    architectures: tuple[int, ...]
    include: tuple[str, ...]
    headers: tuple[int, int]


# --- What there is to compile ---------------------------------------------------------------------


def sources(name: str) -> dict[str, str]:
    """The text of ``NAME.cu`` and of every header of the folder that it includes, by file name.

    The compiler is given these texts and no folder to look in, so that what is compiled is what the
    cache's key was made of. A header that is not in the folder is the toolkit's.

    Raises:
        FileNotFoundError: There is no such kernel.
    """
    if not (SOURCES / f"{name}.cu").is_file():
        there = ", ".join(sorted(path.stem for path in SOURCES.glob("*.cu"))) or "none"
        raise FileNotFoundError(f"no kernel source {name}.cu in {SOURCES}; there are: {there}")
    texts: dict[str, str] = {}
    wanted = [f"{name}.cu"]
    while wanted:
        file = wanted.pop()
        if file not in texts and (SOURCES / file).is_file():
            texts[file] = (SOURCES / file).read_text(encoding="utf-8")
            wanted += re.findall(r'^\s*#\s*include\s+"([^"]+)"', texts[file], re.MULTILINE)
    return texts


def options(architecture: str, defines: Mapping[str, Define] = NOTHING) -> tuple[str, ...]:
    """What the compiler is told, apart from where the toolkit's headers are.

    Arithmetic is IEEE's, NVRTC's default: there is no ``--use_fast_math`` here, and what a kernel
    wants approximated it says itself, at the place.
    """
    lines = ("--generate-line-info",) if os.environ.get("ISOFORM_LINEINFO") else ()
    return (
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        "--ptxas-options=--verbose",
        *lines,
        *(f"--define-macro={key}={value}" for key, value in sorted(defines.items())),
    )


# --- What there is to compile with ----------------------------------------------------------------


@cache
def toolkit() -> Toolkit:
    """The compiler and the headers of this machine.

    Raises:
        CompilerUnavailable: CuPy, NVRTC or the headers are missing, or do not fit one another.
    """
    cupy = _cupy()
    if cupy.cuda.runtime.is_hip:
        raise CompilerUnavailable(f"this CuPy is built for ROCm, not CUDA: {INSTALL}")
    try:
        from cuda.pathfinder import find_nvidia_header_directory
        from cupy.cuda import nvrtc

        version = nvrtc.getVersion()
        architectures = tuple(nvrtc.getSupportedArchs())
    except ImportError as error:
        raise CompilerUnavailable(
            f"CuPy {cupy.__version__} is too old, 14.0 or newer is needed ({error}): {INSTALL}"
        ) from error
    except RuntimeError as error:  # CuPy's word for a library that it cannot open
        reason = str(error).partition("\n")[0]
        raise CompilerUnavailable(
            f"NVRTC, CUDA's compiler, is missing ({reason}): {INSTALL}"
        ) from error

    # CUDA 13 ships CCCL's headers (cuda/std/...) in a folder of their own.
    found = {part: find_nvidia_header_directory(part) for part in ("cudart", "cccl")}
    if missing := [part for part, folder in found.items() if folder is None]:
        raise CompilerUnavailable(
            f"the CUDA headers of {' and '.join(missing)} are missing: install "
            f"isoform[cuda{version[0]}], or set CUDA_PATH to a toolkit of CUDA {version[0]}"
        )
    include = tuple(dict.fromkeys(str(folder) for folder in found.values()))
    headers = _headers_version(Path(include[0]))
    if headers[0] != version[0]:
        raise CompilerUnavailable(
            f"NVRTC is of CUDA {_dotted(version)}, and the headers found first, in {include[0]}, "
            f"of CUDA {_dotted(headers)}: keep the wheels of one CUDA version in this environment"
        )
    return Toolkit(nvrtc, version, architectures, include, headers)


def check_architecture(architecture: str, known: Toolkit) -> None:
    """Refuse what the kernels are not written for, or what the compiler does not know.

    Raises:
        ValueError: That is no architecture.
        CompilerUnavailable: The GPU, or the compiler, is too old for the other.
    """
    parts = re.fullmatch(r"sm_(\d{2,3})[af]?", architecture)
    if parts is None:
        raise ValueError(f"architecture is {architecture!r}, and must be like 'sm_90' or 'sm_90a'")
    number = int(parts[1])
    if number < OLDEST:
        raise CompilerUnavailable(
            f"{architecture} is too old: the kernels need sm_{OLDEST} (Volta) or newer. "
            "isoform.reference.torch runs on any device"
        )
    if number not in known.architectures:
        compiler = f"NVRTC of CUDA {_dotted(known.version)}"
        if number < min(known.architectures):
            remedy = "CUDA 13 dropped GPUs older than sm_75: install isoform[cuda12]"
        else:
            remedy = f"upgrade the NVRTC wheel, or {INSTALL}"
        raise CompilerUnavailable(f"{compiler} does not compile for {architecture}: {remedy}")


# --- Compile, keep, load --------------------------------------------------------------------------


def compile_source(
    name: str, *, architecture: str, defines: Mapping[str, Define] = NOTHING
) -> Compiled:
    """Compile ``NAME.cu`` to machine code. No GPU and no driver are needed.

    Args:
        name: The source's name, without ``.cu``.
        architecture: For what to compile, e.g. ``"sm_90"``.
        defines: Preprocessor definitions, which choose the variant.

    Raises:
        FileNotFoundError: There is no such source.
        ValueError: ``architecture`` is not one.
        CompilerUnavailable: There is no compiler, or it does not know the architecture.
        CompileError: The source does not compile.
    """
    texts = sources(name)
    known = toolkit()
    check_architecture(architecture, known)
    nvrtc = known.nvrtc
    main = f"{name}.cu"
    headers = {file: text for file, text in texts.items() if file != main}
    program = nvrtc.createProgram(
        texts[main],
        main,
        [text.encode() for text in headers.values()],
        [file.encode() for file in headers],
    )
    include = (f"--include-path={folder}" for folder in known.include)
    try:
        nvrtc.compileProgram(program, [*options(architecture, defines), *include])
        return Compiled(
            name,
            architecture,
            dict(defines),
            bytes(nvrtc.getCUBIN(program)) + CUT_OFF,
            _log(nvrtc, program),
        )
    except nvrtc.NVRTCError as error:
        variant = " ".join([architecture, *(f"{key}={value}" for key, value in defines.items())])
        raise CompileError(f"{main} ({variant}): {error}\n{_log(nvrtc, program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def cached(name: str, *, architecture: str, defines: Mapping[str, Define] = NOTHING) -> Path:
    """A file with the machine code of ``NAME.cu``, compiled if the disk cache does not have it.

    A file's name is made of the key, a hash of all that the compiler reads, and of a hash of the
    content: one that was cut short is known by that, and made anew. Writing is a rename, so that
    any number of processes may compile the same at the same time, and each reads what it or another
    has written whole.

    Raises:
        FileNotFoundError, ValueError, CompilerUnavailable, CompileError: As for
            :func:`compile_source`; the third also if the cache cannot be written.
    """
    key = _key(name, architecture, defines)
    for file in cache_folder().glob(f"*.{key}.*.cubin"):
        with suppress(FileNotFoundError):  # another process may just have made room
            if file.name.split(".")[-2] == _hash(file.read_bytes()):
                with suppress(PermissionError):  # a cache shared read-only is as good
                    os.utime(file)
                return file
    return keep(compile_source(name, architecture=architecture, defines=defines))


def keep(compiled: Compiled) -> Path:
    """Put machine code into the disk cache, and return its file.

    Raises:
        CompilerUnavailable: The cache cannot be written.
    """
    folder = cache_folder()
    key = _key(compiled.name, compiled.architecture, compiled.defines)
    file = folder / f"{compiled.name}.{compiled.architecture}.{key}.{_hash(compiled.cubin)}.cubin"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as unfinished:
            unfinished.write(compiled.cubin)
        Path(unfinished.name).replace(file)
    except OSError as error:
        raise CompilerUnavailable(
            f"compiled kernels cannot be kept in {folder} ({error}): set ISOFORM_CACHE_DIR to a "
            "folder that can be written"
        ) from error
    forget_old(folder, CACHE_BYTES)
    return file


def _key(name: str, architecture: str, defines: Mapping[str, Define]) -> str:
    """A hash of all that the compiler reads."""
    known = toolkit()
    told = [sources(name), options(architecture, defines), known.version, known.headers]
    return _hash(json.dumps(told, sort_keys=True).encode())


def cache_folder() -> Path:
    """Where machine code is kept: under :func:`cache_root`."""
    return cache_root() / "kernels"


def cache_root() -> Path:
    """``ISOFORM_CACHE_DIR``, or isoform's folder in the user's cache directory."""
    if chosen := os.environ.get("ISOFORM_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "isoform"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isoform"


def forget_old(folder: Path, most: int) -> None:
    """Remove the least recently used files of ``folder`` until the rest take ``most`` bytes."""
    files: list[tuple[float, int, Path]] = []
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # another process is removing files too
            about = file.stat()
            if S_ISREG(about.st_mode):
                files.append((about.st_mtime, about.st_size, file))
    kept = 0
    for _, size, file in sorted(files, reverse=True):
        kept += size
        if kept > most:
            file.unlink(missing_ok=True)


_LOADED: dict[tuple[int, str, tuple[tuple[str, Define], ...]], Any] = {}


def load(name: str, *, defines: Mapping[str, Define] = NOTHING) -> Any:
    """The kernels of ``NAME.cu`` as a ``cupy.RawModule``, loaded on the current device.

    The first call in a process reads the disk cache, or compiles; further ones look into a
    dictionary. The first call must not be made while a CUDA graph is captured.

    Raises:
        FileNotFoundError, ValueError, CompilerUnavailable, CompileError: As for :func:`cached`;
            the third also if there is no GPU, or its driver is too old.
    """
    cupy = _cupy()
    runtime = cupy.cuda.runtime
    try:
        device = runtime.getDevice()
    except runtime.CUDARuntimeError as error:
        raise CompilerUnavailable(_why_no_device(runtime, error)) from error
    key = (device, name, tuple(sorted(defines.items())))
    if key not in _LOADED:
        architecture = f"sm_{cupy.cuda.Device(device).compute_capability}"
        architecture += "a" if name in SPECIFIC else ""
        module = cupy.RawModule(path=str(cached(name, architecture=architecture, defines=defines)))
        try:
            module.compile()  # CuPy's word for: have the driver load it, now
        except cupy.cuda.driver.CUDADriverError as error:
            if str(error).partition(":")[0] not in REFUSED_BY_DRIVER:
                raise
            raise CompilerUnavailable(
                f"the driver, of CUDA {_decimal(runtime.driverGetVersion())}, refuses machine code "
                f"made by NVRTC of CUDA {_dotted(toolkit().version)} ({error}): update the driver, "
                "or install NVRTC and header wheels of the driver's version"
            ) from error
        _LOADED[key] = module
    return _LOADED[key]


# --- The assembler's report -----------------------------------------------------------------------

_FUNCTION = re.compile(r"Function properties for '?([^\s']+)")
_MEMORY = re.compile(r"(\d+) bytes (stack frame|spill stores|spill loads)")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def resources(log: str) -> dict[str, Resources]:
    """Read what each kernel takes from the assembler's report, by the kernel's name.

    A function that was not inlined has a line too: it may spill on its own account.
    """
    figures: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in log.splitlines():
        if function := _FUNCTION.search(line):
            current = figures.setdefault(function[1], {})
        for number, what in _MEMORY.findall(line):
            attribute = "stack_bytes" if what == "stack frame" else what.replace(" ", "_")
            current[attribute] = int(number)
        if registers := _REGISTERS.search(line):
            current["registers"] = int(registers[1])
            if shared := _SHARED.search(line):
                current["shared_bytes"] = int(shared[1])
    return {name: Resources(**numbers) for name, numbers in figures.items()}


def warnings(log: str) -> list[str]:
    """The warnings among what compiler and assembler said."""
    return [line.strip() for line in log.splitlines() if re.search(r"\bwarning\b", line)]


# --- Small parts ----------------------------------------------------------------------------------


def _cupy() -> Any:
    """CuPy, or what to do about it."""
    try:
        import cupy
    except ImportError as error:
        raise CompilerUnavailable(f"CuPy cannot be imported ({error}): {INSTALL}") from error
    return cupy


def _log(nvrtc: Any, program: Any) -> str:
    """What was said about a program, without the C string's end."""
    text: str = nvrtc.getProgramLog(program)
    return text.rstrip("\0\n ")


def _why_no_device(runtime: Any, error: Exception) -> str:
    """Why CUDA does not start, and what helps."""
    driver, wanted = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if driver == 0:
        return (
            "there is no NVIDIA driver on this machine, so that kernels can be compiled but not "
            "run: install the driver (nvidia-smi shows it), or use isoform.reference.torch"
        )
    if driver // 1000 < wanted // 1000:
        return (
            f"the driver is of CUDA {_decimal(driver)} and this CuPy of CUDA {_decimal(wanted)}: "
            f"uninstall this CuPy and install isoform[cuda{driver // 1000}], or update the driver"
        )
    return f"no GPU can be used ({error}): see whether CUDA_VISIBLE_DEVICES hides it"


def _headers_version(include: Path) -> tuple[int, int]:
    """The CUDA version that the headers state."""
    text = (include / "cuda_runtime_api.h").read_text(encoding="utf-8", errors="replace")
    number = re.search(r"^#define\s+CUDART_VERSION\s+(\d+)", text, re.MULTILINE)
    if number is None:
        raise CompilerUnavailable(f"the CUDA headers in {include} are damaged: {INSTALL}")
    return int(number[1]) // 1000, int(number[1]) % 1000 // 10


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _decimal(version: int) -> str:
    """``13020``, as CUDA's runtime counts, is 13.2."""
    return f"{version // 1000}.{version % 1000 // 10}"

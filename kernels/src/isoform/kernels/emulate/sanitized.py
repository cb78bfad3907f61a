"""``python -m isoform.kernels.emulate.sanitized ARGUMENTS``: Python under AddressSanitizer.

Emulated kernels are compiled with AddressSanitizer and UndefinedBehaviorSanitizer there. Their run
time must be in the process before anything allocates memory, so it is preloaded and Python is
started anew. Arrays that NumPy makes then have guarded borders, and a kernel that steps over one
ends the process with a report that names the line of the kernel.

For example ``python -m isoform.kernels.emulate.sanitized -m pytest kernels/tests``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from isoform.kernels.emulate.program import HostCompilerUnavailable, host_compiler


def environment(reports: Path) -> dict[str, str]:
    """The environment variables that a sanitized process is started with.

    Args:
        reports: How the files begin that the sanitizers write their reports to.

    Raises:
        HostCompilerUnavailable: There is no C++ compiler, or it has no AddressSanitizer to preload.
    """
    compiler = host_compiler()
    asked = [compiler, "-print-file-name=libasan.so"]
    runtime = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    if not runtime.is_absolute():
        raise HostCompilerUnavailable(
            f"{compiler} has no libasan.so: install g++ with its sanitizers (Debian and Ubuntu: "
            "apt install g++), or set CXX to such a g++"
        )
    return os.environ | {
        "LD_PRELOAD": str(runtime.resolve()),
        # Python frees little at its end: leaks are not looked for
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={reports}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={reports}",
        "PYTHONMALLOC": "malloc",
    }


def main(arguments: Sequence[str]) -> int:
    """Run Python with ``arguments``; its exit status, or 1 where a sanitizer found a fault."""
    with tempfile.TemporaryDirectory() as folder:
        # to files, since a program that is ended may have kept its standard error to itself
        command = [sys.executable, *arguments]
        env = environment(Path(folder) / "report")
        status = subprocess.run(command, env=env, check=False).returncode
        reports = sorted(Path(folder).iterdir())
        for report in reports:
            sys.stderr.write(report.read_text())
        return status or int(bool(reports))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

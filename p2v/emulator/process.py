"""The QEMU program: found, asked its version, and started so that it never outlives its parent."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from p2v.errors import EmulatorError

_NAME = "qemu-system-x86_64"

# Runs in a small interpreter between us and QEMU. PR_SET_PDEATHSIG (1) with SIGKILL (9): the kernel ends QEMU when the thread that
# started it ends, however that happens (prctl(2)); the parent is compared afterwards because it may have died before the call.
# A setting made in the child is the only race-free place, and a Python function between fork and exec is not safe with threads.
_GUARD = """
import ctypes, os, resource, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """An installed QEMU."""

    path: Path
    version: tuple[int, int, int]
    version_text: str


@functools.cache
def find_program() -> Program:
    """The QEMU that is installed for x86-64 machines; ``EmulatorError`` with the package to install if there is none."""
    found = shutil.which(_NAME)
    if found is None:
        raise EmulatorError(
            f"{_NAME} is not installed",
            advice="install QEMU (Debian, Ubuntu: apt-get install qemu-system-x86; Fedora: dnf install qemu-system-x86-core)",
        )
    try:
        answer = subprocess.run([found, "--version"], capture_output=True, timeout=30, check=False, text=True).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EmulatorError(f"{found} does not start: {error}", advice="install QEMU again") from error
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", answer)
    if match is None:
        raise EmulatorError(f"{found} does not tell its version: {answer[:80]!r}", advice="install QEMU again")
    version = (int(match[1]), int(match[2]), int(match[3] or 0))
    return Program(path=Path(found), version=version, version_text=answer.splitlines()[0])


def guarded(
    argv: Sequence[str],
    *,
    pass_fds: Sequence[int] = (),
    stderr: int | IO[bytes],
    stdout: int | IO[bytes] = subprocess.DEVNULL,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``argv`` so that it is killed when the calling *thread* ends; that thread must outlive the process.

    The process has a session of its own: Ctrl-C at a terminal reaches us, and we end it in order.
    """
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), *argv],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
        )
    except OSError as error:
        raise EmulatorError(
            f"{argv[0]} cannot be started: {error}", advice="check memory and process limits"
        ) from error

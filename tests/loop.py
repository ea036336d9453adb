"""Block devices made of files."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def loop_device(path: Path, *, writable: bool = False) -> Iterator[str]:
    """A loop device over the file, read-only unless ``writable``; skips the test where there are none."""
    words = ["losetup", "--find", "--show", *([] if writable else ["--read-only"])]
    made = subprocess.run([*words, path], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop devices here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)

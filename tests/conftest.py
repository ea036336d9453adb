"""Fixtures that every test may use."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Tests assert no times: a busy computer is no defect.
settings.register_profile("any-computer", deadline=None)
settings.load_profile("any-computer")

# A shell starts what runs in its background with SIGINT ignored, and every program started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.machines.fixture"]


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 8 MiB: full after little."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.decode(errors='replace').strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)

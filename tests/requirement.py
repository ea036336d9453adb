"""What a test needs from the computer it runs on: a missing part is a visible skip that names it."""

from __future__ import annotations

import os
import shutil

import pytest


def missing(*programs: str) -> tuple[str, ...]:
    """Return those of `programs` that are found neither on PATH nor in the system administrator's folders."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return tuple(program for program in programs if shutil.which(program, path=path) is None)


def needs(*programs: str) -> pytest.MarkDecorator:
    """Mark a test (or, as `pytestmark`, a module) as needing `programs`; the skip names those that are missing."""
    absent = missing(*programs)
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


def needs_root() -> pytest.MarkDecorator:
    """Mark a test as needing root privileges."""
    return pytest.mark.skipif(os.geteuid() != 0, reason="needs root privileges")

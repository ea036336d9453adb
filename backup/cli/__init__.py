"""The ``p2v-backup`` command. Thin: parse, open the repository, call the verb, show the result."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from backup.cli import care, drill, keys, points, restore, store
from backup.cli.base import app
from p2v.cli import run_app


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``p2v-backup`` command; ends the process with the run's exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return run_app(app, arguments)


__all__ = ["app", "care", "drill", "keys", "main", "points", "restore", "run", "store"]

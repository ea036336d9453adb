"""The ``p2v-backup`` command. Thin: parse, open the repository, call the verb, show the result."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import cyclopts

from backup.cli import care, keys, points, restore, store
from backup.cli.base import app
from formats.errors import UsageError
from p2v.console import Console


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``p2v-backup`` command; ends the process with the run's exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        result = app(list(arguments), exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        name = next((word for word in arguments[:1] if not word.startswith("-")), "p2v-backup")
        usage = UsageError(str(error).strip(), advice="See: p2v-backup --help")
        return Console(json_output="--json" in arguments).finish(name, usage)
    return result if isinstance(result, int) else 0


__all__ = ["app", "care", "keys", "main", "points", "restore", "run", "store"]

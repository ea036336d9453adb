"""The ``p2v-backup`` command: nothing can be backed up yet, and it says so."""

from __future__ import annotations

import sys
from importlib import metadata

import cyclopts

from formats.errors import UsageError
from p2v.console import Console

app = cyclopts.App(
    name="p2v-backup",
    version=lambda: metadata.version("p2v-toolkit"),
    help="Back machines up into a repository, and prove that they come back. Nothing of it is there yet: see the README.",
)


@app.default
def nothing_yet(*_words: str) -> int:
    """Say that there is no repository yet; exit code 2."""
    error = UsageError("p2v-backup cannot back anything up yet", advice="`p2v convert` copies a machine as it is now.")
    return Console().finish("p2v-backup", error)


def main() -> None:
    """Entry point of the ``p2v-backup`` command."""
    sys.exit(app(result_action="return_value"))

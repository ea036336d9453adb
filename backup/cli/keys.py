"""Commands for the passwords and the paper key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from backup.cli.base import OUTPUT, PLACE, Place, key
from formats.errors import UsageError
from p2v.cli import Output, perform
from p2v.console import Console

if TYPE_CHECKING:
    pass


@key.command(name="add")
def key_add(*, label: str = "", place: Place = PLACE, output: Output = OUTPUT) -> int:
    """Add a password; it comes from P2V_NEW_PASSWORD (or _FILE, _COMMAND), else the terminal is asked."""

    def action(console: Console) -> None:
        from backup.place import open_repository, password

        with open_repository(place.repo, notice=console.notice) as repository:
            name = repository.add_key(password("P2V_NEW_PASSWORD", "new password: ", twice=True), label=label)
        console.data["key"] = name
        console.say(f"key {name[:8]} added")

    return perform("key add", output, action)


@key.command(name="list")
def key_list(*, place: Place = PLACE, output: Output = OUTPUT) -> int:
    """List the keys."""

    def action(console: Console) -> None:
        from backup.place import open_repository

        with open_repository(place.repo, notice=console.notice) as repository:
            found = repository.list_keys()
        console.data["keys"] = [{"id": name, "label": label, "created": created} for name, label, created in found]
        console.table(["key", "label", "created"], [[name[:8], label, created] for name, label, created in found])

    return perform("key list", output, action)


@key.command(name="remove")
def key_remove(name: str, /, *, place: Place = PLACE, output: Output = OUTPUT) -> int:
    """Remove a password. Whoever opened the repository with it before may still know the master key."""

    def action(console: Console) -> None:
        from backup.place import open_repository

        with open_repository(place.repo, notice=console.notice) as repository:
            removed = repository.remove_key(name)
        console.data["key"] = removed
        console.say(f"key {removed[:8]} removed")

    return perform("key remove", output, action)


@key.command(name="export")
def key_export(
    *,
    destination: Annotated[Path, Parameter(name="--output", alias="-o")],
    place: Place = PLACE,
    output: Output = OUTPUT,
) -> int:
    """Write the paper key to a new file: print it and keep it in a safe. It opens the repository as if it were a password.

    Parameters
    ----------
    destination
        new file; only you may read it.
    """

    def action(console: Console) -> None:
        from backup.place import open_repository

        with open_repository(place.repo, notice=console.notice) as repository:
            text = f"p2v-toolkit repository {repository.config.id}\n{repository.keyring.paper()}\n"
        try:
            with open(destination, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(text)
        except OSError as error:
            raise UsageError(f"{destination} cannot be written: {error.strerror}", advice="Name a new file.") from None
        console.data["file"] = str(destination)
        console.say(
            f"the second line of {destination} is the paper key; it opens everything: print it and remove the file"
        )

    return perform("key export", output, action)

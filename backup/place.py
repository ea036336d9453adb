"""What ``--repo`` means: opening the store and the repository that it names."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from backup.errors import RepositoryMissingError
from backup.repository import Repository
from backup.store.base import Store
from backup.store.local import LocalStore
from formats.errors import UsageError
from p2v.config import Secret, secret

VARIABLE = "P2V_REPOSITORY"


def open_store(place: str, *, make: bool = False) -> Store:
    """The store at ``place`` (empty: what ``P2V_REPOSITORY`` says). With ``make`` its folder is made.

    ``UsageError`` when nothing is named, ``RepositoryMissingError`` when there is nothing.
    """
    named = place or os.environ.get(VARIABLE, "")
    if not named:
        raise UsageError("no repository is named", advice=f"Give -r/--repo, or set {VARIABLE}.")
    if "://" in named:
        scheme = named.split(":", 1)[0]
        raise UsageError(f"repositories cannot lie on {scheme} yet", advice="Name a directory.")
    root = Path(named)
    try:
        if make:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        elif not root.is_dir():
            raise RepositoryMissingError(
                f"there is no repository at {root}", advice="Make one with `p2v-backup init`.", subject=str(root)
            )
    except OSError as error:
        raise UsageError(f"{root} cannot be used: {error.strerror}", advice="Choose another place.") from None
    return LocalStore(root)


def password(
    name: str = "P2V_PASSWORD", prompt: str = "password of the repository: ", *, twice: bool = False
) -> Secret:
    """The password from the environment, else asked for on the terminal. ``UsageError`` where there is neither."""
    if (given := secret(name)) is not None:
        return given
    if not sys.stdin.isatty():
        raise UsageError("the repository's password is needed", advice=f"Set {name}, {name}_FILE or {name}_COMMAND.")
    from getpass import getpass

    typed = getpass(prompt)
    if twice and getpass("again: ") != typed:
        raise UsageError("the two passwords differ")
    return Secret(typed)


@contextlib.contextmanager
def open_repository(place: str, *, level: int = 3) -> Iterator[Repository]:
    """Open the repository at ``place`` with the password from the environment or terminal."""
    store = open_store(place)
    with contextlib.closing(store):
        Repository.require(store)  # before a password is asked for
        home = os.environ.get("XDG_CACHE_HOME")
        cache = (Path(home) if home else Path.home() / ".cache") / "p2v-toolkit" / "repositories"
        repository = Repository.open(store, password(), level=level, cache=cache)
        with contextlib.closing(repository):
            yield repository

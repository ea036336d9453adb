"""What ``--repo`` means: opening the store and the repository that it names."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from backup.errors import RepositoryMissingError
from backup.repository import Repository
from backup.store.base import Store
from backup.store.local import LocalStore
from backup.witness import Witness
from formats.errors import Notice, UsageError
from p2v.config import Secret, secret

VARIABLE = "P2V_REPOSITORY"


def named_place(place: str) -> str:
    """``place``, or what ``P2V_REPOSITORY`` says where it is empty; ``UsageError`` when nothing is named."""
    named = place or os.environ.get(VARIABLE, "")
    if not named:
        raise UsageError("no repository is named", advice=f"Give -r/--repo, or set {VARIABLE}.")
    return named


def open_store(
    place: str, *, make: bool = False, identity: Path | None = None, known_hosts: Path | None = None
) -> Store:
    """The store at ``place`` (empty: what ``P2V_REPOSITORY`` says): a directory, or ``sftp://USER@HOST:PORT/FOLDER``. With ``make`` its
    folder is made. ``identity`` and ``known_hosts`` are for SFTP, instead of what SSH's own configuration says.

    ``UsageError`` when nothing is named, ``RepositoryMissingError`` when there is nothing.
    """
    named = named_place(place)
    if named.startswith("sftp://"):
        return _over_sftp(named, make, identity, known_hosts)
    if "://" in named:
        scheme = named.split(":", 1)[0]
        raise UsageError(
            f"repositories cannot lie on {scheme} yet", advice="Name a directory, or sftp://USER@HOST/FOLDER."
        )
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


def _over_sftp(named: str, make: bool, identity: Path | None, known_hosts: Path | None) -> Store:
    from backup.store.sftp import SftpStore
    from p2v.session import Session, SshTarget
    from p2v.session.sftp import RemoteFiles

    host, slash, folder = named.removeprefix("sftp://").partition("/")
    if not slash or not folder.strip("/") or ":" in host.rpartition("@")[0]:
        raise UsageError(
            "an SFTP repository is named sftp://USER@HOST:PORT/FOLDER",
            advice="The password comes from P2V_SSH_PASSWORD, or from a key of SSH's own configuration.",
        )
    target = SshTarget.parse(
        f"ssh://{host}", identity=identity, known_hosts=known_hosts, password=secret("P2V_SSH_PASSWORD")
    )
    session = Session.connect(target)
    root = f"/{folder}".rstrip("/")
    try:
        files = RemoteFiles(session)
        if make:
            files.make_folder(root)
        next(files.list_folder(root), None)
        files.close()
    except FileNotFoundError:
        session.close()
        raise RepositoryMissingError(
            f"there is no repository at {named}", advice="Make one with `p2v-backup init`.", subject=named
        ) from None
    except OSError as error:
        session.close()
        raise UsageError(f"{named} cannot be used: {error}", advice="Choose another folder.") from None
    return SftpStore(session, root)


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
def open_repository(
    place: str,
    *,
    notice: Callable[[Notice], None] = lambda _: None,
    level: int = 3,
    variable: str = "P2V_PASSWORD",
    prompt: str = "password of the repository: ",
) -> Iterator[Repository]:
    """Open the repository at ``place`` with the password from the environment's ``variable`` or the terminal.

    ``notice`` is told when points are gone that were there the last time (``backup.witness``); another repository than the last time
    raises ``RepositoryError``.
    """
    store = open_store(place)
    with contextlib.closing(store):
        config = Repository.require(store)  # before a password is asked for
        witness = Witness.usual(named_place(place))
        witness.recognise(config)
        home = os.environ.get("XDG_CACHE_HOME")
        cache = (Path(home) if home else Path.home() / ".cache") / "p2v-toolkit" / "repositories"
        repository = Repository.open(store, password(variable, prompt), level=level, cache=cache)
        with contextlib.closing(repository):
            for found in witness.compare(repository):
                notice(found)
            yield repository
            witness.remember(repository)

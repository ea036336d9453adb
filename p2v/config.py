"""Secrets and settings from the environment; what job files and the command line share."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from formats.errors import UsageError

FREEZE_SECONDS = 60
"""No file system of a source stays frozen longer than this, unless its administrator allows it."""

_SECRET_LIMIT = 64 * 1024  # bytes: a file that is longer is no password file
_COMMAND_SECONDS = 60


class Secret:
    """A password in memory. It shows itself in no ``repr``, log, traceback or comparison message."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The password itself, for the one call that needs it."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> str:
        raise TypeError("a secret is not serialised")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)


def secret(name: str, environment: Mapping[str, str] | None = None) -> Secret | None:
    """The secret called ``name`` (as ``P2V_SSH_PASSWORD``), or None when it is given nowhere.

    The first that is set wins: ``NAME``, ``NAME_FILE`` (first line of that file), ``NAME_COMMAND`` (first line that the command prints).
    ``UsageError`` when a file cannot be read or a command fails; neither its content nor its output is shown.
    """
    env = os.environ if environment is None else environment
    if name in env:
        return Secret(env[name])
    if path := env.get(f"{name}_FILE"):
        return _from_file(f"{name}_FILE", Path(path))
    if command := env.get(f"{name}_COMMAND"):
        return _from_command(f"{name}_COMMAND", command)
    return None


def _from_file(variable: str, path: Path) -> Secret:
    try:
        with path.open("rb") as stream:
            content = stream.read(_SECRET_LIMIT + 1)
    except OSError as error:
        raise UsageError(
            f"{variable} names {path}, which cannot be read: {error.strerror}",
            advice="Name a readable file whose first line is the password.",
        ) from None
    return _first_line(variable, content)


def _from_command(variable: str, command: str) -> Secret:
    try:
        done = subprocess.run(
            shlex.split(command), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=_COMMAND_SECONDS, check=True
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UsageError(
            f"the command in {variable} failed ({type(error).__name__})",
            advice="Run it by hand: it must print the password on its first line and end with exit code 0.",
        ) from None
    return _first_line(variable, done.stdout)


def _first_line(variable: str, content: bytes) -> Secret:
    if len(content) > _SECRET_LIMIT:
        raise UsageError(f"{variable} gives more than {_SECRET_LIMIT} bytes, which is no password")
    try:
        line = content.split(b"\n", 1)[0].rstrip(b"\r").decode()
    except UnicodeDecodeError:
        raise UsageError(f"{variable} gives bytes that are not UTF-8") from None
    if not line:
        raise UsageError(f"{variable} gives an empty first line", advice="Put the password on the first line.")
    return Secret(line)

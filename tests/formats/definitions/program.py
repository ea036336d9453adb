"""Runs a definition that is a script, in a shell in which the platform's program notes what it is asked for."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from formats.definitions import DefinedDisk

_PROGRAM = """#!/bin/sh
for word in {name} "$@"; do printf '%s\\0' "$word"; done >>"$LOG"; printf '\\n' >>"$LOG"
case "$FAIL" in "$1") exit 1;; esac
"""


def asked_of(
    name: str,
    folder: Path,
    text: str,
    disks: Sequence[DefinedDisk],
    *words: str,
    fail: str = "",
    code: int = 0,
    programs: Mapping[str, str] | None = None,
) -> list[list[str]]:
    """The commands that the script ``text`` gives to the program ``name``; its verb ``fail`` fails. The script ends with ``code``."""
    programs_folder, place = folder / "bin", folder / "a folder"
    for made in (programs_folder, place):
        made.mkdir(exist_ok=True)
    for program, content in {name: _PROGRAM.format(name=name), **(programs or {})}.items():
        (programs_folder / program).write_text(content)
        (programs_folder / program).chmod(0o755)
    for disk in disks:
        (place / disk.file).touch()
    (place / "machine.sh").write_text(text)
    log = folder / "log"
    log.write_bytes(b"")
    environment = {"PATH": f"{programs_folder}:/usr/bin:/bin", "LOG": str(log), "FAIL": fail}
    script = ["sh", str(place / "machine.sh"), *words]
    ran = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == code, ran.stderr
    return [line.decode().rstrip("\0").split("\0") for line in log.read_bytes().split(b"\0\n") if line]

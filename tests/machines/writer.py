"""The writer: a process on the source that keeps changing files, so that a copy's consistency can be judged.

What the writer acknowledged before a snapshot was taken must be in the copy, whole. The acknowledgements are kept here,
outside the machine. `verify_command` gives the check to run on the source, or on what was made of it.
"""

from __future__ import annotations

import shlex
import subprocess
import threading
import time
from dataclasses import dataclass

from tests.machines.errors import MachineError

# Change number N: one line is appended to the journal, and file N % FILES is replaced by rename. Both carry a checksum.
# Only modules of a minimal Python are used.
_PROGRAM = r"""
import os, select, sys, zlib
FILES = 16

def content(number):
    body = (b"%d " % number) * (200 + number % 3000)
    return b"%d %08x\n" % (number, zlib.crc32(body)) + body

def line(number):
    body = b"%d" % number
    return b"%s %08x\n" % (body, zlib.crc32(body))

def sync_folder(folder):
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)

def write(folder):
    os.makedirs(folder, exist_ok=True)
    journal = os.open(folder + "/journal", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    number = 0
    while True:
        stop, _, _ = select.select([0], [], [], 0.01)
        if stop:
            break
        number += 1
        name = "%s/file%d" % (folder, number % FILES)
        fd = os.open(name + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.write(fd, content(number))
        os.fsync(fd)
        os.close(fd)
        os.rename(name + ".new", name)
        sync_folder(folder)
        os.write(journal, line(number))
        os.fsync(journal)
        os.write(1, b"%d\n" % number)

def verify(folder):
    last = 0
    with open(folder + "/journal", "rb") as file:
        lines = file.read().split(b"\n")
    for text in lines[:-1]:
        last += 1
        if text + b"\n" != line(last):
            print("journal damaged at", last)
            return 1
    newest = {}
    for index in range(FILES):
        try:
            with open("%s/file%d" % (folder, index), "rb") as file:
                data = file.read()
        except FileNotFoundError:
            continue
        number = int(data.split(b" ", 1)[0] or b"0")
        if number % FILES != index or data != content(number):
            print("file", index, "damaged")
            return 1
        newest[index] = number
    for number in range(max(1, last - FILES + 1), last + 1):
        if newest.get(number % FILES, 0) < number:
            print("file of change", number, "is missing though the journal has it")
            return 1
    print(last)
    return 0

if sys.argv[1] == "write":
    write(sys.argv[2])
else:
    sys.exit(verify(sys.argv[2]))
"""


def verify_command(folder: str = "/srv/writer") -> str:
    """Return a shell command that prints the last change found under `folder` if all is whole.

    It prints what is damaged, with exit code 1, when a line or file is torn or a file is older than the journal says.
    """
    return f"python3 -c {shlex.quote(_PROGRAM)} verify {shlex.quote(folder)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledgement:
    """One change that was on the disk, synced, at the monotonic time `at`."""

    number: int
    at: float


class Writer:
    """A running writer. Made by `PhysicalMachine.start_writer`; starts with the first change done."""

    def __init__(self, ssh_command: list[str], folder: str) -> None:
        self._acknowledged: list[Acknowledgement] = []
        self._first = threading.Event()
        command = f"exec python3 -u -c {shlex.quote(_PROGRAM)} write {shlex.quote(folder)}"
        self._process = subprocess.Popen(
            [*ssh_command, command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._reader = threading.Thread(target=self._read, name="writer", daemon=True)
        self._reader.start()
        self._first.wait(timeout=120)
        if not self._acknowledged:
            self._process.kill()
            _, errors = self._process.communicate()
            raise MachineError(f"the writer did not start: {errors.decode(errors='replace')}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._acknowledged.append(Acknowledgement(number=int(line), at=time.monotonic()))
            self._first.set()
        self._first.set()

    @property
    def acknowledged(self) -> list[Acknowledgement]:
        """All changes acknowledged so far, in order."""
        return list(self._acknowledged)

    def stop(self) -> list[Acknowledgement]:
        """Stop the writer and return all that it acknowledged."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._finish()
        return self.acknowledged

    def abandon(self) -> None:
        """End the connection without a word to the guest, for a machine whose power is cut."""
        self._process.kill()
        self._finish()

    def _finish(self) -> None:
        self._process.wait()
        self._reader.join(timeout=30)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

"""Other people's NBD programs, run as they are: the other side of our client and server in the tests."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path


def run(*command: str | Path) -> str:
    """Run a program to its end and return its standard output; a failure shows both outputs."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _answers(path: Path) -> bool:
    """Whether somebody takes a connection there: the socket's file is there before that."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def serving(path: Path, *command: str | Path) -> Iterator[str]:
    """Run a server in the foreground until the block is left; yields the URI of its default export on ``path``."""
    server = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE)
    try:
        for _ in range(600):
            if _answers(path) or server.poll() is not None:
                break
            time.sleep(0.05)
        assert server.poll() is None, server.stderr.read() if server.stderr else ""
        yield f"nbd+unix:///?socket={path}"
    finally:
        for _ in range(60):
            server.terminate()
            try:
                server.communicate(timeout=1)
                break
            except subprocess.TimeoutExpired:
                continue  # qemu-nbd now and then forgets the first signal: say it again
        else:
            server.kill()
            server.communicate()


def qemu_nbd(folder: Path, image: Path, form: str, *, writable: bool = False) -> AbstractContextManager[str]:
    """Serve ``image`` by qemu-nbd, to several connections."""
    path = folder / f"{image.name}.socket"
    mode = ["--discard=unmap"] if writable else ["--read-only"]
    return serving(path, "qemu-nbd", "-t", "-e", "8", "-k", path, "-f", form, *mode, image)


def nbdkit(folder: Path, *arguments: str | Path) -> AbstractContextManager[str]:
    """Serve by nbdkit with a plugin and filters."""
    path = folder / "nbdkit.socket"
    return serving(path, "nbdkit", "--foreground", "--exit-with-parent", "-U", path, *arguments)

"""Files of a host over SFTP, as the one user of a ``Session``.

Failures of the host's file system stay ``OSError`` with its errno, as for local files (SFTP knows few: ENOENT, EACCES, else EIO or none);
a broken connection is ``LinkLostError``.
"""

from __future__ import annotations

import contextlib
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from p2v.errors import HostError, LinkLostError
from p2v.session.remote import Session

if TYPE_CHECKING:
    import paramiko

_T = TypeVar("_T")
_PIECE = 32 * 1024  # bytes of one write: what every server takes


class RemoteFiles:
    """Files on a host; safe from several threads, each of which has a channel of its own. The session stays the caller's."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._local = threading.local()
        self._clients: list[paramiko.SFTPClient] = []
        self._lock = threading.Lock()

    def read(self, path: str, offset: int = 0, length: int | None = None) -> tuple[bytes, int]:
        """``length`` bytes from ``offset`` (fewer at the file's end), and the size of the file."""

        def act(client: paramiko.SFTPClient) -> tuple[bytes, int]:
            with client.open(path, "rb") as file:
                size = file.stat().st_size or 0
                count = max(0, size - offset) if length is None else length
                if not count or offset >= size:
                    return b"", size
                count = min(count, size - offset)
                # Requests for all pieces are on their way at once: the link's delay is paid once.
                pieces = [(at, min(_PIECE, offset + count - at)) for at in range(offset, offset + count, _PIECE)]
                return b"".join(file.readv(pieces)), size

        return self._do(act)

    def write_new(self, path: str, data: Iterable[bytes | memoryview]) -> None:
        """Make a file of mode 0600, which must not exist, and bring it to stable storage where the server can (OpenSSH can)."""

        def act(client: paramiko.SFTPClient) -> None:
            from paramiko import sftp

            with client.open(path, "wbx") as file:
                client.chmod(path, 0o600)
                file.set_pipelined(True)
                for part in data:
                    rest = memoryview(part)
                    while rest:
                        file.write(bytes(rest[: 1 << 20]))
                        rest = rest[1 << 20 :]
                file.flush()
                file.set_pipelined(False)
                file.stat()  # answers to all writes have been seen
                with contextlib.suppress(OSError):
                    client._request(sftp.CMD_EXTENDED, "fsync@openssh.com", file.handle)  # type: ignore[attr-defined]

        self._do(act)

    def rename_new(self, old: str, new: str) -> None:
        """Give a file a name that must be free; ``FileExistsError`` where it is taken."""

        def act(client: paramiko.SFTPClient) -> None:
            try:
                client.rename(old, new)  # SFTP version 3: fails where the new name exists
            except OSError:
                with contextlib.suppress(FileNotFoundError):
                    client.stat(new)
                    raise FileExistsError(new) from None
                raise

        self._do(act)

    def remove(self, path: str) -> None:
        """Remove a file; ``FileNotFoundError`` when there is none."""
        self._do(lambda client: client.remove(path))

    def make_folder(self, path: str) -> None:
        """Make a folder of mode 0700 unless it is there."""

        def act(client: paramiko.SFTPClient) -> None:
            try:
                client.mkdir(path, 0o700)
            except OSError:
                if not stat.S_ISDIR(client.stat(path).st_mode or 0):
                    raise

        self._do(act)

    def list_folder(self, path: str) -> Iterator[tuple[str, int, bool]]:
        """Names, sizes and whether it is a folder; links and special files are left out. ``FileNotFoundError`` for no folder."""
        for entry in self._do(lambda client: client.listdir_attr(path)):
            mode = entry.st_mode or 0
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                yield entry.filename, entry.st_size or 0, stat.S_ISDIR(mode)

    def close(self) -> None:
        """Close the channels; twice is harmless."""
        with self._lock:
            for client in self._clients:
                with contextlib.suppress(OSError, EOFError):
                    client.close()
            self._clients.clear()
        self._local = threading.local()

    def _do(self, act: Callable[[paramiko.SFTPClient], _T]) -> _T:
        import paramiko

        try:
            return act(self._client())
        except (EOFError, paramiko.SSHException) as error:
            raise LinkLostError(
                f"the link to {self._session.host} is lost: {error or 'end of file'}",
                advice="See whether the host is up and the network between is stable, then run the command again.",
                subject=self._session.host,
            ) from None
        except OSError as error:
            if str(error) == "Socket is closed":
                raise LinkLostError(f"the link to {self._session.host} is lost", subject=self._session.host) from None
            raise

    def _client(self) -> paramiko.SFTPClient:
        client: paramiko.SFTPClient | None = getattr(self._local, "client", None)
        if client is None:
            import paramiko

            client = paramiko.SFTPClient.from_transport(self._session.transport())
            if client is None:
                raise HostError(f"{self._session.host} offers no SFTP", subject=self._session.host)
            self._local.client = client
            with self._lock:
                self._clients.append(client)
        return client

"""Disks of a remote host as block sources: through the agent, or through dd where there is no Python."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from formats.block import Extent, Kind, check_range, gaps_filled
from formats.errors import Notice, ReadError
from p2v.collect import remote_agent as wire
from p2v.errors import CommandError, DiskVanishedError, HostError

if TYPE_CHECKING:
    from p2v.collect.agent import Agent
    from p2v.session import Session

_SIZE = """\
test -e "$1" || exit 9
if test -b "$1"; then echo b; blockdev --getsize64 "$1"; else echo f; wc -c <"$1"; fi"""
_DD_READ = 4 << 20  # bytes of one dd call: more would only cost memory


class RemoteDisk:
    """A block device or file of a host, read through its agent: a ``BlockSource`` (guarantees S1-S8).

    Reads are cut into requests that are in flight at once on all channels. A file is mapped (its holes are ZERO); a device is DATA
    throughout. Raises ``ReadError`` with the offset, ``DiskVanishedError`` when the device is gone or has another size, ``LinkLostError``.
    """

    def __init__(self, agent: Agent, number: int, path: str, facts: dict[str, Any]) -> None:
        self._agent, self._number, self.path = agent, number, path
        self._label = f"{agent.host}:{path}"
        self._size = int(facts["size"])
        self.sector_size = int(facts.get("sector", 512))
        self.physical_sector_size = int(facts.get("physical", 512))
        self.is_block = bool(facts.get("block"))
        self.direct = bool(facts.get("direct"))
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes of the disk when it was opened."""
        return self._size

    @property
    def bytes_on_wire(self) -> int:
        """Bytes that all disks of this agent have cost so far."""
        return self._agent.bytes_on_wire

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""
        self._check(offset, len(buffer))
        requests = []
        try:
            for start in range(0, len(buffer), wire.MAX_READ):
                piece = buffer[start : start + wire.MAX_READ]
                requests.append(
                    self._agent.ask(self._label, wire.READ, self._number, offset + start, len(piece), buffer=piece)
                )
        finally:
            failure: BaseException | None = None
            for request in requests:  # all of them, so that nothing is written into the buffer after we return
                try:
                    request.wait()
                except Exception as error:
                    failure = failure or error
        if failure is not None:
            raise failure
        if self.direct and any(request.flags & wire.BUFFERED for request in requests):
            self.direct = False
            self._agent.report(buffered_read(self.path, self._agent.host))

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """The file's own map, asked piece by piece; DATA for a device."""
        self._check(start, length)
        if self.is_block:
            return iter([Extent(start, length, Kind.DATA)] if length else [])
        return gaps_filled(self._data(start, length), start, length, Kind.ZERO)

    def _data(self, start: int, length: int) -> Iterator[Extent]:
        end = start + length
        while start < end:
            request = self._agent.ask(self._label, wire.MAP, self._number, start, end - start)
            request.wait()
            if len(request.payload) % 16 != 8:
                raise HostError(f"the map of {self._label} makes no sense", subject=self._label)
            (after,) = struct.unpack(">Q", request.payload[:8])
            position = start
            for place, size in struct.iter_unpack(">QQ", request.payload[8:]):
                if place < position or size == 0 or place + size > end:
                    raise HostError(f"the map of {self._label} makes no sense", subject=self._label)
                yield Extent(place, size, Kind.DATA)
                position = place + size
            if not max(start + 1, position) <= after <= end:
                raise HostError(f"the map of {self._label} makes no sense", subject=self._label)
            start = after

    def digests(self, offset: int, length: int, block: int = 1 << 20) -> list[bytes]:
        """The 32-byte digests of the blocks of a range (the last may be short), made on the host by ``hash_name``.

        ``block`` is at most 1 MiB, ``length`` at most 256 MiB.
        """
        self._check(offset, length)
        if not 0 < block <= wire.MAX_READ or length > wire.MAX_HASH or length > block << 15:
            raise ValueError(f"{length} bytes in blocks of {block} are too much for one question")
        request = self._agent.ask(self._label, wire.HASH, self._number, offset, length, extra=struct.pack(">I", block))
        request.wait()
        if len(request.payload) != 32 * -(-length // block):
            raise HostError(f"the digests of {self._label} make no sense", subject=self._label)
        return [request.payload[place : place + 32] for place in range(0, len(request.payload), 32)]

    def digest(self, start: int, length: int) -> bytes | None:
        """BLAKE2b of a range of at most 1 MiB, made on the host; None where its Python is too old for it, or the range is longer."""
        if self.hash_name != "blake2b" or not 0 < length <= wire.MAX_READ:
            return None
        return self.digests(start, length, length)[0]

    @property
    def hash_name(self) -> str:
        """What ``digests`` uses: ``blake2b`` with 32 bytes, or ``sha256`` on a Python before 3.6."""
        return str(self._agent.facts.get("hash", ""))

    def _check(self, start: int, length: int) -> None:
        if self._closed:
            raise ValueError(f"{self._label} is closed")
        check_range(self._size, start, length)

    def close(self) -> None:
        """Let the host close the device."""
        if not self._closed:
            self._closed = True
            self._agent.tell_all(wire.CLOSE, self._number)


def buffered_read(path: str, host: str) -> Notice:
    """That a device is read through the page cache."""
    return Notice(
        code="buffered-read",
        message=f"{path} refuses O_DIRECT and is read through the page cache of {host}",
        advice="Changes that were written below the cache may be missed; prefer a snapshot.",
        subject=path,
    )


class DdDisk:
    """A block device or file of a host without Python, read by ``dd``, one process for each read: a ``BlockSource``.

    All of it is DATA. Raises what ``RemoteDisk`` raises. ``report`` is told when O_DIRECT was refused.
    """

    def __init__(
        self,
        session: Session,
        path: str,
        *,
        root: bool = True,
        direct: bool = True,
        report: Callable[[Notice], None] = lambda _: None,
    ) -> None:
        self._session, self.path, self._root = session, path, root
        self._label = f"{session.host}:{path}"
        self._closed = False
        self.bytes_on_wire = 0
        found = session.run(["sh", "-c", _SIZE, "sh", path], root=root)
        words = found.text.split()
        if found.exit_code == 9:
            raise DiskVanishedError(
                f"there is no {self._label}", advice="`p2v inspect` lists the disks of a host.", subject=path
            )
        if found.exit_code != 0 or len(words) != 2 or not words[1].isdigit():
            raise CommandError(f"the size of {self._label} cannot be learnt: {found.error_text[-300:]}", subject=path)
        self.is_block = words[0] == "b"
        self._size = int(words[1])
        self.direct = direct and self.is_block and self._size > 0 and self._takes_direct()
        if direct and self.is_block and not self.direct:
            report(buffered_read(path, session.host))

    def _takes_direct(self) -> bool:
        probe = self._session.run(
            ["dd", f"if={self.path}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"], root=self._root
        )
        return probe.exit_code == 0

    @property
    def size(self) -> int:
        """Bytes of the disk when it was opened."""
        return self._size

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""
        self._check(offset, len(buffer))
        for start in range(0, len(buffer), _DD_READ):
            self._read(buffer[start : start + _DD_READ], offset + start)

    def _read(self, buffer: memoryview, offset: int) -> None:
        """One dd of whole pages around the range: every dd knows ``skip`` in blocks, and O_DIRECT needs pages."""
        low, high = offset - offset % wire.PAGE, offset + len(buffer)
        high += -high % wire.PAGE
        block = wire.PAGE
        while block < 1 << 20 and low % (2 * block) == 0 and (high - low) % (2 * block) == 0:
            block *= 2
        command = ["dd", f"if={self.path}", f"bs={block}", f"skip={low // block}", f"count={(high - low) // block}"]
        if self.direct:
            command.append("iflag=direct")
        done = self._session.run(command, root=self._root, limit=high - low)
        self.bytes_on_wire += len(done.stdout)
        begin = offset - low
        if done.exit_code == 0 and len(done.stdout) >= begin + len(buffer):
            buffer[:] = memoryview(done.stdout)[begin : begin + len(buffer)]
            return
        self._raise(done.error_text, low + len(done.stdout))

    def _raise(self, text: str, offset: int) -> None:
        gone = ("No such", "No medium", "no such", "ENXIO", "ENODEV")
        size = self._session.run(["blockdev", "--getsize64", self.path], root=self._root) if self.is_block else None
        changed = size is not None and size.text.strip() != str(self._size)
        if "rror" not in text or changed or any(word in text for word in gone):
            raise DiskVanishedError(
                f"{self._label} vanished or changed its size while it was read: {text[-300:]}",
                advice="See the kernel log of the host (`dmesg`), then run the command again.",
                subject=self.path,
            )
        raise ReadError(
            f"{self._label} cannot be read at byte {offset}: {text[-300:]}",
            advice="The disk may be failing: see `dmesg` and `smartctl -a` on the host.",
            subject=self.path,
        )

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """DATA throughout."""
        self._check(start, length)
        return iter([Extent(start, length, Kind.DATA)] if length else [])

    def _check(self, start: int, length: int) -> None:
        if self._closed:
            raise ValueError(f"{self._label} is closed")
        check_range(self._size, start, length)

    def close(self) -> None:
        """Nothing is held on the host."""
        self._closed = True

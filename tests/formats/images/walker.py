"""A reader of streamOptimized VMDK that goes by the markers alone, front to back, and holds the file to what VirtualBox, vSphere and 7-Zip
demand of one: the rules are in the module docstring of ``formats.images.vmdk_stream``."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

GRAIN = 65536
SECTOR = 512


@dataclass(slots=True)
class Walk:
    """What the walk found; ``disk`` is the content put together."""

    disk: bytearray
    descriptor: str
    order: list[str] = field(default_factory=list)
    grains: dict[int, int] = field(default_factory=dict)  # number of a grain -> its sector
    tables: dict[int, tuple[int, ...]] = field(default_factory=dict)  # sector of a table -> its entries


def walk(content: bytes) -> Walk:
    """Read a whole file; ``AssertionError`` says which rule it breaks."""
    assert len(content) % SECTOR == 0
    header = content[:SECTOR]
    (
        magic,
        version,
        flags,
        capacity,
        grain,
        text_at,
        text_size,
        entries,
        spare,
        directory,
        overhead,
        unclean,
        lines,
        algorithm,
    ) = struct.unpack_from("<4sIIQQQQIQQQB4sH", header)
    assert (magic, version, flags) == (b"KDMV", 3, 0x30001)
    assert (grain, entries, text_at, text_size) == (128, 512, 1, 20)
    assert (spare, directory, unclean, lines, algorithm) == (0, 0xFFFFFFFFFFFFFFFF, 0, b"\n \r\n", 1)
    assert overhead % grain == 0
    text = content[SECTOR : 21 * SECTOR].rstrip(b"\0").decode()
    assert content[21 * SECTOR : overhead * SECTOR] == bytes((overhead - 21) * SECTOR)
    found = Walk(bytearray(capacity * SECTOR), text)
    at, last = overhead, -1
    while True:
        block = content[at * SECTOR : (at + 1) * SECTOR]
        assert len(block) == SECTOR, "the file ends before the end-of-stream marker"
        value, size, kind = struct.unpack_from("<QII", block)
        if size:
            assert value % grain == 0
            assert value > last, "grains must ascend"
            last = value
            sectors = -(-(12 + size) // SECTOR)
            _grain(found, content[at * SECTOR + 12 : at * SECTOR + 12 + size], value * SECTOR)
            assert not any(content[at * SECTOR + 12 + size : (at + sectors) * SECTOR])
            found.grains[value // grain] = at
            found.order.append("grain")
            at += sectors
            continue
        assert not any(block[16:])
        if kind == 0:
            assert value == 0
            break
        assert kind in (1, 2, 3), f"unknown marker {kind}"
        body = content[(at + 1) * SECTOR : (at + 1 + value) * SECTOR]
        found.order.append({1: "table", 2: "directory", 3: "footer"}[kind])
        if kind == 1:
            assert value == 4
            found.tables[at + 1] = struct.unpack("<512I", body)
        elif kind == 2:
            directory_at, directory_body = at + 1, body
        else:
            _footer(header, body, directory_at)
        at += 1 + value
    assert (at + 1) * SECTOR == len(content), "nothing may follow the end of the stream"
    _tables(found, directory_body, capacity)
    return found


def _grain(found: Walk, stream: bytes, offset: int) -> None:
    inflater = zlib.decompressobj()
    data = inflater.decompress(stream)
    assert inflater.eof
    assert not inflater.unused_data
    assert len(data) == GRAIN, "VirtualBox inflates whole grains only"
    assert any(data), "a zero grain takes no room"
    assert not any(data[len(found.disk) - offset :]) or offset + GRAIN <= len(found.disk)
    found.disk[offset : offset + GRAIN] = data[: len(found.disk) - offset]


def _footer(header: bytes, body: bytes, directory_at: int) -> None:
    assert len(body) == SECTOR
    assert struct.unpack_from("<Q", body, 56)[0] == directory_at
    assert body[:56] == header[:56]
    assert body[64:] == header[64:]


def _tables(found: Walk, directory: bytes, capacity: int) -> None:
    count = -(-capacity // (128 * 512))
    entries = struct.unpack(f"<{count}I", directory[: count * 4])
    assert not any(directory[count * 4 :])
    seen: dict[int, int] = {}
    for number, sector in enumerate(entries):
        if sector:
            seen |= {number * 512 + i: at for i, at in enumerate(found.tables[sector]) if at}
    assert seen == found.grains, "tables and markers must agree"
    assert found.order[-2:] == ["directory", "footer"]
    assert len([sector for sector in entries if sector]) == len(found.tables)

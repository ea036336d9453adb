"""Contents that formats go wrong with, and images of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from formats.images import create_sink
from formats.memory import MemoryDisk
from formats.transfer import copy
from tests.contracts.block_sink import noise
from tests.contracts.block_source import MIB

GRAIN = 65536


def shape(name: str) -> bytes:
    """The content of a disk: whole sectors, a few MiB."""
    text = b"ordinary text that compresses well, as most of a disk does. " * 4000
    match name:
        case "empty":
            return bytes(3 * MIB)
        case "sparse":
            disk = bytearray(8 * MIB)
            for at in (0, GRAIN - 1, 2 * MIB, 5 * MIB - 1, 8 * MIB - 512):
                disk[at] = 0xA5
            disk[3 * MIB : 3 * MIB + len(text)] = text
            return bytes(disk)
        case "dense":
            return (noise(MIB, 1) + text * 5)[: 2 * MIB]
        case "odd":
            return (text * 20)[: 2 * MIB + 3 * GRAIN + 7 * 512]
        case "incompressible-end":
            return text[:GRAIN] + bytes(MIB) + noise(2 * GRAIN, 3)
        case "short-end":
            return bytes(MIB) + noise(512, 4)
    raise ValueError(name)


def write(path: Path, name: str, content: bytes, *, subformat: str = "", compress: str = "") -> Path:
    """An image of ``content`` in the format ``name``, made by the code under test."""
    sink = create_sink(path, name, len(content), subformat=subformat, compress=compress)
    copy(MemoryDisk(len(content), content), sink)
    sink.flush()
    sink.close()
    return path


def shared(*parts: str) -> Path:
    """A file of the shared test data; skips the test where it is not there."""
    beside = Path(__file__).parents[4] / "shared" / "data"
    path = Path(os.environ.get("P2V_TEST_DATA", beside)).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no shared test data: {path} (P2V_TEST_DATA names the folder)")
    return path

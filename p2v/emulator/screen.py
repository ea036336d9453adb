"""The screen of the emulated machine: text read out of VGA memory, and pictures."""

from __future__ import annotations

import re
import struct
import zlib

TEXT_ADDRESS = 0xB8000
TEXT_COLUMNS = 80
TEXT_ROWS = 25
TEXT_BYTES = TEXT_COLUMNS * TEXT_ROWS * 2

TEXT_PICTURES = frozenset({(720, 400), (640, 400)})
"""Sizes of the picture in text mode with 80x25 characters: cells of 9x16 or 8x16 pixels."""

_PIXELS = 1 << 26
_PPM = re.compile(rb"P6\s(\d{1,5})\s(\d{1,5})\s255\s")


def decode_text(memory: bytes) -> tuple[str, ...] | None:
    """The lines of an 80x25 text screen, right-stripped; None when the memory does not hold one (graphics mode).

    Each cell is a character of code page 437 and an attribute byte. In graphics mode the window shows parts of the picture: those
    are told from text by the share of cells with a printable character and by the number of different attributes.
    """
    if len(memory) < TEXT_BYTES:
        return None
    cells, attributes = memory[0:TEXT_BYTES:2], memory[1:TEXT_BYTES:2]
    # 0xdb-0xdf and 0xb0-0xda are blocks and box lines, 0x18-0x1b the arrows of boot menus.
    odd = sum(1 for cell in cells if (0 < cell < 0x18) or 0x1B < cell < 0x20 or cell == 0x7F)
    blank = sum(1 for cell in cells if cell in (0, 0x20))
    if odd > 20 or len(set(attributes)) > 24 or (set(attributes) == {0} and blank == len(cells)):
        return None
    text = cells.replace(b"\0", b" ").decode("cp437")
    return tuple(text[row * TEXT_COLUMNS : (row + 1) * TEXT_COLUMNS].rstrip() for row in range(TEXT_ROWS))


def png_of(width: int, height: int, pixels: memoryview) -> bytes:
    """A PNG of RGB bytes, row by row."""
    rows = b"".join(b"\0" + pixels[row * width * 3 : (row + 1) * width * 3] for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def parse_ppm(ppm: bytes) -> tuple[int, int, memoryview]:
    """Width, height and RGB bytes of a binary PPM picture; ``ValueError`` when it is none."""
    header = _PPM.match(ppm)
    if header is None:
        raise ValueError("not a binary PPM picture with 8 bits a channel")
    width, height = int(header[1]), int(header[2])
    size = width * height * 3
    if not 0 < width * height <= _PIXELS or len(ppm) - header.end() < size:
        raise ValueError(f"a PPM picture of {width}x{height} in {len(ppm)} bytes")
    return width, height, memoryview(ppm)[header.end() : header.end() + size]

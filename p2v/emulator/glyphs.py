"""Text read from a picture of a frame buffer console.

Linux draws its console with an 8x16 font (from the first message to the login prompt, unless the system loads another one), which is
that of the VGA BIOS but for some letters. The font is taken from the VGA BIOS that QEMU brings along; where that is not found,
pictures are not read.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

_WIDTH, _HEIGHT = 8, 16
_ROMS = tuple(
    Path(folder, name)
    for folder in ("/usr/share/seabios", "/usr/share/qemu", "/usr/share/seavgabios", "/usr/share/qemu-kvm")
    for name in ("vgabios-stdvga.bin", "vgabios-isavga.bin", "vgabios.bin")
)
_ROM_LIMIT = 1 << 20

# The letter A: what the font is found by.
_LETTER_A = bytes.fromhex("000010386cc6c6fec6c6c6c600000000")
_BLANK = bytes(_HEIGHT)
_CURSOR = bytes(_HEIGHT - 2) + b"\xff\xff"

# Characters that Linux 6.1 was seen to draw in another way than the VGA BIOS of QEMU 7.2 has them.
_SEEN = {
    "0": "0000386cc6c6d6d6c6c66c3800000000",
    "M": "0000c6eefefed6c6c6c6c6c600000000",
    "T": "00007e7e5a1818181818183c00000000",
    "V": "0000c6c6c6c6c6c6c66c381000000000",
    "W": "0000c6c6c6c6d6d6d6feee6c00000000",
    "X": "0000c6c66c7c38387c6cc6c600000000",
    "Y": "0000666666663c181818183c00000000",
    "Z": "0000fec6860c183060c2c6fe00000000",
    "`": "0030180c000000000000000000000000",
    "f": "00001c36323078303030307800000000",
    "m": "0000000000ecfed6d6d6d6c600000000",
    "v": "0000000000c6c6c6c6c66c3800000000",
    "w": "0000000000c6c6d6d6d6fe6c00000000",
    "x": "0000000000c66c3838386cc600000000",
    "|": "00001818181818181818181800000000",
    "~": "0076dc00000000000000000000000000",
}
_LIT = bytes(48 if level < 64 else 49 for level in range(256))  # a channel's level as the digit 0 or 1
_UNKNOWN = "\ufffd"
_READABLE_SHARE = 0.8


@functools.cache
def font() -> dict[bytes, str]:
    """The printable ASCII characters and the cursor (as a space) by their 16 rows of 8 pixels; empty when no VGA BIOS is found."""
    for rom in _ROMS:
        with contextlib.suppress(OSError):
            data = rom.read_bytes()[:_ROM_LIMIT]
            start = data.find(_LETTER_A) - ord("A") * _HEIGHT
            if start >= 0:
                glyphs = {data[start + code * _HEIGHT :][:_HEIGHT]: chr(code) for code in range(0x21, 0x7F)}
                return (
                    glyphs
                    | {bytes.fromhex(rows): letter for letter, rows in _SEEN.items()}
                    | {_BLANK: " ", _CURSOR: " "}
                )
    return {}


def read_text(width: int, height: int, pixels: memoryview) -> tuple[str, ...] | None:
    """The lines of a console drawn on black, right-stripped; None when the picture is no such console.

    ``pixels`` are RGB bytes, row by row. A character that the font does not have becomes U+FFFD.
    """
    known = font()
    columns = width // _WIDTH
    if not known or not columns or len(pixels) < width * height * 3:
        return None
    lines, read, unread = [], 0, 0
    for top in range(0, height - height % _HEIGHT, _HEIGHT):
        rows = [_row(pixels[(top + y) * width * 3 : (top + y + 1) * width * 3], columns) for y in range(_HEIGHT)]
        cells = [bytes(cell) for cell in zip(*rows, strict=True)]
        line = "".join(known.get(cell, _UNKNOWN) for cell in cells).rstrip()
        missed = line.count(_UNKNOWN)
        unread += missed
        read += len(line) - line.count(" ") - missed
        lines.append(line)
    if read == 0 or read < _READABLE_SHARE * (read + unread):
        return None
    return tuple(lines)


def _row(pixels: memoryview, columns: int) -> bytes:
    # One row of pixels, a bit each. Whole rows are worked on at once: a picture has a million pixels, and this runs every second.
    data = bytes(pixels)[: columns * _WIDTH * 3]
    red, green, blue = (int.from_bytes(data[channel::3].translate(_LIT), "big") for channel in range(3))
    return int((red | green | blue).to_bytes(columns * _WIDTH, "big"), 2).to_bytes(columns, "big")

"""The checksums of Linux's on-disk structures that the standard library lacks: CRC-32C and CRC-16."""

from __future__ import annotations

import struct
from functools import cache

_CRC32C = 0x82F63B78  # Castagnoli, reflected
_CRC16 = 0xA001  # IBM, reflected


def _table(polynomial: int) -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (polynomial if value & 1 else 0)
        table.append(value)
    return table


@cache
def _slices() -> tuple[list[int], ...]:
    # tables[k][b] is the register after byte b and k zero bytes: eight bytes are folded with eight look-ups.
    tables = [_table(_CRC32C)]
    for _ in range(7):
        last = tables[-1]
        tables.append([(value >> 8) ^ tables[0][value & 0xFF] for value in last])
    return tuple(tables)


@cache
def _crc16_table() -> list[int]:
    return _table(_CRC16)


def crc32c(register: int, data: bytes) -> int:
    """The CRC-32C register after ``data``, without inversions: as ext4 uses it, which starts at ``0xFFFFFFFF``."""
    t0, t1, t2, t3, t4, t5, t6, t7 = _slices()
    whole = len(data) & ~7
    for low, high in struct.iter_unpack("<II", data[:whole]):
        low ^= register  # noqa: PLW2901 - the inner loop of a checksum
        register = (
            t7[low & 0xFF]
            ^ t6[(low >> 8) & 0xFF]
            ^ t5[(low >> 16) & 0xFF]
            ^ t4[low >> 24]
            ^ t3[high & 0xFF]
            ^ t2[(high >> 8) & 0xFF]
            ^ t1[(high >> 16) & 0xFF]
            ^ t0[high >> 24]
        )
    for byte in data[whole:]:
        register = (register >> 8) ^ t0[(register ^ byte) & 0xFF]
    return register


def crc16(register: int, data: bytes) -> int:
    """The CRC-16 (IBM) register after ``data``: as ext4's group descriptors use it, which start at ``0xFFFF``."""
    table = _crc16_table()
    for byte in data:
        register = (register >> 8) ^ table[(register ^ byte) & 0xFF]
    return register

"""Which bytes a swap area uses: its header, and nothing else of a machine that is going to be started anew.

A hibernated machine keeps its memory there: such an area is in use whole. So is one of the old kind (``SWAP-SPACE``)
and one whose header does not add up.

Facts: Linux ``include/linux/swap.h`` (union swap_header), signatures of a suspended system from kernel/power/swap.c
and uswsusp.
"""

from __future__ import annotations

import struct

from formats.block import BlockSource, Kind
from formats.layouts.signature import HIBERNATION_SIGNATURES, SWAP_SIGNATURES
from formats.layouts.used import Composite, Content, Uniform, UsedMap

_PAGES = (4096, 8192, 16384, 32768, 65536)
_INFO = 1024  # offset of version, last page and number of bad pages


def is_swap(source: BlockSource) -> bool:
    """Whether a swap area starts at the source's first byte, hibernated or not."""
    return look(source) is not None


def used(source: BlockSource) -> UsedMap | None:
    """The map of a swap area: its first page and what lies behind its last one. None when there is none, or it has to
    be read whole.
    """
    content = look(source)
    return content.used if content is not None else None


def look(source: BlockSource) -> Content | None:
    """What swap area starts at the source's first byte: None when there is none, else its map or the reason for
    none.
    """
    head = bytearray(min(_PAGES[-1], source.size))
    if len(head) < _PAGES[0]:
        return None
    source.readinto(memoryview(head), 0)
    for page in _PAGES:
        sign = bytes(head[page - 10 : page])
        if any(sign.startswith(magic) for magic in HIBERNATION_SIGNATURES):
            return Content(kind="swsuspend", reason="the machine's memory is saved in it (hibernation)")
        if sign in SWAP_SIGNATURES:
            return _look_at_area(bytes(head), page, sign, source.size)
    return None


def _look_at_area(head: bytes, page: int, sign: bytes, size: int) -> Content:
    version, last_page, _bad = struct.unpack_from("<3I", head, _INFO)
    if sign != SWAP_SIGNATURES[0] or version != 1:
        return Content(kind="swap", reason="its version is not known here")
    end = (last_page + 1) * page
    if last_page == 0 or end > size:
        return Content(kind="swap", reason="it is larger than its volume")
    return Content(kind="swap", used=Composite(size, [(page, Uniform(end - page, Kind.ZERO))]))

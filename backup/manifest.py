"""What a disk is made of: pages of a tree, each naming what lies below it by its id. Pure: pages come and go through functions."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from backup.errors import ObjectDamagedError

SPAN = 16 << 20
"""Bytes of a disk that one leaf describes; no chunk crosses a multiple of it."""

FAN = 256
"""Ids in an inner page."""

NOTHING = bytes(32)
"""In place of the id of a page: all of its range reads as zeroes."""

_LENGTH = struct.Struct("<I")
_ZERO = 1 << 31


class Entry(NamedTuple):
    """A run of a span: a chunk, or zeroes where ``id`` is None. ``length`` > 0."""

    length: int
    id: bytes | None


def level(size: int) -> int:
    """The level of the root of a disk of ``size`` bytes: 0 when one leaf holds it all."""
    found, reach = 0, SPAN
    while reach < size:
        found, reach = found + 1, reach * FAN
    return found


def encode_leaf(entries: list[Entry]) -> bytes:
    """The page of a span; neighbouring zero runs are joined. Empty when there is nothing but zeroes: such a page is ``NOTHING``."""
    parts: list[bytes] = []
    zeroes = 0
    pack = _LENGTH.pack
    for length, chunk in entries:
        if chunk is None:
            zeroes += length
            continue
        if zeroes:
            parts.append(pack(zeroes | _ZERO))
            zeroes = 0
        parts += (pack(length), chunk)
    if not parts:
        return b""
    if zeroes:
        parts.append(pack(zeroes | _ZERO))
    return b"".join(parts)


def decode_leaf(page: bytes, length: int) -> list[Entry]:
    """The entries of a leaf; ``ObjectDamagedError`` unless they tile exactly ``length`` bytes."""
    entries: list[Entry] = []
    position = total = 0
    try:
        while position < len(page):
            (word,) = _LENGTH.unpack_from(page, position)
            position += 4
            if word & _ZERO:
                entry = Entry(word & ~_ZERO, None)
            else:
                entry = Entry(word, page[position : position + 32])
                position += 32
            total += entry.length
            if not entry.length or total > length:
                raise ObjectDamagedError("a page of a manifest does not fit its disk")
            entries.append(entry)
    except struct.error:
        raise ObjectDamagedError("a page of a manifest is cut short") from None
    if total != length or position != len(page):
        raise ObjectDamagedError("a page of a manifest does not fit its disk")
    return entries


def decode_inner(page: bytes) -> list[bytes]:
    """The ids of an inner page."""
    if len(page) != FAN * 32:
        raise ObjectDamagedError("an inner page of a manifest has a wrong length")
    return [page[n : n + 32] for n in range(0, len(page), 32)]


def span_length(size: int, number: int) -> int:
    """Bytes of span ``number`` of a disk of ``size`` bytes: shorter only at the end."""
    return min(SPAN, size - number * SPAN)


def span_count(size: int) -> int:
    """Spans of a disk."""
    return -(-size // SPAN)


Load = Callable[[bytes], bytes]
Save = Callable[[bytes], bytes]


class Tree:
    """The pages of one disk, to read. ``load(id)`` gives a page; it may cache."""

    def __init__(self, root: bytes, size: int, load: Load) -> None:
        self.root, self.size, self._load = root, size, load
        self.level = level(size)

    def page(self, page_id: bytes) -> bytes:
        """The page with this id."""
        return self._load(page_id)

    def leaf(self, number: int) -> bytes:
        """The id of the leaf of span ``number``; ``NOTHING`` for zeroes."""
        page, below = self.root, self.level
        while below and page != NOTHING:
            below -= 1
            inner = self._load(page)
            start = number // FAN**below % FAN * 32
            page = inner[start : start + 32]
        return page

    def entries(self, number: int) -> list[Entry]:
        """What span ``number`` is made of."""
        length = span_length(self.size, number)
        page = self.leaf(number)
        return [Entry(length, None)] if page == NOTHING else decode_leaf(self._load(page), length)

    def leaves(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, bytes]]:
        """The spans from ``first`` up to ``last`` that are not all zeroes, with the ids of their leaves; zero ranges cost nothing."""
        end = span_count(self.size) if last is None else last
        return self._below(self.root, self.level, 0, first, end)

    def _below(self, page: bytes, at: int, base: int, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        reach = FAN**at
        if page == NOTHING or base >= last or base + reach <= first:
            return
        if not at:
            yield base, page
            return
        step = reach // FAN
        for number, child in enumerate(decode_inner(self._load(page))):
            if child != NOTHING:
                yield from self._below(child, at - 1, base + number * step, first, last)

    def pages(self) -> Iterator[tuple[bytes, int]]:
        """The ids of all pages with their levels, parents first."""
        return self._pages(self.root, self.level)

    def _pages(self, page: bytes, at: int) -> Iterator[tuple[bytes, int]]:
        if page == NOTHING:
            return
        yield page, at
        if at:
            for child in decode_inner(self._load(page)):
                yield from self._pages(child, at - 1)


def differing(old: Tree, new: Tree) -> Iterator[int]:
    """The spans of ``new``, ascending, whose leaves are not those of ``old``, and those that reach past the end of ``old``.

    Pages that both share are not read.
    """
    last = span_count(new.size)
    shared = last if old.size >= new.size else old.size // SPAN
    top = max(old.level, new.level)
    return _differing((old, old.root), (new, new.root), top, 0, (shared, last))


def _differing(
    one: tuple[Tree, bytes], other: tuple[Tree, bytes], at: int, base: int, ends: tuple[int, int]
) -> Iterator[int]:
    shared, last = ends
    # Above its root a tree has no pages: there its root stands for a page of another level.
    real = one[1] == NOTHING or at <= min(one[0].level, other[0].level)
    if base >= last or (one[1] == other[1] and real and min(base + FAN**at, last) <= shared):
        return
    if not at:
        yield base
        return
    step = FAN ** (at - 1)
    for number, (mine, theirs) in enumerate(zip(_children(*one, at), _children(*other, at), strict=True)):
        yield from _differing((one[0], mine), (other[0], theirs), at - 1, base + number * step, ends)


def _children(tree: Tree, page: bytes, at: int) -> list[bytes]:
    if at > tree.level:
        return [page] + [NOTHING] * (FAN - 1)
    return [NOTHING] * FAN if page == NOTHING else decode_inner(tree.page(page))


def rebuild(size: int, leaves: Mapping[int, bytes], save: Save, old: Tree | None = None) -> bytes:
    """Write the inner pages above ``leaves`` (by span) and return the root's id. Every other span is that of ``old``, else zeroes.

    ``old`` may be of another size; then ``leaves`` must hold the span at the end of the shorter, and its levels are read where they fit.
    """
    if not size:
        return NOTHING
    top = level(size)
    last = span_count(size)
    if old is not None and old.level != top:
        # Levels differ: take the old leaves one by one.
        kept = dict(old.leaves(0, min(last, span_count(old.size))))
        return rebuild(size, {**kept, **leaves}, save)
    layer = {number: page for number, page in leaves.items() if number < last}
    for at in range(1, top + 1):
        above: dict[int, dict[int, bytes]] = {}
        for number, page in layer.items():
            above.setdefault(number // FAN, {})[number % FAN] = page
        layer = {}
        for number, changed in above.items():
            before = _old_inner(old, at, number)
            ids = decode_inner(before) if before else [NOTHING] * FAN
            for child, page in changed.items():
                ids[child] = page
            _clip(ids, number, at, last)
            page = b"".join(ids)
            layer[number] = save(page) if any(page) else NOTHING
    return layer.get(0, old.root if old is not None else NOTHING)


def _clip(ids: list[bytes], number: int, at: int, last: int) -> None:
    """Drop what lies behind the disk's end: an old disk may have been longer."""
    step = FAN ** (at - 1)
    for child in range(FAN):
        if (number * FAN + child) * step >= last:
            ids[child] = NOTHING


def _old_inner(old: Tree | None, at: int, number: int) -> bytes:
    """The page of ``old`` at level ``at`` and position ``number`` among those of its level; empty for zeroes."""
    if old is None:
        return b""
    page, below = old.root, old.level
    while page != NOTHING and below > at:
        below -= 1
        inner = old._load(page)
        start = number // FAN ** (below - at) % FAN * 32
        page = inner[start : start + 32]
    return b"" if page == NOTHING else old._load(page)

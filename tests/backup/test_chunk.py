"""Where disks are cut, and that cutting around changes gives what cutting anew gives."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import pairwise, zip_longest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backup.chunk import GRAIN, AlignedContent, Chunker, FixedGrid, cut, recut

KEY = bytes(range(32))
CHUNKERS: dict[str, Chunker] = {
    "fixed": FixedGrid(4 * GRAIN),
    "aligned": AlignedContent(KEY, minimum=2 * GRAIN, usual=4 * GRAIN, maximum=12 * GRAIN),
    "aligned, no minimum": AlignedContent(KEY, minimum=GRAIN, usual=GRAIN, maximum=5 * GRAIN),
}
each_chunker = pytest.mark.parametrize("chunker", CHUNKERS.values(), ids=CHUNKERS.keys())

# A block by its kind: zeroes, one of a few repeated contents, the end of a file, noise.
BLOCK = st.one_of(
    st.just("zero"),
    st.integers(0, 3).map("same {}".format),
    st.integers().map("end {}".format),
    st.integers().map("noise {}".format),
)
TAIL = st.sampled_from([b"", b"\0", b"x", b"\0" * 4095, b"x" * 513])


def block(kind: str) -> bytes:
    if kind == "zero":
        return bytes(GRAIN)
    noise = random.Random(kind).randbytes(GRAIN)
    return noise[: GRAIN - 100] + bytes(100) if kind.startswith("end") else noise


def disk(kinds: Iterable[str], tail: bytes = b"") -> bytes:
    return b"".join(map(block, kinds)) + tail


def all_cuts(chunker: Chunker, content: bytes) -> list[int]:
    return list(chunker.cuts(memoryview(content), final=True))


def noise(blocks: int, seed: int = 1) -> bytes:
    return disk(f"noise {seed} {number}" for number in range(blocks))


@each_chunker
@given(kinds=st.lists(BLOCK, max_size=60), tail=TAIL)
@settings(deadline=None)
def test_cuts_tile_within_the_bounds(chunker: Chunker, kinds: list[str], tail: bytes) -> None:
    content = disk(kinds, tail)
    cuts = all_cuts(chunker, content)
    assert (cuts[-1] if cuts else 0) == len(content)
    assert all(end % GRAIN == 0 for end in cuts[:-1])
    for start, end in pairwise([0, *cuts]):
        assert 0 < end - start <= chunker.maximum
        followed_by_zeroes = not any(content[end : end + GRAIN])
        zeroes = not any(content[start:end])
        assert end - start >= chunker.minimum or followed_by_zeroes or zeroes


@pytest.mark.parametrize("name", ["aligned", "aligned, no minimum"])
@given(kinds=st.lists(BLOCK, max_size=60), tail=TAIL)
@settings(deadline=None)
def test_zeroes_never_share_a_chunk_with_data(name: str, kinds: list[str], tail: bytes) -> None:
    content = disk(kinds, tail)
    for start, end in pairwise([0, *all_cuts(CHUNKERS[name], content)]):
        parts = {any(content[place : min(end, place + GRAIN)]) for place in range(start, end, GRAIN)}
        assert len(parts) == 1


@each_chunker
@given(kinds=st.lists(BLOCK, max_size=60), tail=TAIL, data=st.data())
@settings(deadline=None)
def test_buffers_do_not_matter(chunker: Chunker, kinds: list[str], tail: bytes, data: st.DataObject) -> None:
    content = disk(kinds, tail)
    whole = all_cuts(chunker, content)
    start = 0
    found: list[int] = []
    while start < len(content):
        end = min(len(content), start + chunker.maximum + chunker.lookahead + data.draw(st.integers(0, 9 * GRAIN)))
        cuts = list(chunker.cuts(memoryview(content)[start:end], final=end == len(content)))
        assert cuts, "a buffer of maximum + lookahead is enough to decide one end"
        found += [start + offset for offset in cuts]
        start = found[-1]
    assert found == whole


@each_chunker
@given(kinds=st.lists(BLOCK, max_size=60), tail=TAIL, data=st.data())
@settings(deadline=None)
def test_a_cut_follows_from_its_chunk_and_the_lookahead_alone(
    chunker: Chunker, kinds: list[str], tail: bytes, data: st.DataObject
) -> None:
    content = disk(kinds, tail)
    cuts = [0, *all_cuts(chunker, content)]
    known = [place for place in range(1, len(cuts) - 1) if cuts[place] + chunker.lookahead <= len(content)]
    if not known:
        return
    place = data.draw(st.sampled_from(known))
    start, end = cuts[place - 1], cuts[place]
    other = content[start : end + chunker.lookahead] + disk(data.draw(st.lists(BLOCK, max_size=20)))
    assert next(chunker.cuts(memoryview(other), final=True)) == end - start


@each_chunker
@given(kinds=st.lists(BLOCK, min_size=1, max_size=80), tail=TAIL, data=st.data())
@settings(deadline=None, max_examples=400)
def test_cutting_around_changes_is_cutting_anew(
    chunker: Chunker, kinds: list[str], tail: bytes, data: st.DataObject
) -> None:
    old_content = disk(kinds, tail)
    content = bytearray(old_content)
    marks = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=8, unique=True)))
    changed = [(low, high) for low, high in zip(marks[::2], marks[1::2], strict=False)]
    for low, high in changed:
        fresh = disk(data.draw(st.lists(BLOCK, min_size=1, max_size=3)))
        content[low:high] = (fresh * (1 + (high - low) // len(fresh)))[: high - low]
    old = all_cuts(chunker, old_content)

    pieces = list(recut(chunker, old, changed, lambda start, length: memoryview(content)[start : start + length]))

    merged = set(old)
    for (start, stop, ends), later in zip_longest(pieces, pieces[1:]):
        assert ends[-1] == stop
        assert later is None or stop <= later.start
        merged = {end for end in merged if not start < end <= stop} | set(ends)
    assert sorted(merged) == all_cuts(chunker, bytes(content))


@each_chunker
def test_a_small_change_is_cut_anew_locally(chunker: Chunker) -> None:
    content = bytearray(noise(2000))
    old = all_cuts(chunker, bytes(content))
    asked: list[tuple[int, int]] = []

    def read(start: int, length: int) -> memoryview:
        asked.append((start, length))
        return memoryview(content)[start : start + length]

    middle = 1000 * GRAIN
    content[middle : middle + GRAIN] = block("noise other")
    (piece,) = recut(chunker, old, [(middle, middle + GRAIN)], read)
    assert piece.start <= middle < piece.stop
    assert piece.stop - piece.start < 12 * chunker.maximum
    assert sum(length for _, length in asked) < 20 * chunker.maximum


def test_equal_files_are_cut_equally_wherever_they_lie() -> None:
    files = [disk([*(f"noise {name} {number}" for number in range(40)), f"end {name}"]) for name in range(30)]

    def common(chunker: Chunker) -> float:
        one, other = (
            {content[start:end] for start, end in pairwise([0, *all_cuts(chunker, content)])}
            for content in (b"".join(files), b"".join(reversed(files)))
        )
        return len(one & other) / len(one)

    assert common(AlignedContent(KEY)) > 0.75
    assert common(FixedGrid(16 * GRAIN)) < 0.25


def test_cuts_within_files_depend_on_the_key() -> None:
    content = noise(500)
    one, other = (set(all_cuts(AlignedContent(key), content)) for key in (KEY, bytes(32)))
    assert len(one & other) < len(one) / 2
    assert one == set(all_cuts(AlignedContent(KEY), content))


def test_chunks_have_their_usual_size() -> None:
    chunker = AlignedContent(KEY)
    cuts = all_cuts(chunker, noise(5000))
    assert 10 * GRAIN < 5000 * GRAIN / len(cuts) < 16 * GRAIN


@each_chunker
def test_a_stream_is_cut_lazily(chunker: Chunker) -> None:
    content = noise(3000)
    asked: list[tuple[int, int]] = []

    def read(start: int, length: int) -> memoryview:
        asked.append((start, length))
        return memoryview(content)[start : start + length]

    stream = cut(chunker, read, 0, len(content), step=64 * GRAIN)
    first = next(stream)
    assert asked == [(0, 64 * GRAIN)]
    assert [first, *stream] == all_cuts(chunker, content)


@pytest.mark.parametrize("size", [0, -GRAIN, 1000])
def test_sizes_that_are_no_blocks_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="4096"):
        FixedGrid(size)
    with pytest.raises(ValueError, match="4096"):
        AlignedContent(KEY, minimum=size)

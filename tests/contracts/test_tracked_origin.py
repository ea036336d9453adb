"""The origin contract on a change-tracked origin, with disks that grow, appear and lose their marks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.capture import Changed, Mark, Origin, Unknown
from tests.contracts.origin import OriginContract, check_changed
from tests.fakes.tracked_origin import TrackedOrigin

SIZE = 1 << 20


class TestTrackedOrigin(OriginContract):
    @pytest.fixture
    def origin(self) -> TrackedOrigin:
        self.source = TrackedOrigin({"a": SIZE, "b": 3 * SIZE + 512})
        self.source.write("a", b"first", 70000)
        return self.source

    def disturb(self) -> None:
        self.source.write("a", b"second", 70000)

    def left_alone(self, origin: Origin) -> None:
        assert self.source.open_captures == 0


def marks(origin: TrackedOrigin) -> dict[str, Mark]:
    with origin.capture() as capture:
        return {key: disk.mark for key, disk in capture.disks.items() if disk.mark is not None}


def test_c3_a_grown_disk_changed_past_its_old_size() -> None:
    origin = TrackedOrigin({"a": SIZE})
    since = marks(origin)
    origin.grow("a", 2 * SIZE)
    with origin.capture(since) as capture:
        answer = capture.changes("a")
        assert isinstance(answer, Changed)
        check_changed(answer, 2 * SIZE)
        assert sum(extent.length for extent in answer.extents) == SIZE
        assert answer.extents[0].start == SIZE


def test_c4_a_disk_that_was_added_is_unknown() -> None:
    origin = TrackedOrigin({"a": SIZE})
    since = marks(origin)
    origin.add("b", SIZE)
    with origin.capture(since) as capture:
        assert isinstance(capture.changes("a"), Changed)
        assert isinstance(capture.changes("b"), Unknown)


def test_c4_a_lost_mark_is_unknown() -> None:
    origin = TrackedOrigin({"a": SIZE})
    since = marks(origin)
    origin.lose_tracking("a")
    with origin.capture(since) as capture:
        assert isinstance(capture.changes("a"), Unknown)


@given(
    before=st.lists(st.tuples(st.integers(0, SIZE - 300), st.binary(min_size=1, max_size=300)), max_size=8),
    after=st.lists(st.tuples(st.integers(0, SIZE - 300), st.binary(min_size=1, max_size=300)), max_size=8),
    growth=st.sampled_from([0, 512, 100_000]),
)
def test_c3_the_changes_make_the_old_copy_the_new(
    before: list[tuple[int, bytes]], after: list[tuple[int, bytes]], growth: int
) -> None:
    origin = TrackedOrigin({"a": SIZE})
    for offset, data in before:
        origin.write("a", data, offset)
    old = bytes(origin.content["a"])
    since = marks(origin)
    origin.grow("a", SIZE + growth)
    for offset, data in after:
        origin.write("a", data, offset)
    with origin.capture(since) as capture:
        answer = capture.changes("a")
        assert isinstance(answer, Changed)
        source = capture.disks["a"].source
        check_changed(answer, source.size)
        copy = bytearray(old) + bytes(growth)
        for extent in answer.extents:
            source.readinto(memoryview(copy)[extent.start : extent.end], extent.start)
    assert copy == origin.content["a"]

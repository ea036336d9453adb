"""What every ``Origin`` and its captures must do: C1 to C7 of ``formats.capture``, one test or more for each number.

An origin's test module inherits ``OriginContract`` and gives the fixtures ``origin`` and, where the origin can be opened a second time (as
a later process would), ``later``. ``disturb`` changes the source while a capture is open; ``left_alone`` raises if a closed capture
left anything on the source. Where captures are dear, inherit the two halves apart: in ``OpenCaptureContract`` the fixture ``opened``,
which is one open capture, may then be given a wider scope.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from formats.block import BlockSource, Kind
from formats.capture import Capture, Changed, Consistency, Mark, Origin, Unknown

_SAMPLE = 1 << 16
_PLACES = 12


def sample(source: BlockSource) -> list[bytes]:
    """Some ranges of the disk: its ends, and where its first DATA extents lie."""
    places = [0, max(0, source.size - _SAMPLE)]
    for extent in source.extents(0, source.size):
        if extent.kind is Kind.DATA:
            places.append(extent.start)
        if len(places) >= _PLACES:
            break
    found = []
    for place in places:
        block = bytearray(min(_SAMPLE, source.size - place))
        source.readinto(memoryview(block), place)
        found.append(bytes(block))
    return found


class OpenCaptureContract:
    """What one open capture must do: C1, C2, C4, C6. Gives the fixture ``opened``; needs ``origin``."""

    @pytest.fixture
    def opened(self, origin: Origin) -> Iterator[Capture]:
        with origin.capture() as capture:
            yield capture

    @pytest.fixture
    def later(self, origin: Origin) -> Origin:
        return origin

    def disturb(self) -> None:
        """Change the source."""

    def test_c1_disks_are_the_machines_or_named_by_a_notice(self, opened: Capture) -> None:
        known = [disk.id for disk in opened.machine.disks]
        assert len(known) == len(set(known))
        assert opened.disks
        assert set(opened.disks) <= set(known)
        named = {notice.subject for notice in opened.notices}
        assert set(known) - set(opened.disks) <= named

    def test_c1_sizes_are_the_records(self, opened: Capture) -> None:
        for key, disk in opened.disks.items():
            assert disk.source.size == opened.machine.disk(key).size

    def test_c2_an_open_capture_answers_the_same_bytes(self, opened: Capture) -> None:
        held = {key: disk for key, disk in opened.disks.items() if disk.consistency is not Consistency.FUZZY}
        before = {key: sample(disk.source) for key, disk in held.items()}
        self.disturb()
        assert {key: sample(disk.source) for key, disk in held.items()} == before

    def test_c4_without_a_mark_all_is_unknown(self, opened: Capture) -> None:
        for key in opened.disks:
            answer = opened.changes(key)
            assert isinstance(answer, Unknown)
            assert answer.reason

    def test_c6_marks_survive_json_and_a_later_process(self, opened: Capture, later: Origin) -> None:
        marks = {key: disk.mark for key, disk in opened.disks.items() if disk.mark is not None}
        again = {key: Mark(mark) for key, mark in json.loads(json.dumps(marks)).items()}
        assert again == marks
        if marks:
            with later.capture(again) as capture:
                for key in marks:
                    answer = capture.changes(key)
                    assert isinstance(answer, Changed)
                    check_changed(answer, capture.disks[key].source.size)


class ReleaseContract:
    """What captures that come and go must do: C4, C5, C7. Needs ``origin``; no other capture may be open on the source."""

    def left_alone(self, origin: Origin) -> None:
        """Raise if something of a closed capture is left on the source."""

    def test_c4_a_mark_nobody_knows_is_unknown(self, origin: Origin) -> None:
        known = [disk.id for disk in origin.inspect().disks]
        with origin.capture({key: Mark("nobody gave this") for key in known}) as capture:
            assert all(isinstance(capture.changes(key), Unknown) for key in capture.disks)

    def test_c5_leaving_releases_all_and_leaving_twice_is_harmless(self, origin: Origin) -> None:
        capture = origin.capture()
        with capture:
            pass
        capture.__exit__(None, None, None)
        self.left_alone(origin)

    def test_c5_an_error_inside_releases_all(self, origin: Origin) -> None:
        with pytest.raises(KeyError), origin.capture():
            raise KeyError
        self.left_alone(origin)

    def test_c7_retiring_an_unknown_mark_is_harmless(self, origin: Origin) -> None:
        origin.retire([Mark("nobody gave this")])
        origin.retire([])


class OriginContract(OpenCaptureContract, ReleaseContract):
    """All of it. Inherit and give the fixture ``origin``."""


def check_changed(answer: Changed, size: int) -> None:
    """C3: DATA or ZERO only, ascending, merged, inside the disk."""
    position, kind = -1, None
    for extent in answer.extents:
        assert extent.kind in {Kind.DATA, Kind.ZERO}
        assert extent.length > 0
        assert extent.start >= position
        assert extent.start > position or extent.kind is not kind
        position, kind = extent.end, extent.kind
    assert position <= size

"""The screen's time line: what changed, evenly, and never too much of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from p2v.target.screens import SCREENSHOTS_MOST, ScreenLog


def _picture(number: int) -> tuple[int, int, memoryview]:
    return 2, 1, memoryview(number.to_bytes(6, "big"))


def test_only_what_changed_is_kept_and_the_end_in_any_case(tmp_path: Path) -> None:
    log = ScreenLog(tmp_path / "screens", interval=2)
    for now, number in ((0.0, 1), (0.5, 2), (2.5, 1), (5.0, 3), (5.5, 4)):
        log.see(_picture(number), now)
    log.see(_picture(5), 5.6, last=True)
    assert [shot.seconds for shot in log.screenshots] == [0.0, 5.0, 5.6]


def test_a_long_boot_is_covered_evenly(tmp_path: Path) -> None:
    log = ScreenLog(tmp_path, interval=1)
    for number in range(2000):
        log.see(_picture(number), float(number))
    shots = log.screenshots
    assert SCREENSHOTS_MOST / 3 < len(shots) <= SCREENSHOTS_MOST
    assert sorted(tmp_path.iterdir()) == sorted(Path(shot.path) for shot in shots)
    gaps = [after.seconds - before.seconds for before, after in pairwise(shots)]
    assert max(gaps) <= 2 * min(gaps)
    assert shots[-1].seconds > 1800

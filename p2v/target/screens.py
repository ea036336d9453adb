"""The screen of a booting machine as a time line of pictures."""

from __future__ import annotations

import contextlib
from pathlib import Path

from p2v.emulator import Picture, png_of
from p2v.target.verdict import Screenshot

SCREENSHOTS_MOST = 24
"""Pictures that are kept of one boot."""

_INTERVAL = 2.0  # seconds between two pictures, at first


class ScreenLog:
    """Writes the screen as PNG files into ``folder`` whenever it has changed, at most every ``interval`` seconds.

    When there are too many, every second one goes and the interval doubles: a boot of any length is covered evenly.
    """

    def __init__(self, folder: Path, *, interval: float = _INTERVAL) -> None:
        self._folder, self._interval = folder, interval
        self._kept: list[Screenshot] = []
        self._last = -interval
        self._seen: bytes | None = None

    @property
    def screenshots(self) -> tuple[Screenshot, ...]:
        """What was kept, oldest first."""
        return tuple(self._kept)

    def see(self, picture: Picture, now: float, *, last: bool = False) -> None:
        """Look at the screen; ``now`` is seconds since the start. The ``last`` one is kept whatever the interval says."""
        width, height, pixels = picture
        if now - self._last < self._interval and not last:
            return
        content = bytes(pixels)
        if content == self._seen:
            return
        self._seen, self._last = content, now
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{round(now * 10):06d}.png"
        path.write_bytes(png_of(width, height, pixels))
        self._kept.append(Screenshot(seconds=round(now, 1), path=str(path)))
        if len(self._kept) > SCREENSHOTS_MOST:
            self._thin()

    def _thin(self) -> None:
        for gone in self._kept[1::2]:
            with contextlib.suppress(OSError):
                Path(gone.path).unlink()
        self._kept = self._kept[::2]
        self._interval *= 2

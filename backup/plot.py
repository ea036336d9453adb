"""Small pictures of numbers, as SVG that stands in a page, whose style gives the colours; and text as pages may hold it."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence

from p2v.console import human_time

_WIDTH = 1000
_POINTS_MOST = 200
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2


def printable(text: str) -> str:
    """Text without the characters that XML and HTML may not hold."""
    return _NOT_XML.sub("\ufffd", text)


def escaped(text: str) -> str:
    """Text for any place in a page, attributes among them."""
    return html.escape(printable(text), quote=True)


def bars(parts: Sequence[tuple[str, float]]) -> str:
    """Steps one after the other on one time axis, each with its name and seconds; empty for none."""
    shown = [(name, seconds) for name, seconds in parts if seconds >= 0]
    whole = sum(seconds for _, seconds in shown)
    if not whole:
        return ""
    row, left, room = 24, 90, _WIDTH - 90 - 110
    out, position = [], 0.0
    for number, (name, seconds) in enumerate(shown):
        y, x = number * row, left + room * position / whole
        width = max(1.5, room * seconds / whole)
        out.append(
            f'<text class="label" x="0" y="{y + 16}">{escaped(name)}</text>'
            f'<rect class="bar" x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="15" rx="2"/>'
            f'<text x="{x + width + 6:.1f}" y="{y + 16}">{human_time(seconds)}</text>'
        )
        position += seconds
    height = row * len(shown)
    return f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img">{"".join(out)}</svg>'


def trend(drills: Sequence[tuple[str, float, str]]) -> str:
    """Time, RTO in seconds (0: none was measured) and result of each drill, oldest first: a line, and a dot a drill. Empty for none."""
    shown = drills[-_POINTS_MOST:]
    if not shown:
        return ""
    height, left, right, top, bottom = 190, 70, 20, 14, 30
    ceiling = _ceiling(max(rto for _, rto, _ in shown))
    step = (_WIDTH - left - right) / max(1, len(shown) - 1)
    out = []
    for fraction in (0.0, 0.5, 1.0):
        y = height - bottom - (height - top - bottom) * fraction
        out.append(
            f'<line class="axis" x1="{left}" x2="{_WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{human_time(ceiling * fraction)}</text>'
        )
    places = [
        (left + (step * number if len(shown) > 1 else 20), height - bottom - (height - top - bottom) * rto / ceiling)
        for number, (_, rto, _) in enumerate(shown)
    ]
    measured = [f"{x:.1f},{y:.1f}" for (x, y), (_, rto, _) in zip(places, shown, strict=True) if rto]
    if len(measured) > 1:
        out.append(f'<polyline class="line" points="{" ".join(measured)}"/>')
    for (x, y), (time, rto, result) in zip(places, shown, strict=True):
        kind = result if result in ("pass", "fail", "unproven") else "unproven"
        words = escaped(f"{time}: {result}{f', {human_time(rto)}' if rto else ''}")
        out.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{words}</title></circle>')
    ends = [(0, "start")] if len(shown) == 1 else [(0, "start"), (len(shown) - 1, "end")]
    for number, anchor in ends:
        day = escaped(shown[number][0][:16].replace("T", " "))
        out.append(f'<text x="{places[number][0]:.1f}" y="{height - 8}" text-anchor="{anchor}">{day}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img">{"".join(out)}</svg>'


def _ceiling(value: float) -> float:
    """A round number of seconds that is not below ``value``."""
    if value <= 0:
        return 60.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * factor for factor in (1, 2, 3, 4, 5, 6, 8, 10) if unit * factor >= value)

"""The report: everything a machine printed is text and nothing else, in every form; and a browser shows it."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backup.drill import Detector, Drilled, PastDrill, Step
from backup.plot import bars, trend
from backup.report import document, junit, page
from backup.sabotage import Sabotage
from p2v.emulator import png_of
from p2v.target.disks import DiskProof
from p2v.target.verdict import Finding, Level, Result, Screenshot, Severity, Signal, Verdict
from tests.requirement import missing

HOSTILE = "</pre></style><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&\x00\x1b[31m\ufffe"


def sample(folder: Path, text: str = "metal1 login:", result: Result = Result.PASS) -> Drilled:
    """A drill with something in every part of the page, ``text`` wherever the machine can put it."""
    (folder / "console.log").write_bytes(f"[  0.0] Linux version 6.1\r\n{text}\r\n".encode())
    picture = png_of(64, 40, memoryview(bytes(range(256)) * 30))
    (folder / "000012.png").write_bytes(picture)
    finding = Finding(code="probe-failed", severity=Severity.ERROR, message=f"m {text}", fix=f"f {text}", evidence=text)
    verdict = Verdict(
        level=Level.BOOTS, result=result, signals=(Signal(code="login-prompt", stream="serial", seconds=52.0, text=text),),
        findings=(finding,) if result is not Result.PASS else (), seconds=52.0, console=str(folder / "console.log"),
        screenshots=(Screenshot(seconds=1.2, path=str(folder / "000012.png")),), hardware="pc/bios", accelerator="tcg",
    )  # fmt: skip
    return Drilled(
        point="ab" * 32, machine=f"web {text}", point_time="2026-11-25T19:12:17+00:00", time="2026-11-26T01:00:00+00:00",
        mode="repository", result=result, verdict=verdict, disks=(DiskProof(disk=text, result=Result.PASS, holds=text),),
        detectors=(Detector(sabotage=Sabotage.ROOT, done=(text,), result=Result.FAIL, reason=text, held=True),),
        steps=(Step(name=text, seconds=2.0), Step(name="userland", seconds=50.0)), rto=52.0, bytes_read=1 << 27, group=text,
    )  # fmt: skip


PAST = [
    PastDrill(time=f"2026-11-{day:02d}T01:00:00+00:00", point="ab", mode="repository", result=result, rto=rto)
    for day, result, rto in ((1, "pass", 40.0), (8, "fail", 0.0), (15, "pass", 48.0), (22, "pass", 52.0))
]


class _Elements(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}


def elements(text: str) -> _Elements:
    parser = _Elements()
    parser.feed(text)
    return parser


@pytest.mark.parametrize("result", list(Result))
def test_hostile_output_is_text(tmp_path: Path, result: Result) -> None:
    drill = sample(tmp_path, HOSTILE, result)
    text = page([drill], {drill.machine: PAST})
    plain = sample(tmp_path, "harmless", result)
    expected = elements(page([plain], {plain.machine: PAST}))
    shown = elements(text)
    assert (shown.found, shown.attributes) == (expected.found, expected.attributes)
    assert "script" not in shown.found
    assert not [name for name in shown.attributes if name.startswith("on")]
    assert "&lt;script&gt;" in text
    assert not re.search("[\x00\x1b\ufffe]", text)
    assert re.search(r"""Content-Security-Policy" content="default-src 'none'""", text)
    assert not re.search(r"""(?:src|href)="(?!data:image/png;base64,|#)""", text)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60), result=st.sampled_from(list(Result)))
def test_junit_and_json_hold_any_text(tmp_path: Path, text: str, result: Result) -> None:
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        return  # no console log gives half a character
    drill = sample(tmp_path, text, result)
    root = ElementTree.fromstring(junit([drill, replace(drill, group="other")]))
    suites = list(root)
    assert sum(int(suite.get("tests", "0")) for suite in suites) == 6
    assert sum(int(suite.get("failures", "0")) for suite in suites) == (2 if result is Result.FAIL else 0)
    assert sum(int(suite.get("errors", "0")) for suite in suites) == (2 if result is Result.UNPROVEN else 0)
    assert json.loads(document([drill]))["drills"][0]["machine"] == drill.machine


def test_what_is_missing_is_no_error(tmp_path: Path) -> None:
    drill = sample(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    text = page([drill], {})
    assert "<img" not in text
    assert "<details" not in text
    assert page([], {})


def test_a_picture_that_is_none_is_left_out(tmp_path: Path) -> None:
    drill = sample(tmp_path)
    (tmp_path / "000012.png").write_bytes(b"<svg onload=alert(1)>")
    assert "<img" not in page([drill], {})


def test_the_plots_hold_what_they_are_given() -> None:
    assert bars([]) == trend([]) == ""
    for svg in (
        bars([("<b>", 1.5), ("b", 0.0)]),
        trend([("t<", 0.0, "fail")]),
        trend([("a", 1.0, "pass"), ("b", 9e9, "x")]),
    ):
        root = ElementTree.fromstring(svg)
        width, height = (float(root.get(name, "0")) for name in ("width", "height"))
        for circle in root.iter("circle"):
            assert 0 <= float(circle.get("cx", "-1")) <= width
            assert 0 <= float(circle.get("cy", "-1")) <= height
    assert len(list(ElementTree.fromstring(trend([("t", 5.0, "pass")] * 900)).iter("circle"))) == 200


# -- in a browser ----------------------------------------------------------------------------------------------------

_BROWSER = next((name for name in ("chromium", "chromium-browser", "google-chrome") if not missing(name)), "")
browser = pytest.mark.skipif(not _BROWSER, reason="not installed: chromium (Debian: apt-get install chromium)")


def chromium(tmp_path: Path, *words: str) -> str:
    """What headless Chromium prints."""
    command = [
        _BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@browser
@pytest.mark.parametrize("width", [1280, 480])
def test_a_browser_shows_the_page_as_it_is_meant(tmp_path: Path, width: int) -> None:
    drill = sample(tmp_path, HOSTILE, Result.FAIL)
    path = tmp_path / "report.html"
    path.write_text(page([drill], {drill.machine: PAST}))
    shown = chromium(tmp_path, f"--window-size={width},2000", "--dump-dom", path.as_uri())
    parsed = elements(shown)
    assert "script" not in parsed.found
    assert "<title>Restore drill: 0 of 1 machines work</title>" in shown
    # The page's own width is the window's: nothing sticks out. A frame around it measures, as the page itself runs no script.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="report.html" style="border:0;width:{width}px;height:900px" onload="'
        "const d=this.contentDocument;const i=d.images[0];"
        "document.title=[d.documentElement.scrollWidth,i.naturalWidth,d.title,d.querySelectorAll('svg').length].join('|')"
        '"></iframe>'
    )
    measured = chromium(
        tmp_path, "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()
    )
    title = re.search("<title>(.*?)</title>", measured)
    assert title is not None, measured[:500]
    assert title[1] == f"{width}|64|Restore drill: 0 of 1 machines work|2"


@browser
def test_a_screenshot_of_the_page_has_the_verdict_s_colour(tmp_path: Path) -> None:
    drill = sample(tmp_path, "metal1 login:", Result.FAIL)
    (tmp_path / "report.html").write_text(page([drill], {drill.machine: PAST}))
    picture = tmp_path / "shot.png"
    chromium(tmp_path, "--window-size=1000,900", f"--screenshot={picture}", (tmp_path / "report.html").as_uri())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000

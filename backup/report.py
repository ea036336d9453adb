"""What a run of drills is told as: one HTML file that needs nothing else, JUnit XML, and JSON.

What a machine printed is untrusted: every text is escaped, the page runs no script and may load nothing (its content security policy says
so), pictures are made here from pixels, and everything is bounded.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

import msgspec

from backup.drill import Drilled, PastDrill, history
from backup.plot import bars, escaped, printable, trend
from backup.repository import Repository
from p2v.console import human_size, human_time
from p2v.emulator.console import plain
from p2v.target.verdict import Finding, Result

REPORT, JUNIT, DOCUMENT = "report.html", "junit.xml", "drill.json"

_CONSOLE_TAIL = 64 << 10  # bytes of the console that the page shows
_PICTURE_LIMIT = 4 << 20  # bytes of one picture
_PICTURES = 24
_KEPT = 30  # reports in the folder that is used when none is named
_WORDS = {Result.PASS: "works", Result.FAIL: "does not work", Result.UNPROVEN: "unproven"}
_DISK_WORDS = {Result.PASS: "sound", Result.FAIL: "damaged", Result.UNPROVEN: "unproven"}


def new_folder() -> Path:
    """Where a report goes that was given no folder; it is not made yet. Of the older ones there the newest are kept."""
    home = os.environ.get("XDG_STATE_HOME", "")
    root = (Path(home) if home.startswith("/") else Path.home() / ".local" / "state") / "p2v-toolkit" / "drills"
    for old in sorted(path for path in root.glob("*Z-*") if path.is_dir())[: -_KEPT + 1]:
        shutil.rmtree(old, ignore_errors=True)
    return root / datetime.now(UTC).strftime(f"%Y%m%dT%H%M%SZ-{os.getpid()}")


def write_report(folder: Path, repository: Repository, drills: Sequence[Drilled]) -> list[Drilled]:
    """Take the drills' evidence into ``folder`` and write all three forms beside it; each appears whole or not at all, the page last.

    ``folder`` is made if it is not there. Returns the drills with their evidence where it is now.
    """
    known = repository.points()
    past = {name: history(repository, name, known) for name in {drilled.machine for drilled in drills}}
    text = page(drills, past).encode()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # consoles tell much about a machine
    kept = [_taken(drilled, folder) for drilled in drills]
    _write(folder / DOCUMENT, document(kept))
    _write(folder / JUNIT, junit(kept))
    _write(folder / REPORT, text)
    return kept


def _taken(drilled: Drilled, folder: Path) -> Drilled:
    if not drilled.folder:
        return drilled
    old = Path(drilled.folder)
    new = folder / old.name
    if new.exists():
        shutil.rmtree(new)
    shutil.move(old, new)
    return drilled.moved(new)


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def document(drills: Sequence[Drilled]) -> bytes:
    """The JSON: the drills as `p2v-backup drill --json` shows them."""
    shown = [{**d.document(), "point": d.point, "group": d.group, "folder": d.folder} for d in drills]
    return msgspec.json.format(msgspec.json.encode({"version": 1, "drills": shown}), indent=2) + b"\n"


# -- JUnit -----------------------------------------------------------------------------------------------------------


def junit(drills: Sequence[Drilled]) -> bytes:
    """JUnit XML: a suite a group; a case for each machine's boot, data disk and copy broken on purpose. Unproven is an error."""
    root = ElementTree.Element("testsuites", name="p2v-backup drill")
    for group in dict.fromkeys(drilled.group for drilled in drills):
        suite = ElementTree.SubElement(root, "testsuite", name=printable(group or "drill"))
        for drilled in (d for d in drills if d.group == group):
            _cases(suite, drilled)
        cases = list(suite)
        suite.set("tests", str(len(cases)))
        suite.set("failures", str(sum(case.find("failure") is not None for case in cases)))
        suite.set("errors", str(sum(case.find("error") is not None for case in cases)))
        suite.set("time", f"{sum(float(case.get('time', '0')) for case in cases):.1f}")
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _cases(suite: ElementTree.Element, drilled: Drilled) -> None:
    name, verdict = drilled.machine, drilled.verdict
    outcome = (verdict.result, verdict.findings)
    case = _case(suite, name, f"boots from point {drilled.point[:8]}", outcome, seconds=verdict.seconds)
    ElementTree.SubElement(case, "system-out").text = printable(
        "\n".join(signal.describe() for signal in verdict.signals)
    )
    for disk in drilled.disks:
        _case(suite, name, f"disk {disk.disk}", (disk.result, disk.findings))
    for detector in drilled.detectors:
        held = Result.PASS if detector.held else Result.FAIL
        findings = [f for f in drilled.findings if f.code == "detector-blind"]
        _case(suite, name, f"broken on purpose: {detector.sabotage}", (held, findings))


def _case(
    suite: ElementTree.Element,
    machine: str,
    name: str,
    outcome: tuple[Result, Sequence[Finding]],
    *,
    seconds: float = 0.0,
) -> ElementTree.Element:
    result, findings = outcome
    case = ElementTree.SubElement(
        suite, "testcase", classname=printable(machine), name=printable(name), time=f"{seconds:.1f}"
    )
    if result is not Result.PASS:
        message = next((f.message for f in findings), "nothing was seen")
        kind = "failure" if result is Result.FAIL else "error"
        problem = ElementTree.SubElement(case, kind, message=printable(message), type=str(result))
        problem.text = printable("\n".join(finding.describe() for finding in findings))
    return case


# -- HTML ------------------------------------------------------------------------------------------------------------


def page(drills: Sequence[Drilled], past: dict[str, list[PastDrill]]) -> str:
    """The page; ``past`` are the drills so far by machine, for the trend."""
    worst = next((r for r in (Result.FAIL, Result.UNPROVEN) if any(d.result is r for d in drills)), Result.PASS)
    good = sum(d.result is Result.PASS for d in drills)
    title = f"Restore drill: {good} of {len(drills)} machines work"
    sections = "\n".join(_section(number, d, past.get(d.machine, [])) for number, d in enumerate(drills))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>
<header class="{worst}"><h1>{escaped(title)}</h1><p>{escaped(_minute(max((d.time for d in drills), default="")))}</p></header>
<main>{_overview(drills)}{sections}</main></body></html>
"""


def _overview(drills: Sequence[Drilled]) -> str:
    rows = "".join(
        f'<tr><td><a href="#d{number}">{escaped(d.machine)}</a></td><td>{_badge(d.result)}</td><td class="n">'
        f"{human_time(d.rto) if d.rto else '–'}</td><td>{escaped(d.mode)}</td>"
        f"<td><code>{escaped(d.point[:8])}</code> {escaped(_minute(d.point_time))}</td>"
        f"<td>{escaped(d.reason)}</td></tr>"
        for number, d in enumerate(drills)
    )
    return (
        '<div class="wide"><table><thead><tr><th>machine</th><th>result</th><th>RTO</th><th>from</th><th>point</th><th>because</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _section(number: int, drilled: Drilled, past: Sequence[PastDrill]) -> str:
    verdict = drilled.verdict
    facts = [
        ("point", f"{drilled.point[:16]}, taken {_minute(drilled.point_time)}"),
        ("proven", f"{verdict.level}: {verdict.result}"),
        ("RTO", human_time(drilled.rto) if drilled.rto else "not measured: it was not seen to work"),
        ("hardware", f"{verdict.hardware}, {verdict.accelerator}".strip(", ")),
        ("read", f"{human_size(drilled.bytes_read)} ({drilled.mode})"),
        ("group", drilled.group),
    ]
    listed = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in facts if value)
    parts = [
        f'<section id="d{number}"><h2>{escaped(drilled.machine)} {_badge(drilled.result)}</h2>',
        f'<p class="because">{escaped(drilled.reason)}</p><dl>{listed}</dl>',
        _findings(drilled.findings),
        _part("Where the time went", bars([(step.name, step.seconds) for step in drilled.steps])),
        _part("Seen", _signals(drilled)),
        _part("Disks that are not booted from", _disks(drilled)),
        _part("Broken on purpose", _detectors(drilled)),
        _part("Screen", _screens(drilled)),
        _part("RTO of this machine's drills", trend([(d.time, d.rto, d.result) for d in past])),
        _console(drilled),
        "</section>",
    ]
    return "".join(parts)


def _part(title: str, content: str) -> str:
    return f"<h3>{escaped(title)}</h3>{content}" if content else ""


def _badge(result: Result, words: Mapping[Result, str] = _WORDS) -> str:
    return f'<span class="badge {result}">{escaped(words[result])}</span>'


def _findings(findings: Sequence[Finding]) -> str:
    items = "".join(
        f'<li class="{f.severity}"><strong>{escaped(f.message)}</strong> <code>{escaped(f.code)}</code>'
        + (f"<blockquote>{escaped(f.evidence)}</blockquote>" if f.evidence else "")
        + (f"<p>{escaped(f.fix)}</p>" if f.fix else "")
        + "</li>"
        for f in findings
    )
    return f'<ul class="findings">{items}</ul>' if items else ""


def _signals(drilled: Drilled) -> str:
    rows = "".join(
        f'<tr><td class="n">{s.seconds:.1f} s</td><td>{escaped(s.code)}</td><td>{escaped(s.stream)}</td>'
        f"<td><code>{escaped(s.text)}</code></td></tr>"
        for s in sorted(drilled.verdict.signals, key=lambda s: s.seconds)
    )
    return f'<div class="wide"><table class="signals"><tbody>{rows}</tbody></table></div>' if rows else ""


def _disks(drilled: Drilled) -> str:
    rows = "".join(
        f"<tr><td><code>{escaped(d.disk)}</code></td><td>{_badge(d.result, _DISK_WORDS)}</td>"
        f"<td>{escaped(d.holds or 'nothing was recognised')}</td></tr>"
        for d in drilled.disks
    )
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>' if rows else ""


def _detectors(drilled: Drilled) -> str:
    rows = "".join(
        f"<tr><td>{escaped('; '.join(d.done))}</td><td>judged {escaped(str(d.result))}</td>"
        f"<td>{'as it must be' if d.held else '<b>which is wrong</b>'}</td><td>{escaped(d.reason)}</td></tr>"
        for d in drilled.detectors
    )
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>' if rows else ""


def _screens(drilled: Drilled) -> str:
    return "".join(_pictures(drilled)) and f'<div class="screens">{"".join(_pictures(drilled))}</div>'


def _pictures(drilled: Drilled) -> Iterator[str]:
    for shot in drilled.verdict.screenshots[-_PICTURES:]:
        content = _read(Path(shot.path), _PICTURE_LIMIT + 1)
        if content.startswith(b"\x89PNG") and len(content) <= _PICTURE_LIMIT:
            data = base64.b64encode(content).decode()
            yield (
                f'<figure><img alt="the screen after {shot.seconds:.1f} s" src="data:image/png;base64,{data}">'
                f"<figcaption>{shot.seconds:.1f} s</figcaption></figure>"
            )


def _console(drilled: Drilled) -> str:
    path = Path(drilled.verdict.console)
    if not drilled.verdict.console:
        return ""
    with contextlib.suppress(OSError):
        size = path.stat().st_size
        with path.open("rb") as stream:
            stream.seek(max(0, size - _CONSOLE_TAIL))
            text = plain(stream.read(_CONSOLE_TAIL).decode("utf-8", "replace")).strip()
        cut = f" (its last {human_size(_CONSOLE_TAIL)} of {human_size(size)})" if size > _CONSOLE_TAIL else ""
        opened = "" if drilled.result is Result.PASS else " open"
        if text:
            lines = re.sub(r"\n{2,}", "\n", text)
            return f"<details{opened}><summary>Serial console{cut}</summary><pre>{escaped(lines)}</pre></details>"
    return ""


def _read(path: Path, most: int) -> bytes:
    with contextlib.suppress(OSError), path.open("rb") as stream:
        return stream.read(most)
    return b""


def _minute(time: str) -> str:
    """A time of the record (RFC 3339) for a person, in UTC."""
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(time).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return time


_STYLE = """
:root{--back:#fff;--text:#1c2024;--soft:#60646c;--line:#e0e3e8;--panel:#f6f7f9;--good:#18794e;--bad:#c62a2f;--doubt:#a35200;--bar:#3e63dd}
@media(prefers-color-scheme:dark){:root{--back:#111316;--text:#edeef0;--soft:#a6abb4;--line:#2e3238;--panel:#1a1d21;--good:#3dd68c;--bad:#ff9592;
--doubt:#ffca16;--bar:#9eb1ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--text);font:15px/1.5 system-ui,"Segoe UI","DejaVu Sans",sans-serif}
header{padding:24px max(24px,calc(50vw - 536px));border-bottom:1px solid var(--line);border-top:6px solid var(--good)}
header.fail{border-top-color:var(--bad)}header.unproven{border-top-color:var(--doubt)}
header p{margin:4px 0 0;color:var(--soft)}h1{margin:0;font-size:24px}h1,h2,p,li,td,summary{overflow-wrap:anywhere}
h2{font-size:20px;margin:0 0 4px}
td:nth-child(4){overflow-wrap:normal}
h3{font-size:13px;margin:28px 0 8px;color:var(--soft);font-weight:600}
main{max-width:1120px;margin:0 auto;padding:24px}section{margin-top:40px;padding-top:28px;border-top:1px solid var(--line)}
table{border-collapse:collapse;width:100%}th{color:var(--soft);font-weight:600;font-size:13px}
td,th{padding:6px 14px 6px 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
td.n{white-space:nowrap;font-variant-numeric:tabular-nums}
.signals td{border:0;white-space:nowrap;padding-top:2px;padding-bottom:2px}.signals td:last-child{white-space:normal;width:100%}
.wide{overflow-x:auto}
code,pre{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:13px}code{overflow-wrap:anywhere}
a{color:var(--bar)}.badge{font-size:13px;font-weight:600;padding:1px 9px;border-radius:10px;border:1px solid;white-space:nowrap}
.badge.pass{color:var(--good)}.badge.fail{color:var(--bad)}.badge.unproven{color:var(--doubt)}h2 .badge{vertical-align:3px;margin-left:6px}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:2px 18px;margin:12px 0}dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
.because{margin:0;color:var(--soft)}.findings{list-style:none;padding:0;margin:16px 0}
.findings li{background:var(--panel);border-left:4px solid var(--line);padding:10px 14px;margin:8px 0;border-radius:0 6px 6px 0}
.findings li.error{border-color:var(--bad)}.findings li.warning{border-color:var(--doubt)}.findings p{margin:4px 0 0}
blockquote{margin:6px 0 0;font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:13px;overflow-wrap:anywhere;color:var(--soft)}
.screens{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(250px,1fr))}
figure{margin:0}
figure img{width:100%;display:block;border:1px solid var(--line);border-radius:4px}
figcaption{font-size:13px;color:var(--soft);margin-top:3px}
details{margin-top:28px}summary{cursor:pointer;color:var(--soft);font-size:13px;font-weight:600}
pre{background:var(--panel);padding:14px;border-radius:6px;overflow:auto;max-height:480px;white-space:pre-wrap;overflow-wrap:anywhere}
svg{display:block;max-width:100%;height:auto}svg text{fill:var(--soft);font:12px system-ui,"DejaVu Sans",sans-serif}
svg .bar{fill:var(--bar)}svg .line{fill:none;stroke:var(--bar);stroke-width:2}svg .axis{stroke:var(--line)}
svg .pass{fill:var(--good)}svg .fail{fill:var(--bad)}svg .unproven{fill:var(--doubt)}svg .label{fill:var(--text)}
"""

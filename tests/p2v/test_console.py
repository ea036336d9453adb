"""What a run shows, on a terminal and off it."""

from __future__ import annotations

import io
import json

import pytest

from formats.errors import NoSpaceError, Notice, UsageError
from p2v.console import Console, human_size, human_time


class Clock:
    """A clock that tests move by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def console(**settings: bool) -> tuple[Console, io.StringIO, io.StringIO, Clock]:
    out, err, clock = io.StringIO(), io.StringIO(), Clock()
    return Console(stdout=out, stderr=err, clock=clock, **settings), out, err, clock  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (6 << 30, "6 GiB"),
        (1000 << 20, "1000 MiB"),
        (16 << 40, "16 TiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert human_size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (99.9, "99.9 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert human_time(seconds) == text


def test_envelope_of_a_good_run() -> None:
    subject, out, err, _ = console(json_output=True)
    subject.data["answer"] = 42
    subject.say("not for machines")
    assert subject.finish("inspect") == 0
    assert json.loads(out.getvalue()) == {
        "version": 1, "command": "inspect", "status": "ok", "exit_code": 0, "data": {"answer": 42}, "notices": [], "errors": [],
    }  # fmt: skip
    assert err.getvalue() == ""


def test_a_notice_makes_exit_code_3_and_counts_once() -> None:
    subject, out, err, _ = console(json_output=True)
    notice = Notice(code="fuzzy", message="read while it changed", advice="free some extents", subject="sda")
    subject.notice(notice)
    subject.notice(notice)
    assert subject.finish("convert") == 3
    envelope = json.loads(out.getvalue())
    assert envelope["status"] == "notices"
    assert envelope["notices"] == [
        {"code": "fuzzy", "message": "read while it changed", "advice": "free some extents", "subject": "sda"}
    ]
    assert err.getvalue().count("read while it changed") == 1


def test_an_error_says_what_to_do() -> None:
    subject, out, err, _ = console()
    assert subject.finish("convert", NoSpaceError("the disk is full", advice="Free 3 GiB.", subject="/srv")) == 13
    assert out.getvalue() == ""
    assert err.getvalue() == "error: /srv: the disk is full\n       Free 3 GiB.\n"


def test_an_error_in_the_envelope() -> None:
    subject, out, _, _ = console(json_output=True)
    assert subject.finish("convert", UsageError("no such platform", advice="See p2v platforms.")) == 2
    envelope = json.loads(out.getvalue())
    assert envelope["status"] == "error"
    assert envelope["errors"] == [
        {
            "error": "UsageError",
            "exit_code": 2,
            "message": "no such platform",
            "advice": "See p2v platforms.",
            "subject": "",
        }
    ]


def test_log_json_lines_are_objects_with_zoned_times() -> None:
    subject, _, err, _ = console(log_json=True)
    subject.log("hello", facts={"disk": "sda"})
    subject.notice(Notice(code="c", message="m"))
    lines = [json.loads(line) for line in err.getvalue().splitlines()]
    assert [line["level"] for line in lines] == ["info", "warning"]
    assert lines[0]["disk"] == "sda"
    assert lines[0]["time"].endswith("+00:00")


def test_quiet_keeps_notices() -> None:
    subject, _, err, _ = console(quiet=True)
    subject.log("chatter")
    subject.notice(Notice(code="c", message="it matters"))
    assert "chatter" not in err.getvalue()
    assert "it matters" in err.getvalue()


def test_progress_off_a_terminal_tells_rate_and_time_left() -> None:
    subject, _, err, clock = console()
    line = subject.progress("copying sda")
    line.start("copy", 100 << 20)
    clock.now = 5.0
    line.advance(10 << 20)
    assert err.getvalue() == ""
    clock.now = 10.0
    line.advance(10 << 20)
    line.finish()
    assert err.getvalue() == "copying sda: 20 MiB of 100 MiB (20 %), 2 MiB/s, 40.0 s left\n"


def test_stages_are_timed_even_when_they_fail() -> None:
    subject, _, _, clock = console(json_output=True)
    with subject.stage("inspect"):
        clock.now = 2.5
    with pytest.raises(UsageError), subject.stage("copy"):
        clock.now = 4.0
        raise UsageError("no")
    assert [(stage.name, stage.seconds) for stage in subject.stages] == [("inspect", 2.5), ("copy", 1.5)]

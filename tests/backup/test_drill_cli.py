"""`p2v-backup drill` and `status` as a script meets them, and what `kill -9` leaves."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.backup.shell import Shell
from tests.p2v.boot_sector import Step, boot_disk
from tests.requirement import needs

pytestmark = needs("qemu-system-x86_64", "qemu-img")

_WORKS: tuple[Step, ...] = (("serial", "\nmetal1 login: "),)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    made = Shell(tmp_path)
    made.environment["TMPDIR"] = str(tmp_path)
    made("init")
    return made


def test_a_drill_ends_in_a_report_and_the_status_knows_it(shell: Shell, tmp_path: Path) -> None:
    shell("backup", str(boot_disk(tmp_path / "web.raw", _WORKS)))
    assert shell("status", "--max-drilled-age", "1d", expect=5)["data"]["machines"][0]["drilled"] == ""
    shell("status", "--max-backup-age", "1d")
    data = shell("drill", "web", "--fail-on-purpose", "boot-record", "--report", str(tmp_path / "report"))["data"]
    [drill] = data["drills"]
    assert (drill["result"], drill["level"], drill["mode"]) == ("pass", "boots", "repository")
    assert data["verdict"]["result"] == "pass"
    assert [d["held"] for d in drill["detectors"]] == [True]
    report = tmp_path / "report"
    assert data["report"] == str(report / "report.html")
    text = (report / "report.html").read_text()
    assert "metal1 login:" in text
    assert "data:image/png;base64," in text
    assert json.loads((report / "drill.json").read_bytes())["drills"][0]["rto"] == drill["rto"]
    suite = ElementTree.parse(report / "junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "0", "0")
    [machine] = shell("status", "--max-drilled-age", "1d", "--max-backup-age", "1d")["data"]["machines"]
    assert (machine["machine"], machine["last_drill"], machine["problems"]) == ("web", "pass", [])
    assert machine["drilled"] == drill["point"]
    assert machine["rto"] == drill["rto"]
    [point] = shell("points")["data"]["points"]
    assert (point["drilled"]["result"], point["drilled"]["rto"]) == ("pass", drill["rto"])
    assert shell("check")["data"]["damages"] == []
    assert not list(tmp_path.glob("p2v-drill-*"))


def test_all_machines_are_drilled_and_the_worst_is_the_exit_code(shell: Shell, tmp_path: Path) -> None:
    shell("backup", str(boot_disk(tmp_path / "web.raw", _WORKS)))
    shell("backup", str(boot_disk(tmp_path / "mail.raw", [("serial", "Kernel panic - not syncing: VFS: no root\n")])))
    data = shell("drill", "--all", expect=70)["data"]
    assert {drill["machine"]: drill["result"] for drill in data["drills"]} == {"web": "pass", "mail": "fail"}
    assert "VFS: no root" in next(d["reason"] for d in data["drills"] if d["machine"] == "mail")
    assert Path(data["report"]).is_file()
    problems = {m["machine"]: m["problems"] for m in shell("status", expect=5)["data"]["machines"]}
    assert problems["web"] == []
    assert "VFS: no root" in problems["mail"][0]


def test_a_changed_record_is_damage_and_proves_nothing(shell: Shell, tmp_path: Path) -> None:
    shell("backup", str(boot_disk(tmp_path / "web.raw", _WORKS)))
    shell("drill", "latest")
    [path] = (path for path in (tmp_path / "repository" / "records").rglob("*") if path.is_file())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    assert shell("status", "--max-drilled-age", "1d", expect=5)["data"]["machines"][0]["drilled"] == ""
    assert len(shell("check", expect=40)["data"]["damages"]) == 1


@pytest.mark.parametrize(
    "words",
    [
        (), ("web", "--all"), ("web", "--level", "static-electricity"), ("web", "--sample", "best"), ("web", "--to", "cloud"),
        ("web", "--fail-on-purpose", "everything"), ("--job", "no-such-file.toml"), ("no-such-machine",),
    ],
)  # fmt: skip
def test_what_cannot_be_drilled_is_a_usage_error(shell: Shell, tmp_path: Path, words: tuple[str, ...]) -> None:
    shell("backup", str(boot_disk(tmp_path / "web.raw", _WORKS)))
    shell("drill", *words, expect=2)
    assert not list(tmp_path.glob("p2v-drill-*"))


@pytest.mark.parametrize("words", [("--max-backup-age", "soon"), ("--machine", "mail")])
def test_a_status_that_cannot_be_is_a_usage_error(shell: Shell, words: tuple[str, ...]) -> None:
    shell("status", *words, expect=2)


# -- kill -9 ---------------------------------------------------------------------------------------------------------


def _processes(word: str) -> list[int]:
    """Processes whose command line has this word."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if word.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def _until(condition: str, seconds: float, look: object) -> None:
    assert callable(look)
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)


@pytest.mark.parametrize("words", [(), ("--full-restore",)])
def test_kill_9_leaves_no_process_and_the_next_run_clears_up(
    shell: Shell, tmp_path: Path, words: tuple[str, ...]
) -> None:
    shell("backup", str(boot_disk(tmp_path / "web.raw", [("screen", "Loading initial ramdisk ...")])))
    before = {path for path in tmp_path.iterdir() if path.name != "cache"}
    process = shell.start("drill", "web", *words)
    try:
        _until("QEMU was not started", 60, lambda: [p for p in _processes(str(tmp_path)) if p != process.pid])
        _until("no console", 30, lambda: list(tmp_path.glob("p2v-drill-*/*/console.log")))
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate(timeout=30)
    _until("a process is left after 5 s", 5, lambda: not _processes(str(tmp_path)))
    left = {path for path in tmp_path.iterdir() if path.name != "cache"} - before
    assert {path.name.rpartition("-")[0] for path in left} == {"p2v-drill"}
    boot_disk(tmp_path / "web.raw", _WORKS)
    shell("backup", str(tmp_path / "web.raw"))
    assert shell("drill", "web", *words)["data"]["drills"][0]["result"] == "pass"
    assert {path for path in tmp_path.iterdir() if path.name != "cache"} == before | {tmp_path / "state"}


def test_an_interrupted_drill_leaves_nothing(shell: Shell, tmp_path: Path) -> None:
    shell("backup", str(boot_disk(tmp_path / "web.raw", [("screen", "Loading initial ramdisk ...")])))
    process = shell.start("drill", "web")
    _until("no console", 60, lambda: list(tmp_path.glob("p2v-drill-*/*/console.log")))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert not list(tmp_path.glob("p2v-drill-*"))
    assert not _processes(str(tmp_path))

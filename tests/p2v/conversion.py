"""Running `p2v` as a user does, on the live machine of tests/machines, and looking at what it leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.machines.physical import PhysicalMachine

P2V = Path(sys.executable).with_name("p2v")
FINAL = (".qcow2", ".vmdk", ".vhd", ".vhdx", ".raw", ".xml", ".vmx", ".ps1", ".sh", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How one run of p2v ended."""

    code: int
    envelope: dict[str, Any]
    log: str


def p2v(*words: str, environment: dict[str, str] | None = None, timeout: float = 900) -> Run:
    """Run ``p2v WORDS --json`` to its end."""
    done = subprocess.run(
        [P2V, *words, "--json"],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    envelope = json.loads(done.stdout) if done.stdout.strip() else {}
    return Run(code=done.returncode, envelope=envelope, log=done.stderr)


def address(machine: PhysicalMachine, user: str = "root") -> list[str]:
    """The words that name the machine as a source."""
    return [
        f"ssh://{user}@127.0.0.1:{machine.ssh_port}",
        "--identity",
        str(machine.identity),
        "--known-hosts",
        str(machine.known_hosts),
    ]


def interrupted(
    words: list[str], stage: str, number: signal.Signals, log: Path, *, until: str = "", pause: float = 1.0
) -> int:
    """Run p2v until its log announces ``stage`` (and then shows the pattern ``until``), send the signal ``pause`` seconds later, and return
    the exit code.

    Negative: it died of the signal.
    """
    return disturbed(words, stage, lambda process: process.send_signal(number), log, until=until, pause=pause)


def disturbed(
    words: list[str],
    stage: str,
    act: Callable[[subprocess.Popen[bytes]], None],
    log: Path,
    *,
    until: str = "",
    pause: float = 1.0,
    timeout: float = 600,
) -> int:
    """The same with anything that happens: ``act`` gets the process."""
    with log.open("wb") as stream:
        process = subprocess.Popen([P2V, *words], stdout=stream, stderr=stream)
        try:
            deadline = time.monotonic() + timeout
            pattern = re.compile(re.escape(f"{stage} ...") + (f".*({until})" if until else ""), re.DOTALL)
            while not pattern.search(log.read_text(errors="replace")):
                assert process.poll() is None, f"ended before {stage}: {log.read_text(errors='replace')}"
                assert time.monotonic() < deadline, f"never came to {stage}: {log.read_text(errors='replace')}"
                time.sleep(0.02)
            time.sleep(pause)  # into the stage, not onto its edge
            act(process)
            return process.wait(timeout=300)
        finally:
            process.kill()
            process.wait()


def final_names(folder: Path) -> list[str]:
    """Files in the folder that look finished; the evidence of a boot is none."""
    return sorted(path.name for path in folder.glob("*") if path.suffix in FINAL) if folder.exists() else []


_LEFT = """
lvs --noheadings -o lv_name 2>/dev/null | grep p2v- || true
for m in / /boot; do fsfreeze -u $m 2>/dev/null && echo frozen $m; done
ps -eo pid,args | grep -E 'p2v[_-]|exec\\(' | grep -v grep || true
"""


def left_on(machine: PhysicalMachine, *, within: float = 0.0) -> str:
    """What is left on the source - snapshots, frozen file systems, processes - after at most ``within`` seconds of waiting."""
    deadline = time.monotonic() + within
    while True:
        left = machine.run(_LEFT).stdout.strip()
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(2)

"""What a run shows: result on stdout, everything else on stderr. The one place that knows rich.

With ``--json`` stdout holds exactly one envelope::

    {"version": 1, "command", "status", "exit_code", "data", "notices", "errors"}

``status`` is ok | notices | different | error | interrupted. Sizes are bytes, times RFC 3339 with zone. Progress is drawn
only on a terminal; elsewhere a line is logged every 10 seconds, with rate and time left.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

from formats.errors import InterruptedRunError, Notice, ToolkitError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_QUIET_INTERVAL = 10.0  # seconds between progress lines where there is no terminal
_STATUS = {0: "ok", 3: "notices", 4: "different", 130: "interrupted"}


def human_size(count: float) -> str:
    """Bytes for a person: binary units, three digits."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return (
                f"{value:.0f} {unit}"
                if unit == "B"
                else f"{value:.3g} {unit}"
                if value < 999.5
                else f"{value:.0f} {unit}"
            )
        value /= 1024
    raise AssertionError("unreachable")


def human_time(seconds: float) -> str:
    """A duration for a person: 8.4 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass(slots=True)
class Stage:
    """One timed step of a run."""

    name: str
    seconds: float = 0.0
    detail: str = ""


@dataclass(slots=True)
class Console:
    """Where a command says what it does. One per run.

    ``json_output``: the result is the envelope. ``quiet``: errors and notices only. ``verbose``: third-party detail too.
    ``log_json``: every line on stderr is a JSON object ``{"time","level","message",...}``.
    """

    json_output: bool = False
    quiet: bool = False
    verbose: bool = False
    log_json: bool = False
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    stderr: TextIO = field(default_factory=lambda: sys.stderr)
    notices: list[Notice] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _live: _Live | None = None

    # -- to stderr ------------------------------------------------------------------------------------------------

    def log(self, message: str, *, level: str = "info", facts: Mapping[str, object] | None = None) -> None:
        """One line for the person who watches; ``facts`` only with ``log_json``."""
        if self.quiet and level == "info":
            return
        with self._lock:
            if self.log_json:
                record = {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "level": level,
                    "message": message,
                }
                self.stderr.write(json.dumps(record | dict(facts or {}), default=str) + "\n")
            elif self._live is not None:
                self._live.print(message)
            else:
                self.stderr.write(message + "\n")
            self.stderr.flush()

    def debug(self, message: str) -> None:
        """A line that only ``--verbose`` shows."""
        if self.verbose:
            self.log(message, level="debug")

    def notice(self, notice: Notice) -> None:
        """A warning that counts: shown at once, listed in the result, exit code 3. The same one twice counts once."""
        with self._lock:
            if notice in self.notices:
                return
            self.notices.append(notice)
        subject = f"{notice.subject}: " if notice.subject else ""
        self.log(
            f"notice: {subject}{notice.message}", level="warning", facts={"code": notice.code, "advice": notice.advice}
        )
        if notice.advice and not self.log_json:
            self.log(f"        {notice.advice}", level="warning")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a step; its duration is shown when it ends and kept in ``data.stages``. ``stage.detail`` may be set inside."""
        stage = Stage(name)
        started = self.clock()
        self.log(f"{name} ...")
        try:
            yield stage
        except BaseException:
            stage.seconds = self.clock() - started
            self.stages.append(stage)
            raise
        stage.seconds = self.clock() - started
        self.stages.append(stage)
        detail = f": {stage.detail}" if stage.detail else ""
        self.log(
            f"{name} done in {human_time(stage.seconds)}{detail}",
            facts={"stage": name, "seconds": round(stage.seconds, 3)},
        )

    def progress(self, label: str) -> ProgressLine:
        """A ``formats.progress.Progress`` for one step, under ``label``."""
        return ProgressLine(self, label)

    # -- to stdout ------------------------------------------------------------------------------------------------

    def say(self, text: str = "") -> None:
        """A line of the result for a person; nothing with ``--json`` or ``--quiet``."""
        if not self.json_output and not self.quiet:
            self.stdout.write(text + "\n")

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        """Rows under headings, columns aligned; nothing with ``--json``."""
        if self.json_output:
            return
        widths = [max([len(c), *(len(row[n]) for row in rows)]) for n, c in enumerate(columns)]
        for row in [columns, ["-" * w for w in widths], *rows]:
            self.say("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())

    def finish(self, command: str, error: ToolkitError | None = None, exit_code: int | None = None) -> int:
        """Write the end of the run - envelope or error text - and return its exit code.

        Without ``error`` the code is ``exit_code``, else 3 with notices, else 0.
        """
        if error is not None:
            code = error.exit_code
        elif exit_code is not None:
            code = exit_code
        else:
            code = 3 if self.notices else 0
        if self.json_output:
            self._envelope(command, error, code)
        elif error is not None:
            self._error(error)
        with contextlib.suppress(BrokenPipeError):
            self.stdout.flush()
        return code

    def _error(self, error: ToolkitError) -> None:
        subject = f"{error.subject}: " if error.subject and error.subject not in error.message else ""
        word = "interrupted" if isinstance(error, InterruptedRunError) else "error"
        self.log(
            f"{word}: {subject}{error.message}",
            level="error",
            facts={"exit_code": error.exit_code, "advice": error.advice},
        )
        if error.advice and not self.log_json:
            for line in error.advice.splitlines():
                self.log(f"       {line}", level="error")

    def _envelope(self, command: str, error: ToolkitError | None, code: int) -> None:
        data = dict(self.data)
        if self.stages:
            data["stages"] = [{"name": s.name, "seconds": round(s.seconds, 3), "detail": s.detail} for s in self.stages]
        envelope = {
            "version": 1,
            "command": command,
            "status": _STATUS.get(code, "error"),
            "exit_code": code,
            "data": data,
            "notices": [record(n) for n in self.notices],
            "errors": [] if error is None else [error_record(error)],
        }
        self.stdout.write(msgspec.json.encode(envelope, enc_hook=_encode).decode() + "\n")


def record(value: object) -> Any:
    """A frozen record as JSON builtins: bytes as base64, enums by value."""
    return msgspec.to_builtins(value, enc_hook=_encode)


def error_record(error: ToolkitError) -> dict[str, object]:
    """An error as it stands in the envelope."""
    return {
        "error": type(error).__name__,
        "exit_code": error.exit_code,
        "message": error.message,
        "advice": error.advice,
        "subject": error.subject,
    }


def _encode(value: object) -> object:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise NotImplementedError(f"no JSON form for {type(value).__name__}")


class _Live:
    """The bars on a terminal; exists while at least one step is under way."""

    def __init__(self, console: Console) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self.bars: RichProgress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=RichConsole(file=console.stderr),
            transient=True,
            refresh_per_second=5,
        )
        self.users = 0
        self.bars.start()

    def print(self, message: str) -> None:
        self.bars.console.print(message, markup=False, highlight=False, soft_wrap=True)


class ProgressLine:
    """The progress of one step: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, label: str) -> None:
        self._console, self._label = console, label
        self._bar: TaskID | None = None
        self._total: int | None = None
        self._done = 0
        self._started = self._told = 0.0
        self._lock = threading.Lock()

    def start(self, label: str, total: int | None) -> None:
        """Begin; ``label`` is used when the step was given none."""
        console = self._console
        self._label = self._label or label
        self._total, self._done = total, 0
        self._started = self._told = console.clock()
        if console.quiet or console.log_json or not console.stderr.isatty():
            return
        with console._lock:
            if console._live is None:
                console._live = _Live(console)
            console._live.users += 1
            self._bar = console._live.bars.add_task(self._label, total=total)

    def advance(self, amount: int) -> None:
        """``amount`` more bytes."""
        with self._lock:
            self._done += amount
            done, now = self._done, self._console.clock()
            if self._bar is None and now - self._told < _QUIET_INTERVAL:
                return
            self._told = now
        live = self._console._live
        if self._bar is not None and live is not None:
            live.bars.update(self._bar, completed=done)
        elif self._bar is None:
            self._tell(done, now - self._started)

    def finish(self) -> None:
        """Over, well or not."""
        console = self._console
        if self._bar is None:
            return
        with console._lock:
            live = console._live
            if live is not None:
                live.bars.remove_task(self._bar)
                live.users -= 1
                if live.users == 0:
                    live.bars.stop()
                    console._live = None
        self._bar = None

    def _tell(self, done: int, elapsed: float) -> None:
        rate = done / elapsed if elapsed > 0 else 0.0
        text = f"{self._label}: {human_size(done)}"
        facts: dict[str, object] = {"done": done, "rate": round(rate)}
        if self._total:
            left = max(0.0, (self._total - done) / rate) if rate else 0.0
            text += f" of {human_size(self._total)} ({100 * done // self._total} %)"
            facts |= {"total": self._total, "seconds_left": round(left)}
            text += f", {human_size(rate)}/s, {human_time(left)} left"
        else:
            text += f", {human_size(rate)}/s"
        self._console.log(text, facts=facts)

"""The verdict: what was proven of a machine, and what it was proven by. Part of the public JSON."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How far the proof goes; ordered from the weakest."""

    STATIC = "static"  # what lies on the disks fits together
    HAND_OFF = "hand-off"  # firmware and boot loader have given control to the kernel
    BOOTS = "boots"  # the operating system came up


class Result(StrEnum):
    """What came out of it."""

    PASS = "pass"  # noqa: S105 - a result, no password
    FAIL = "fail"  # it was seen not to boot
    UNPROVEN = "unproven"  # nothing was seen that says either


class Severity(StrEnum):
    """What a finding means for the result."""

    ERROR = "error"  # it is why the machine does not boot, or cannot be shown to
    WARNING = "warning"  # something is wrong, but it is not what decided
    NOTE = "note"  # a fact that limits what was proven


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """Something that was seen and tells how far the machine came.

    ``code`` is a stable kebab-case name; ``stream`` where it was seen (serial, screen, network, qemu); ``seconds`` since the start.
    """

    code: str
    stream: str
    seconds: float
    text: str = ""

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.code} ({self.stream}, {self.seconds:.1f} s){': ' + self.text if self.text else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A known class of failure or limit, with the line that shows it and the fix."""

    code: str
    severity: Severity
    message: str
    fix: str = ""
    evidence: str = ""

    def describe(self) -> str:
        """A few words for a person."""
        seen = f' ("{self.evidence}")' if self.evidence else ""
        return f"{self.code}: {self.message}{seen}{'. ' + self.fix if self.fix else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Screenshot:
    """The screen at one moment; ``seconds`` since the start, ``path`` a PNG file."""

    seconds: float
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of one boot or check.

    ``seconds`` is the time from the start to the signal that decided; ``console`` and ``screenshot`` are paths, "" where there is none.
    ``bytes_read`` is what the machine read of each disk, in the order of the disks; ``hardware`` what was emulated. ``screenshots`` are the
    screen's time line, ``screenshot`` its end.
    """

    level: Level
    result: Result
    signals: tuple[Signal, ...] = ()
    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0
    console: str = ""
    screenshot: str = ""
    bytes_read: tuple[int, ...] = ()
    hardware: str = ""
    accelerator: str = ""
    screenshots: tuple[Screenshot, ...] = ()

    @property
    def reason(self) -> str:
        """One sentence: the finding that decided, or the signal that proves."""
        for finding in self.findings:
            if finding.severity is Severity.ERROR:
                return finding.message
        return self.signals[-1].describe() if self.signals else "nothing was seen"

"""What is seen of a booting machine, and what it amounts to. Pure: fed with text and times, it knows no QEMU.

A positive signal is a login prompt or the banner of an SSH server. A negative one is a failure class. The order counts:
a dead end is one only while no sign of life and no later stage of the boot follows it, a sign of life only while no reset
or panic follows it, and either must have stood for ``Patience.settle`` seconds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from p2v.emulator.console import plain
from p2v.target.failures import BY_CODE, FAILURES, FailureClass, Weight
from p2v.target.verdict import Finding, Result, Severity, Signal

RESETS_ALLOWED = 1
"""One reset is part of some healthy boots: shim's fallback loader and SELinux' relabelling end with one."""

_LINE_LIMIT = 400
_SIGNAL_LIMIT = 200

_LOGIN = re.compile(r"^[\w.-]*\s?login:\s*(?:$|\[\s*\d+\.\d+\])")


class Stage(IntEnum):
    """How far the machine is known to have come."""

    FIRMWARE = 0
    LOADER = 1
    KERNEL = 2
    USERLAND = 3


_MILESTONES: tuple[tuple[str, Stage, re.Pattern[str]], ...] = (
    ("firmware", Stage.FIRMWARE, re.compile(r"SeaBIOS \(version|BdsDxe: starting")),
    (
        "loader",
        Stage.LOADER,
        re.compile(r"GRUB loading|Welcome to GRUB|GNU GRUB|SYSLINUX|^LILO|systemd-boot|Loading Linux "),
    ),
    (
        "kernel-loaded",
        Stage.KERNEL,
        re.compile(r"Loading initial ramdisk|EFI stub:|Decompressing Linux|Booting the kernel"),
    ),
    ("kernel", Stage.KERNEL, re.compile(r"Linux version \d|Booting paravirtualized kernel")),
    ("initramfs", Stage.KERNEL, re.compile(r"Loading, please wait|Begin: |running in (?:initrd|initramfs)|dracut-\d")),
    (
        "userland",
        Stage.USERLAND,
        re.compile(r"Welcome to (?!GRUB).*!|INIT: version|systemd\[1\]: systemd \d.*running|OpenRC"),
    ),
    ("multi-user", Stage.USERLAND, re.compile(r"Reached target.*(?:multi-user\.target|Multi-User System)")),
    ("graphical", Stage.USERLAND, re.compile(r"Reached target.*(?:graphical\.target|Graphical Interface)")),
)

_RECOVERED = frozenset({"kernel", "initramfs", "userland", "multi-user", "graphical"})
"""Milestones after which an earlier dead end was none."""

_TIMED_WAIT = re.compile(
    r"dracut-initqueue|A (?:start|stop) job is running|[Ww]aiting for (?:root|device)|executed automatically in"
)


# systemd's status lines (manager.c, unit.c, job.c) of what did not come up.
_FAILED_UNIT = re.compile(
    r"\[(?:FAILED|DEPEND| TIME )\] (?:Failed to (?:start|mount|activate|listen on)|Dependency failed for|Timed out waiting for device) "
    r"(\S.{0,100}?)\.*$"
)
_FAILED_UNITS_MOST = 4
_STOPPED = frozenset({"emergency-mode", "maintenance-shell"})
"""Failure classes that failed units explain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a boot may take, in seconds.

    ``total`` ends it in any case. Without progress (new text, disk reads) it ends after ``idle`` while the processors rest, after
    ``busy`` while they work, and after ``early`` while no more than firmware and loader have been seen. ``settle`` is how long
    a deciding signal must stand. systemd waits 90 s for a device, dracut 180 s, both without a word: ``idle`` covers the
    first, and a wait that is announced on the console doubles it.
    """

    total: float = 240.0
    idle: float = 100.0
    busy: float = 100.0
    early: float = 25.0
    settle: float = 3.0

    @classmethod
    def accelerated(cls) -> Patience:
        """For hardware virtualization."""
        return cls()

    @classmethod
    def emulated(cls) -> Patience:
        """For TCG, which is slower by a factor of ten and more."""
        return cls(total=900.0, idle=110.0, busy=240.0, early=75.0, settle=6.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The end of a boot: result, and the time of the signal that decided."""

    result: Result
    seconds: float
    findings: tuple[Finding, ...]


@dataclass(slots=True, kw_only=True)
class _Sighting:
    failure: FailureClass
    first: float
    last: float
    boot: int  # how many resets came before the last sighting
    evidence: str
    reason: str = ""  # what the line itself says of the cause
    count: int = 1


class Evidence:
    """Collects what is seen and decides. Times are seconds since the start and must not go back."""

    def __init__(self, patience: Patience, *, fuzzy: bool = False) -> None:
        """With ``fuzzy`` the disks were read while they changed: what that alone can explain is unproven, not a failure."""
        self.patience = patience
        self.stage = Stage.FIRMWARE
        self.signals: list[Signal] = []
        self._fuzzy = fuzzy
        self._sightings: dict[str, _Sighting] = {}
        self._alive: Signal | None = None  # the first positive signal of the current boot
        self._resets = 0
        self._advanced = 0.0
        self._progress = 0.0
        self._graphics = False
        self._partial = ""
        self._screen: Counter[str] = Counter()
        self._last_lines: dict[str, str] = {}
        self._timed_wait = False
        self._failed_units: list[str] = []

    # -- observations ----------------------------------------------------------------------------------------------

    def serial(self, text: str, now: float) -> None:
        """New output of the serial console, with its control sequences."""
        if not text:
            return
        self._progress = now
        *lines, self._partial = plain(self._partial + text).split("\n")
        if len(self._partial) > 4 * _LINE_LIMIT:
            lines, self._partial = [*lines, self._partial], ""
        for line in lines:
            self._line("serial", line, now)
        if self._partial:
            self._line("serial", self._partial, now)

    def screen(self, lines: Sequence[str] | None, now: float) -> None:
        """The whole text screen; None while it cannot be read."""
        self._graphics = lines is None
        if lines is None:
            return
        content = Counter(line for line in lines if line.strip())
        new = content - self._screen
        if new or content != self._screen:
            self._progress = now
        self._screen = content
        for line in lines:
            if line in new:
                self._line("screen", line, now)
        if content:
            self._last_lines["screen"] = next(line for line in reversed(lines) if line.strip())

    def progress(self, now: float) -> None:
        """The machine did something: it read a disk."""
        self._progress = now

    def kernel_runs(self, now: float) -> None:
        """The processor executes an operating system's kernel, whether it prints or not."""
        self.stage = max(self.stage, Stage.KERNEL)
        self._signal(Signal(code="kernel", stream="qemu", seconds=now, text="paging is on"))

    def ssh_banner(self, banner: str, now: float) -> None:
        """An SSH server of the machine answered. Dropbear is no proof: initramfs images hold one to ask for passphrases."""
        self._signal(Signal(code="ssh-banner", stream="network", seconds=now, text=banner[:_SIGNAL_LIMIT]))
        if "dropbear" not in banner.lower():
            self._sign_of_life(self.signals[-1])

    def reset(self, now: float) -> None:
        """The machine reset itself."""
        self._resets += 1
        self._progress = now
        self.stage = Stage.FIRMWARE
        self._signal(Signal(code="reset", stream="qemu", seconds=now))
        if self._alive is not None:
            self._alive = None
        self._screen.clear()
        if self._looping:
            self.failure("reboot-loop", now, f"{self._resets} resets")

    def failure(self, code: str, now: float, evidence: str = "", reason: str = "") -> None:
        """A failure class was seen, on the console or otherwise; ``reason`` is what was said of its cause."""
        known = self._sightings.get(code)
        if known is None:
            text = evidence.strip()[:_SIGNAL_LIMIT]
            self._sightings[code] = _Sighting(
                failure=BY_CODE[code], first=now, last=now, boot=self._resets, evidence=text, reason=reason.strip()
            )
        else:
            known.reason = known.reason or reason.strip()
            known.last, known.boot, known.count = now, self._resets, known.count + 1

    def _line(self, stream: str, line: str, now: float) -> None:
        line = line[:_LINE_LIMIT].rstrip()
        if not line.strip():
            return
        self._last_lines[stream] = line
        matches = [(f, f.pattern.search(line)) for f in FAILURES if f.pattern is not None]
        failures = [(failure, match) for failure, match in matches if match is not None]
        for failure, match in failures:
            self.failure(failure.code, now, line, next(filter(None, match.groupdict().values()), ""))
        unit = _FAILED_UNIT.search(line)
        if unit is not None and unit[1] not in self._failed_units and len(self._failed_units) < _FAILED_UNITS_MOST:
            self._failed_units.append(unit[1])
        for code, stage, pattern in () if failures else _MILESTONES:
            if pattern.search(line):
                self._advanced = now if code in _RECOVERED else self._advanced
                self.stage = max(self.stage, stage)
                self._signal(Signal(code=code, stream=stream, seconds=now, text=line.strip()[:_SIGNAL_LIMIT]))
        if _LOGIN.search(line.strip()):
            self._signal(Signal(code="login-prompt", stream=stream, seconds=now, text=line.strip()[:_SIGNAL_LIMIT]))
            self._sign_of_life(next(signal for signal in reversed(self.signals) if signal.code == "login-prompt"))
        self._timed_wait = bool(_TIMED_WAIT.search(line))

    def _signal(self, signal: Signal) -> None:
        # One of a kind: the first time is what counts. Resets are few by construction.
        if signal.code == "reset" or all((signal.code, signal.stream) != (s.code, s.stream) for s in self.signals):
            self.signals.append(signal)

    def _sign_of_life(self, signal: Signal) -> None:
        self.stage = Stage.USERLAND
        if self._alive is None:
            self._alive = signal

    # -- decision --------------------------------------------------------------------------------------------------

    def decision(self, now: float, *, busy: bool = False) -> Decision | None:
        """The end of the boot, if this is it. ``busy`` says that the processors work."""
        settle = self.patience.settle
        ending = self._ending()
        if ending is not None and (now - ending.first >= settle * ending.failure.settle or self._looping):
            return self._decided(Result.FAIL, ending.first)
        if ending is None and self._alive is not None and now - self._alive.seconds >= settle:
            return self._decided(Result.PASS, self._alive.seconds)
        if ending is not None or self._alive is not None:
            return None
        quiet = now - self._progress
        waiting = next(self._seen(Weight.WAITING), None)
        if waiting is not None and quiet >= 2 * settle:
            return self._decided(Result.UNPROVEN, waiting.first)
        return self._stuck(quiet, busy=busy)

    def expired(self, now: float) -> Decision:
        """The decision when time is up."""
        return self.decision(now) or self._decided(Result.UNPROVEN, now, timeout=True)

    def _stuck(self, quiet: float, *, busy: bool) -> Decision | None:
        limit = self.patience.busy if busy else self.patience.idle
        if self._timed_wait:
            limit = max(limit, 2 * self.patience.idle)
        elif self.stage <= Stage.LOADER and not self._graphics:
            if quiet >= min(limit, self.patience.early):
                self.failure("no-progress", self._progress, self._last_lines.get("screen", ""))
                return self._decided(Result.FAIL, self._progress)
            return None
        if quiet >= limit:
            return self._decided(Result.UNPROVEN, self._progress, stuck=True)
        return None

    def _ending(self) -> _Sighting | None:
        """The earliest negative that stands: a fatal one, or a dead end of the current boot after the last sign of life."""
        standing = [
            sighting
            for sighting in self._seen(Weight.FATAL, Weight.DEAD_END)
            if sighting.failure.weight is Weight.FATAL or self._stands(sighting)
        ]
        return min(standing, key=lambda sighting: sighting.first, default=None)

    def _stands(self, sighting: _Sighting) -> bool:
        if sighting.boot < self._resets:
            return False
        if sighting.last < self._advanced:
            return False
        return self._alive is None or sighting.last > self._alive.seconds

    @property
    def _looping(self) -> bool:
        return self._resets > RESETS_ALLOWED

    def _seen(self, *weights: Weight) -> Iterator[_Sighting]:
        return (sighting for sighting in self._sightings.values() if sighting.failure.weight in weights)

    def _decided(self, result: Result, seconds: float, *, stuck: bool = False, timeout: bool = False) -> Decision:
        findings = list(self._findings(result))
        if result is Result.FAIL:
            doubt = self._doubt()
            if doubt is not None:
                result, findings = Result.UNPROVEN, [doubt, *findings]
        if result is Result.UNPROVEN and (stuck or timeout):
            findings.append(self._silence(stuck=stuck))
        return Decision(result=result, seconds=seconds, findings=tuple(findings))

    def _findings(self, result: Result) -> Iterator[Finding]:
        for sighting in sorted(self._sightings.values(), key=lambda sighting: sighting.first):
            failure = sighting.failure
            overcome = result is Result.PASS or (failure.weight is Weight.DEAD_END and not self._stands(sighting))
            yield Finding(
                code=failure.code,
                severity=Severity.WARNING if overcome else Severity.ERROR,
                message=self._message(sighting),
                fix=failure.fix,
                evidence=sighting.evidence,
            )

    def _message(self, sighting: _Sighting) -> str:
        """What happened, with the cause where the console told it."""
        cause = sighting.reason
        if sighting.failure.code in _STOPPED and self._failed_units:
            cause = f"{', '.join(self._failed_units)} failed"
        return f"{sighting.failure.message}: {cause}" if cause else sighting.failure.message

    def _doubt(self) -> Finding | None:
        if "source-read-error" in self._sightings:
            text = "a disk could not be read during the boot, which explains the failure"
            return Finding(
                code="failure-explained", severity=Severity.ERROR, message=text, fix="check the source and boot again"
            )
        seen = [sighting.failure for sighting in self._sightings.values() if sighting.failure.inconsistency]
        if self._fuzzy and seen:
            text = f"the disks were read while they changed, which can explain this failure ({seen[0].code})"
            return Finding(
                code="failure-explained",
                severity=Severity.ERROR,
                message=text,
                fix="take a consistent capture (LVM snapshot), or boot the finished copy",
            )
        return None

    def _silence(self, *, stuck: bool) -> Finding:
        what = "nothing moved any more" if stuck else "the time was over"
        where = (
            "the screen shows graphics, which is not read"
            if self._graphics
            else "no prompt came on screen or serial console"
        )
        return Finding(
            code="no-signal",
            severity=Severity.ERROR,
            message=f"{what} before a login prompt or an SSH server was seen ({where})",
            fix="look at the screenshot; add console=ttyS0 to the kernel's command line or an SSH server, or allow more time",
            evidence=self._last_lines.get("serial", self._last_lines.get("screen", ""))[:_SIGNAL_LIMIT],
        )

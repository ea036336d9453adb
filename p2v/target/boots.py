"""Boots a machine on the emulated target, writes thrown away, and says what was seen: the level ``boots`` of the verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from formats.errors import NoSpaceError, UnsafeImageError
from formats.images import FORMATS, probe
from formats.machine import Machine, Nic
from p2v.emulator import Accelerator, Drive, Emulator, Hardware, Network
from p2v.errors import EmulatorError
from p2v.target.evidence import Decision, Evidence, Patience, Stage
from p2v.target.probe import AgentProbe, Probe, Probing
from p2v.target.screens import ScreenLog
from p2v.target.verdict import Finding, Level, Result, Verdict

BootDisk = Drive
"""A disk to boot from: an NBD URI, or a path with its format."""

_POLL = 0.25  # seconds
_SCREEN_POLL = 0.75
_BANNER_LIMIT = 255  # RFC 4253, section 4.2
_BUSY_SHARE = 0.2
_PRINTED = 1 << 16  # characters of the console that probes see
_DEAD_AFTER = 3.0  # seconds of silence before the processors are looked at


def boot(
    machine: Machine | None,
    disks: Sequence[BootDisk],
    hardware: Hardware,
    *,
    folder: Path | None = None,
    patience: Patience | None = None,
    accelerator: Accelerator | None = None,
    fuzzy: bool = False,
    variables: Path | None = None,
    findings: Sequence[Finding] = (),
    probes: Sequence[Probe] = (),
    listen: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> Verdict:
    """Boot ``disks`` (the boot disk first) on ``hardware`` and return the verdict. The disks are never written.

    machine: its record, for memory, processors, MAC and static address; None where nothing is known.
    folder: gets ``console.log``, ``screen.png`` and the screen's time line in ``screens``; None makes a new one below the
        temporary folder. Overlays take their room there.
    patience: None is what fits the accelerator.
    fuzzy: the disks were read while they changed; a failure that this explains is ``unproven``.
    variables: UEFI variable store to start from. findings: put into the verdict first (what the hardware cannot stand for).
    probes: asked in order once the machine has come up; the verdict passes when all are answered well.
    listen: gets a few words whenever something was seen; must not raise. stop: set by the caller, ends the boot as unproven.

    Raises ``EmulatorError`` when QEMU cannot be started or breaks off; what ``formats.images.probe`` raises for a path that is not
    raw; ``UnsafeImageError`` for one that reaches for other files; ``NoSpaceError`` when the overlays do not fit. Whatever the guest
    does is in the verdict.
    """
    if not disks:
        raise ValueError("nothing to boot from")
    folder = Path(tempfile.mkdtemp(prefix="p2v-boot-")) if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    hardware, network = _for_machine(machine, hardware)
    wanted = [*network.forwards, *(port for probe in probes for port in probe.ports)]
    network = dataclasses.replace(network, forwards=tuple(dict.fromkeys(wanted)))
    windows = machine is not None and machine.system.family == "windows"
    disks = [_checked(disk) for disk in disks]
    with Emulator(
        hardware, disks, folder=folder, network=network, accelerator=accelerator, variables=variables, windows=windows,
        agent=any(isinstance(probe, AgentProbe) for probe in probes),
    ) as emulator:  # fmt: skip
        if patience is None:
            patience = Patience.emulated() if emulator.accelerator is Accelerator.TCG else Patience.accelerated()
        watch = _Watch(emulator, Evidence(patience, fuzzy=fuzzy), listen or _ignore, stop or threading.Event(), probes)
        decision = watch.run()
        screenshot = folder / "screen.png"
        with contextlib.suppress(EmulatorError):
            emulator.screenshot(screenshot)
            watch.screens.see(emulator.picture(), emulator.seconds, last=True)
            watch.bytes_read = emulator.bytes_read()
        return Verdict(
            level=Level.BOOTS,
            result=decision.result,
            signals=tuple(dataclasses.replace(s, seconds=round(s.seconds, 1)) for s in watch.evidence.signals),
            findings=(*findings, *decision.findings),
            seconds=round(decision.seconds, 1),
            console=str(emulator.console_log),
            screenshot=str(screenshot) if screenshot.exists() else "",
            bytes_read=watch.bytes_read,
            hardware=emulator.hardware.describe(),
            accelerator=emulator.accelerator.value,
            screenshots=watch.screens.screenshots,
        )


def _checked(disk: BootDisk) -> BootDisk:
    """A path's header is read before QEMU sees it: it may not reach for other files. Raw has no header, NBD was checked by its server."""
    if disk.path is None or disk.format == "raw":
        return disk
    name = next((known.name for known in FORMATS.values() if known.driver == disk.format), disk.format)
    header = probe(disk.path, format=name)
    if header.backing or header.references:
        raise UnsafeImageError(
            f"{disk.path} reaches for other files: {', '.join(filter(None, (header.backing, *header.references)))}",
            advice="boot it through formats.images.open_source, which checks them, or convert it to one file first",
            subject=str(disk.path),
        )
    return dataclasses.replace(disk, options={**header.options, **disk.options})


def _ignore(_text: str) -> None:
    pass


def _for_machine(machine: Machine | None, hardware: Hardware) -> tuple[Hardware, Network]:
    """Memory and processors from the machine where the hardware leaves them open, and a network that meets its NIC's settings."""
    if machine is None:
        return hardware, Network()
    if not hardware.memory:
        hardware = dataclasses.replace(hardware, memory=max(machine.memory, 1 << 30) if machine.memory else 0)
    if not hardware.cpus:
        hardware = dataclasses.replace(hardware, cpus=min(machine.cpu.count, 2))
    nic = _main_nic(machine.nics)
    if nic is None:
        return hardware, Network()
    static = "" if nic.dhcp else next((address for address in nic.addresses if ":" not in address), "")
    return hardware, Network(mac=nic.mac, address=static, gateway=nic.gateway if ":" not in nic.gateway else "")


def _main_nic(nics: Sequence[Nic]) -> Nic | None:
    ranked = sorted(nics, key=lambda nic: (not nic.gateway, not nic.up, not nic.addresses))
    return ranked[0] if ranked else None


class _Watch:
    """Looks at everything that can be seen of a running machine until the evidence decides."""

    def __init__(
        self,
        emulator: Emulator,
        evidence: Evidence,
        listen: Callable[[str], None],
        stop: threading.Event,
        probes: Sequence[Probe] = (),
    ) -> None:
        self.evidence = evidence
        self.screens = ScreenLog(emulator.folder / "screens")
        self.bytes_read: tuple[int, ...] = ()
        self._emulator = emulator
        self._listen = listen
        self._stop = stop
        self._told = 0
        self._events = 0
        self._busy = True
        self._processor = (0.0, 0.0)
        self._moved = 0.0
        self._heard = 0
        self._screened = -_SCREEN_POLL
        self._guest = _Guest(emulator)
        self._probing = Probing(probes, self._guest, lambda: emulator.seconds)

    def run(self) -> Decision:
        """Watch until the decision."""
        with _banner_reader(self._emulator) as banner:
            while True:
                self._look()
                now = self._emulator.seconds
                if banner.text and not banner.told:
                    banner.told = True
                    self.evidence.ssh_banner(banner.text, now)
                self._tell()
                decision = self.evidence.decision(now, busy=self._busy)
                if decision is not None and (decision.result is not Result.PASS or self._answered(decision, now)):
                    return self._with_probes(decision)
                if self._stop.is_set() or (decision is None and now >= self.evidence.patience.total):
                    return self._with_probes(self.evidence.expired(now))
                time.sleep(_POLL)

    def _answered(self, decision: Decision, now: float) -> bool:
        """Whether all probes of a machine that has come up are over; begins them. Each has its own time."""
        if now - decision.seconds < self.evidence.patience.settle:
            return False
        self._probing.start()
        return self._probing.done

    def _with_probes(self, decision: Decision) -> Decision:
        """The decision with what the probes were answered, where they were asked: the worst counts, and the last one's time."""
        self._probing.stop()
        if decision.result is not Result.PASS:
            return decision
        findings, seconds = list(decision.findings), decision.seconds
        results: list[Result] = [decision.result]
        for outcome in self._probing.outcomes:
            results.append(outcome.result)
            if (signal := outcome.signal()) is not None:
                self.evidence.signals.append(signal)
            if (finding := outcome.finding()) is not None:
                findings.append(finding)
            seconds = max(seconds, outcome.seconds)
        self._tell()
        worst = next(result for result in (Result.FAIL, Result.UNPROVEN, Result.PASS) if result in results)
        return Decision(result=worst, seconds=seconds, findings=tuple(findings))

    def _look(self) -> None:
        emulator, evidence = self._emulator, self.evidence
        emulator.check()
        now = emulator.seconds
        # The events come first: a reset clears the screen that is read after it.
        for event in emulator.events()[self._events :]:
            self._events += 1
            self._event(event.name, event.data, emulator.since_start(event))
        printed = emulator.console.take()
        self._guest.hear(printed)
        evidence.serial(printed, now)
        if now - self._screened >= _SCREEN_POLL:
            picture = emulator.picture()
            evidence.screen(emulator.screen_text(picture), now)
            self.screens.see(picture, now)
            self._screened = emulator.seconds
            counts = emulator.bytes_read()
            if counts != self.bytes_read:
                self.bytes_read = counts
                evidence.progress(now)
                self._moved = now
        if self._heard != emulator.console.total:
            self._heard, self._moved = emulator.console.total, now
        self._measure(now)
        if now - self._moved > _DEAD_AFTER:
            if not self._busy and emulator.processors_dead():
                evidence.failure("processor-halted", now)
            if evidence.stage <= Stage.LOADER and emulator.kernel_runs():
                evidence.kernel_runs(now)

    def _measure(self, now: float) -> None:
        then, used = self._processor
        if now - then >= 1:
            current = self._emulator.processor_seconds()
            self._busy = (current - used) / (now - then) > _BUSY_SHARE
            self._processor = (now, current)

    def _event(self, name: str, data: object, seconds: float) -> None:
        facts = data if isinstance(data, dict) else {}
        if name == "RESET" and facts.get("guest"):
            self.evidence.reset(seconds)
        elif name == "SHUTDOWN" and facts.get("guest"):
            self.evidence.failure("powered-off", seconds, str(facts.get("reason", "")))
        elif name == "BLOCK_IO_ERROR" and facts.get("nospace"):
            raise NoSpaceError(
                f"there is no room for what the machine writes in {self._emulator.folder}",
                advice="make room there or name a folder on another file system",
            )
        elif name == "BLOCK_IO_ERROR":
            self.evidence.failure("source-read-error", seconds, str(facts.get("reason", "")))
        elif name == "GUEST_PANICKED":
            self.evidence.failure("kernel-panic", seconds, "GUEST_PANICKED")
        elif name == "SHUTDOWN" and facts.get("reason") == "host-signal":
            raise EmulatorError("QEMU was told to end by a signal", advice="run it again")

    def _tell(self) -> None:
        for signal in self.evidence.signals[self._told :]:
            self._listen(signal.describe())
        self._told = len(self.evidence.signals)


class _Guest:
    """The running machine as its probes see it."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self._printed = ""
        self._lock = threading.Lock()

    def port(self, guest_port: int) -> int:
        return self._emulator.forwarded_port(guest_port)

    def connected(self, guest_port: int) -> bool:
        return self._emulator.connected(guest_port)

    def hear(self, text: str) -> None:
        with self._lock:
            self._printed = (self._printed + text)[-_PRINTED:]

    def type(self, text: str) -> None:
        with self._lock:
            self._printed = ""  # what comes now answers this
        self._emulator.console.send(text.encode())

    def printed(self) -> str:
        with self._lock:
            return self._printed

    @property
    def agent(self) -> socket.socket | None:
        return self._emulator.agent


@dataclass(slots=True)
class _Banner:
    """What the guest's SSH server said first."""

    text: str = ""
    told: bool = False


@contextlib.contextmanager
def _banner_reader(emulator: Emulator) -> Iterator[_Banner]:
    banner, over = _Banner(), threading.Event()
    try:
        port = emulator.forwarded_port(22)
    except EmulatorError:
        yield banner  # no NIC, no forward
        return

    def knock() -> None:
        # The forward takes a connection at once, whether the guest listens or not; only a banner says that it does.
        while not over.wait(0.5):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as link:
                text = _read_banner(link)
                if text.startswith("SSH-"):
                    banner.text = text
                    return

    thread = threading.Thread(target=knock, name="ssh-banner", daemon=True)
    thread.start()
    try:
        yield banner
    finally:
        over.set()


def _read_banner(link: socket.socket) -> str:
    data = b""
    while b"\n" not in data and len(data) < _BANNER_LIMIT:
        piece = link.recv(_BANNER_LIMIT - len(data))
        if not piece:
            break
        data += piece
    return "".join(letter for letter in data.decode("ascii", "replace").strip() if letter.isprintable())

"""The running emulated machine."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from formats import qemu_img
from formats.machine import Firmware
from p2v.emulator import arguments
from p2v.emulator.acceleration import Accelerator, proven_accelerator
from p2v.emulator.console import SerialConsole
from p2v.emulator.glyphs import read_text
from p2v.emulator.hardware import DirectKernel, Drive, Hardware, Network
from p2v.emulator.monitor import Event, Monitor
from p2v.emulator.process import find_program, guarded
from p2v.emulator.screen import TEXT_ADDRESS, TEXT_BYTES, TEXT_PICTURES, decode_text, parse_ppm, png_of
from p2v.errors import EmulatorError

_SANDBOX = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
_MEMORY_LIMIT = 2 << 30
_MEMORY_LEAST = 256 << 20

Picture = tuple[int, int, memoryview]
"""Width, height, and the RGB bytes row by row."""


class Emulator:
    """One emulated machine; a context manager that starts it and leaves no process and no work file behind.

    ``folder`` gets ``console.log`` (serial port, bounded); it must exist. Work files lie in a folder of their own below it and are
    removed at the end; the throw-away overlays have no name on disk at all. QEMU is killed when this process ends, whatever ends
    it. Memory and processors are those of ``hardware``, bounded by the host's; 0 takes a default.

    Raises ``EmulatorError`` when QEMU or the firmware is missing, a disk cannot be opened, or QEMU breaks off.
    """

    def __init__(
        self,
        hardware: Hardware,
        drives: Sequence[Drive] = (),
        *,
        folder: Path,
        network: Network | None = None,
        kernel: DirectKernel | None = None,
        accelerator: Accelerator | None = None,
        variables: Path | None = None,
        windows: bool = False,
        stop_on_reset: bool = False,
        report: bool = False,
        agent: bool = False,
    ) -> None:
        """``variables`` is a UEFI variable store to start from, copied; ``accelerator`` None is the proven one.

        ``windows`` gives the display that Windows needs. With ``stop_on_reset`` a reset by the guest halts the machine
        instead (a SHUTDOWN event with reason guest-reset), as a self-adaptation boot needs it. ``report`` adds a second serial port,
        whose output is bounded like the console's: ``report.log`` in the folder. ``agent`` adds the channel that a guest agent listens on.
        """
        self.program = find_program()
        self.accelerator = accelerator or proven_accelerator(self.program)
        self.hardware = _fitted(hardware)
        self.folder = folder.resolve()
        self.console_log = self.folder / "console.log"
        self._drives = tuple(drives)
        self._network, self._kernel, self._variables = network, kernel, variables
        self._windows, self._stop_on_reset = windows, stop_on_reset
        self._report = report
        self.report: SerialConsole | None = None
        self.agent: socket.socket | None = None
        self._agent_peer: socket.socket | None = None
        self._agent = agent
        self._process: subprocess.Popen[bytes] | None = None
        self._resources = contextlib.ExitStack()
        self._started = 0.0

    # -- life ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._prepare()
            try:
                self._start([*self._argv(), *_SANDBOX])
            except EmulatorError as error:
                if "sandbox" not in str(error):
                    raise
                # A QEMU that was built without seccomp. The first attempt has used up the socket pairs.
                self._resources.pop_all().close()
                self._prepare()
                self._start(self._argv())
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def _prepare(self) -> None:
        self._work = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix=".work-", dir=self.folder)))
        self.console = SerialConsole(self.console_log)
        self._resources.callback(self.console.close)
        if self._report:
            self.report = SerialConsole(self.folder / "report.log")
            self._resources.callback(self.report.close)
        if self._agent:
            self.agent, self._agent_peer = socket.socketpair()
            self._resources.callback(self._agent_peer.close)
            self._resources.callback(self.agent.close)
        self._monitor = Monitor()
        self._resources.callback(self._monitor.close)
        self._resources.callback(self._kill)

    def _argv(self) -> list[str]:
        for drive in self._drives:
            if drive.overlay is not None and not drive.overlay.exists():
                raise EmulatorError(
                    f"the overlay {drive.overlay} does not exist", advice="create it with create_overlay"
                )
        ovmf = arguments.find_ovmf() if self.hardware.firmware is Firmware.UEFI else None
        variables = self._work / "variables.fd"
        if ovmf is not None:
            shutil.copyfile(self._variables or ovmf.variables, variables)
        return [
            str(self.program.path),
            *arguments.board(self.hardware, self.accelerator),
            *arguments.firmware(self.hardware.firmware, ovmf, variables),
            *arguments.display(self.hardware, windows=self._windows),
            *arguments.network(self._network, self.hardware),
            *arguments.kernel(self._kernel),
            *arguments.disks(self._drives, self.hardware),
            *("-action", f"shutdown=pause,reboot={'shutdown' if self._stop_on_reset else 'reset'}"),
        ]

    def _start(self, argv: list[str]) -> None:
        monitor, serial = self._monitor.peer.fileno(), self.console.peer.fileno()
        argv = [
            *argv,
            *("-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control"),
            *("-chardev", f"socket,id=serial,fd={serial}", "-serial", "chardev:serial"),
        ]
        ends = [monitor, serial]
        if self.report is not None:
            ends.append(self.report.peer.fileno())
            argv += ["-chardev", f"socket,id=report,fd={ends[-1]}", "-serial", "chardev:report"]
        if self._agent_peer is not None:
            ends.append(self._agent_peer.fileno())
            argv += arguments.agent(ends[-1])
        self._messages = self._work / "messages"
        with self._messages.open("wb") as messages:
            self._process = self._monitor.call(
                lambda: guarded(argv, pass_fds=ends, stderr=messages, environment={"TMPDIR": str(self._work)})
            )
        self._started = time.monotonic()
        self._monitor.peer.close()  # so that QEMU's end is the only one, and its end is seen
        self.console.peer.close()
        if self.report is not None:
            self.report.peer.close()
        if self._agent_peer is not None:
            self._agent_peer.close()
        try:
            self._monitor.connect()
        except EmulatorError as error:
            self._kill()
            raise self._broke_off(str(error)) from error
        # The overlay's own work file and the messages are open; from here QEMU needs no name on disk.

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _broke_off(self, otherwise: str) -> EmulatorError:
        words = self.messages().strip()
        return EmulatorError(
            f"QEMU broke off: {words[-800:]}" if words else f"QEMU broke off: {otherwise}",
            advice="check that the disks can be read, and that this QEMU has the devices of the emulated hardware",
        )

    # -- asking ----------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Process id of QEMU."""
        return self._running().pid

    @property
    def seconds(self) -> float:
        """Seconds since QEMU was started."""
        return time.monotonic() - self._started

    def messages(self) -> str:
        """What QEMU itself has written to its standard error."""
        with contextlib.suppress(OSError):
            return self._messages.read_bytes()[:65536].decode("utf-8", "replace")
        return ""

    def check(self) -> None:
        """Raise ``EmulatorError`` unless QEMU runs."""
        if self._running().poll() is not None:
            raise self._broke_off(f"exit code {self._running().returncode}")

    def events(self) -> tuple[Event, ...]:
        """What QEMU has reported so far, oldest first (RESET, SHUTDOWN, STOP, BLOCK_IO_ERROR, ...)."""
        return self._monitor.events()

    def since_start(self, event: Event) -> float:
        """Seconds from the start to this event."""
        return max(0.0, event.time - self._started)

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Run one QMP command."""
        try:
            return self._monitor.execute(command, arguments)
        except EmulatorError:
            self.check()
            raise

    def screen_text(self, picture: Picture | None = None) -> tuple[str, ...] | None:
        """The lines on the screen, of text mode or of a console drawn on a frame buffer; None when it cannot be read.

        ``picture`` is the screen where it was just taken: it is not taken again.
        """
        width, height, pixels = picture or self.picture()
        if (width, height) not in TEXT_PICTURES:
            return read_text(width, height, pixels)
        file = self._work / "text"
        self.execute("pmemsave", {"val": TEXT_ADDRESS, "size": TEXT_BYTES, "filename": str(file)})
        return decode_text(file.read_bytes())

    def picture(self) -> Picture:
        """The screen as it is now: width, height and RGB bytes."""
        file = self._work / "screen.ppm"
        self.execute("screendump", {"filename": str(file)})
        try:
            return parse_ppm(file.read_bytes())
        except ValueError as error:
            raise EmulatorError(f"QEMU gave no picture: {error}", advice="see QEMU's own messages") from error

    def screenshot(self, png: Path) -> None:
        """Write the screen as it is now as a PNG file."""
        png.write_bytes(png_of(*self.picture()))

    def bytes_read(self) -> tuple[int, ...]:
        """Bytes that the guest has read from each disk, in the order of the drives."""
        answer = self.execute("query-blockstats")
        counts = {}
        for entry in answer if isinstance(answer, list) else ():
            found = re.search(r"\bdev(\d+)\b", str(entry.get("qdev", "")))
            if found:
                counts[int(found[1])] = int(entry["stats"]["rd_bytes"])
        return tuple(counts.get(number, 0) for number in range(len(self._drives)))

    def forwarded_port(self, guest_port: int) -> int:
        """The port on 127.0.0.1 that leads to the guest's TCP port; ``EmulatorError`` if it is not forwarded."""
        text = str(self.execute("human-monitor-command", {"command-line": "info usernet"}))
        # TCP[HOST_FORWARD]  12  127.0.0.1 41234  10.0.2.15  22  0  0
        for line in text.splitlines():
            fields = line.split()
            if len(fields) >= 6 and fields[0] == "TCP[HOST_FORWARD]" and fields[5] == str(guest_port):
                return int(fields[3])
        raise EmulatorError(f"port {guest_port} of the guest is not forwarded", advice="name it in Network.forwards")

    def connected(self, guest_port: int) -> bool:
        """Whether a connection through the forward of this port is taken by the guest. The forward itself takes every one."""
        text = str(self.execute("human-monitor-command", {"command-line": "info usernet"}))
        lines = (line.split() for line in text.splitlines())
        return any(len(f) >= 6 and f[0] == "TCP[ESTABLISHED]" and f[5] == str(guest_port) for f in lines)

    def processors_dead(self) -> bool:
        """Whether every processor is halted with interrupts off: nothing will ever happen again. Only known under TCG."""
        text = str(self.execute("human-monitor-command", {"command-line": "info registers -a"}))
        halted = re.findall(r"\bHLT=(\d)", text)
        flags = re.findall(r"\b[ER]?FL=([0-9a-f]+)", text)
        return (
            bool(halted)
            and len(halted) == len(flags)
            and all(bit == "1" for bit in halted)
            and not any(int(value, 16) & 0x200 for value in flags)
        )

    def kernel_runs(self) -> bool:
        """Whether an operating system's kernel has taken over, as far as the first processor shows it.

        Paging is on, which BIOS and boot loaders leave off. UEFI has it on but runs in low addresses on ring 0: there it is an
        address in the upper half or ring 3 that tells.
        """
        text = str(self.execute("human-monitor-command", {"command-line": "info registers"}))
        control = re.search(r"\bCR0=([0-9a-f]+)", text)
        if control is None or not int(control[1], 16) & 1 << 31:
            return False
        if self.hardware.firmware is Firmware.BIOS:
            return True
        place, ring = re.search(r"\bRIP=([0-9a-f]{16})", text), re.search(r"\bCPL=(\d)", text)
        return (place is not None and int(place[1], 16) >> 47 != 0) or (ring is not None and ring[1] == "3")

    def processor_seconds(self) -> float:
        """Processor time QEMU has used, in seconds (proc(5), fields 14 and 15 of stat)."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def power_button(self) -> None:
        """Press the power button (ACPI): a guest that listens shuts down."""
        self.execute("system_powerdown")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EmulatorError("the emulated machine was not started", advice="use it as a context manager")
        return self._process


def create_overlay(path: Path, size: int) -> None:
    """Create the file of a kept overlay for a disk of ``size`` bytes; it names no backing file."""
    qemu_img.create(path, "qcow2", size)


def _fitted(hardware: Hardware) -> Hardware:
    import dataclasses

    wanted = hardware.memory or (1 << 30)
    memory = max(_MEMORY_LEAST, min(wanted, _MEMORY_LIMIT, _available_memory() // 2)) & ~((1 << 20) - 1)
    cpus = max(1, min(hardware.cpus or 2, os.cpu_count() or 1, 4))
    return dataclasses.replace(hardware, memory=memory, cpus=cpus)


def _available_memory() -> int:
    with contextlib.suppress(OSError, ValueError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) << 10
    return _MEMORY_LIMIT

"""The machine that plays the physical source: a recipe's disk booted under QEMU on PC hardware, reached over SSH."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.machines import board
from tests.machines.builder import BuiltMachine
from tests.machines.errors import MachineError
from tests.machines.writer import Acknowledgement, Writer

SERIAL = "P2VSRC0001"
MODEL = "NORTHWIND NW6000"
MAC = "52:54:00:a1:00:01"

# QEMU's device and the PCI address that gives the predictable name; 00:19.0 and 00:1f.6 are where Intel puts the
# on-board NIC of its chipsets.
_NICS = {
    "enp0s25": "e1000,id=nic0,addr=0x19",
    "enp0s5": "e1000,id=nic0,addr=0x5",
    "enp0s31f6": "e1000e,id=nic0,addr=0x1f.6",
}

_POLL = 0.25
# A connection made before the guest listens is never answered; sshd under TCG greets within a second or two.
_GREETING_TIMEOUT = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DataDisk:
    """One more disk: a raw file that the machine writes to. It follows the disks of the recipe (sda, or sda and sdb ...)."""

    path: Path
    serial: str


class PhysicalMachine:
    """A context manager: entering boots the machine and waits for SSH, leaving cuts its power.

    The disk is a throw-away overlay over the built one; a given `overlay` (qcow2, made if it is not there) is kept, and
    beside it what else the machine writes to: `OVERLAY.NAME` of each further disk, `OVERLAY.variables` of the firmware.
    The network is QEMU's user network without any way out; only the SSH port is forwarded, on 127.0.0.1 (`port`, 0 for
    a free one). QEMU dies with the thread that entered, so enter in one that outlives the use. A machine that does not
    start, boot or answer raises MachineError with the end of its console.
    """

    def __init__(
        self,
        machine: BuiltMachine,
        *,
        overlay: Path | None = None,
        port: int = 0,
        mac: str = MAC,
        serial: str = SERIAL,
        cpus: int = 2,
        memory_mib: int = 1024,
        data_disks: Sequence[DataDisk] = (),
        boot_timeout: float = 420.0,
    ) -> None:
        self.machine = machine
        self.mac = mac
        self.serial = serial
        self.data_disks = tuple(data_disks)
        self._overlay = overlay
        self._wanted_port = port
        self._cpus = cpus
        self._memory_mib = memory_mib
        self._boot_timeout = boot_timeout
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = contextlib.ExitStack()
        self._writer: Writer | None = None
        self._folder: Path | None = None

    # --- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            # short, for the 108 bytes that a socket's path may have
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pm-")))
            stack.callback(self.kill)
            self._start()
            self.wait_for_ssh()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self) -> None:
        overlay = self._overlay if self._overlay is not None else self.folder / "overlay.qcow2"
        overlays = [overlay]
        overlays += [overlay.with_name(f"{overlay.name}.{disk.name}") for disk in self.machine.recipe.further_disks]
        for path, base in zip(overlays, (self.machine.disk, *self.machine.further_disks), strict=True):
            if not path.exists():
                backing = ["-b", str(base), "-F", "raw"]
                command = [board.program("qemu-img"), "create", "-q", "-f", "qcow2", *backing, str(path)]
                subprocess.run(command, check=True, capture_output=True)
        variables = self.machine.variables
        if variables is not None:
            own = overlay.with_name(overlay.name + ".variables")
            if not own.exists():
                shutil.copyfile(variables, own)
            variables = own
        log = (self.folder / "qemu.log").open("wb")
        with log:
            self._process = subprocess.Popen(
                self._command(overlays, variables), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._port = self._forwarded_port()
        self.known_hosts.write_text(self.host_key_line + "\n")

    def _command(self, overlays: Sequence[Path], variables: Path | None) -> list[str]:
        recipe = self.machine.recipe
        forward = f"hostfwd=tcp:127.0.0.1:{self._wanted_port}-:22"
        command = [
            *board.base_arguments(memory_mib=self._memory_mib, cpus=self._cpus),
            *board.physical_arguments(self.folder),
            *("-vga", "std"),
            *("-serial", f"file:{board.escape(self.console)}"),
            *("-qmp", f"unix:{self._monitor},server=on,wait=off"),
            *("-netdev", f"user,id=net0,restrict=on,{forward}"),
            *("-device", f"{_NICS[recipe.nic]},netdev=net0,mac={self.mac}"),
            *board.firmware_arguments(recipe.firmware, variables),
        ]
        serials = [self.serial, *(disk.serial for disk in recipe.further_disks)]
        disks = [("qcow2", path, serial) for path, serial in zip(overlays, serials, strict=True)]
        disks += [("raw", disk.path, disk.serial) for disk in self.data_disks]
        for number, (kind, path, serial) in enumerate(disks):
            name = f"disk{number}"
            node = f"driver={kind},node-name={name},discard=unmap,detect-zeroes=unmap,cache.no-flush=on"
            command += ["-blockdev", f"{node},file.driver=file,file.filename={board.escape(path)}"]
            device = f"ide-hd,bus=ide.{number},drive={name},serial={serial},model={MODEL}"
            # UEFI boots what its own variables say, as on a desk
            first = number == 0 and recipe.firmware == "bios"
            command += ["-device", device + (",bootindex=0" if first else "")]
        return command

    def kill(self) -> None:
        """Cut the power: QEMU is killed, what the guest had not written is lost. Harmless on a machine that is off."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def reset(self, *, wait: bool = True) -> None:
        """Press the reset button and, if asked, wait until SSH answers again."""
        self.execute("system_reset")
        if wait:
            self.wait_for_ssh()

    def power_off(self) -> None:
        """Shut the guest down in order (disks are clean afterwards) and wait until it is off."""
        self.run("systemctl --no-block poweroff", check=False)
        try:
            self._running().wait(timeout=self._boot_timeout)
        except subprocess.TimeoutExpired:
            raise self._failure("did not power off") from None
        self.kill()

    # --- facts --------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Scratch folder of this run: console log, QEMU's messages, sockets. Gone after leaving."""
        if self._folder is None:
            raise MachineError("the machine was not entered")
        return self._folder

    @property
    def _monitor(self) -> Path:
        return self.folder / "qmp"

    @property
    def console(self) -> Path:
        """What the guest wrote to its first serial port since power-on."""
        return self.folder / "console.log"

    @property
    def known_hosts(self) -> Path:
        """A known_hosts file with this machine's key."""
        return self.folder / "known_hosts"

    @property
    def identity(self) -> Path:
        """The private key that root accepts."""
        return self.machine.keys.identity

    @property
    def ssh_port(self) -> int:
        """The port on 127.0.0.1 that leads to the guest's port 22."""
        if self._port is None:
            raise MachineError("the machine is not running")
        return self._port

    @property
    def host_key_line(self) -> str:
        """The known_hosts line of this machine."""
        return f"[127.0.0.1]:{self.ssh_port} {self.machine.keys.host_public}"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise MachineError("the machine is not running")
        return self._process

    def _failure(self, what: str) -> MachineError:
        messages = board.tail(self.folder / "qemu.log", 5)
        return MachineError(f"{self.machine.recipe.name} {what}\n{messages}\nconsole:\n{board.tail(self.console)}")

    # --- QMP ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _qmp(self) -> Iterator[QEMUMonitorProtocol]:
        monitor = QEMUMonitorProtocol(str(self._monitor))
        monitor.connect()
        try:
            yield monitor
        finally:
            monitor.close()

    def execute(self, command: str, **arguments: object) -> object:
        """Run one QMP command and return its result."""
        self._running()
        with self._qmp() as monitor:
            return monitor.cmd(command, **arguments)

    def _forwarded_port(self) -> int:
        deadline = time.monotonic() + 60
        while not self._monitor.exists():
            if self._running().poll() is not None or time.monotonic() > deadline:
                raise self._failure("did not start")
            time.sleep(0.02)
        text = str(self.execute("human-monitor-command", **{"command-line": "info usernet"}))
        found = re.search(r"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", text)
        if found is None:
            raise self._failure(f"forwards no port: {text}")
        return int(found[1])

    def set_link(self, *, up: bool) -> None:
        """Plug the network cable in or pull it out; open connections stay open and hear nothing."""
        self.execute("set_link", name="nic0", up=up)

    # --- SSH ----------------------------------------------------------------------------------------------------

    def ssh_command(self, user: str = "root") -> list[str]:
        """Return the ssh command line up to the destination, with this machine's key and no other configuration."""
        options = {
            "UserKnownHostsFile": str(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "IdentitiesOnly": "yes",
            "BatchMode": "yes",
            "ConnectTimeout": "60",
            "ServerAliveInterval": "15",
            "LogLevel": "ERROR",
        }
        command = [board.program("ssh"), "-F", "none", "-i", str(self.identity), "-p", str(self.ssh_port)]
        for name, value in options.items():
            command += ["-o", f"{name}={value}"]
        return [*command, f"{user}@127.0.0.1"]

    def run(
        self, command: str, *, text: str | None = None, check: bool = True, timeout: float = 180.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command as root with `text` on its standard input.

        A failure raises MachineError unless `check` is false; subprocess.TimeoutExpired after `timeout` seconds.
        """
        result = subprocess.run(
            [*self.ssh_command(), command],
            input="" if text is None else text,
            text=True,
            capture_output=True,
            check=False,
            timeout=timeout,
        )
        if check and result.returncode != 0:
            raise MachineError(f"{command!r} failed with exit code {result.returncode}:\n{result.stderr}")
        return result

    def wait_for_ssh(self) -> None:
        """Return when root can log in; MachineError when the machine stops or the boot takes too long."""
        deadline = time.monotonic() + self._boot_timeout
        while not self._banner():
            if self._running().poll() is not None:
                raise self._failure("stopped while it booted")
            if time.monotonic() > deadline:
                raise self._failure("did not answer on its SSH port in time")
            time.sleep(_POLL)
        self.run("true")

    def _banner(self) -> bool:
        # QEMU accepts before the guest listens, and closes again: only sshd's greeting counts
        try:
            with socket.create_connection(("127.0.0.1", self.ssh_port), timeout=2) as connection:
                connection.settimeout(_GREETING_TIMEOUT)
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    # --- the moving source --------------------------------------------------------------------------------------

    def remove_disk(self, name: str) -> None:
        """Let the guest lose its disk `name` ("sda", "sdb"), as when a cable is pulled: reads of it fail from now on."""
        self.run(f"echo 1 > /sys/block/{name}/device/delete")

    def start_writer(self, folder: str = "/srv/writer") -> Writer:
        """Start a process in the guest that keeps changing files under `folder`, each change synced before it counts."""
        if self._writer is not None:
            raise MachineError("a writer is running already")
        self._writer = Writer(self.ssh_command(), folder)
        return self._writer

    def stop_writer(self) -> list[Acknowledgement]:
        """Stop the writer and return all changes that it had acknowledged, in order."""
        if self._writer is None:
            raise MachineError("no writer is running")
        writer, self._writer = self._writer, None
        return writer.stop()

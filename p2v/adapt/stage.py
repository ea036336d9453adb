"""The self-adaptation boot: the machine's own kernel, initramfs and userland change what has to change, on overlays over its disks.

QEMU starts the kernel with the initramfs and an archive appended to it, which holds the stage, its tables and a static busybox. With
initramfs-tools the stage becomes the first process of the machine's root file system; with dracut it runs in a chroot, from a hook
before the real root is entered. It reports over a second serial port and switches the machine off.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from formats.machine import Machine
from p2v.adapt import cpio
from p2v.adapt.audit import Change, ItemResult, Report, Status, audit_text, read_report
from p2v.adapt.kernel import GuestKernel
from p2v.adapt.linux import command_line, facts
from p2v.adapt.plan import NETWORK_DRIVERS, STORAGE_DRIVERS, AdaptPlan, named_nics
from p2v.emulator import Accelerator, DirectKernel, Drive, Emulator, Hardware
from p2v.errors import AdaptationError

_POLL = 0.2
_MEMORY = 1 << 30
_TOTAL = 3600.0  # seconds; making an initramfs anew takes minutes in an emulator
_IDLE = 90.0  # seconds without output, disk access or use of the processor
_BUSY_SHARE = 0.1
_MARK = "p2v: "

# What stage and hooks ask of busybox; a test compares it with the stage.
_APPLETS = frozenset(
    [
        *(
            "awk",
            "base64",
            "cat",
            "chroot",
            "cmp",
            "cp",
            "cpio",
            "cut",
            "dd",
            "dirname",
            "find",
            "grep",
            "gzip",
            "head",
            "insmod",
        ),
        *(
            "ln",
            "mkdir",
            "mount",
            "rm",
            "rmdir",
            "sed",
            "sh",
            "sha256sum",
            "sleep",
            "sort",
            "stat",
            "sync",
            "tail",
            "tar",
            "timeout",
        ),
        *("tr", "umount"),
    ]
)

_START = """\
B=/p2v/busybox
$B mkdir -p /run/p2v
$B mount -t tmpfs -o mode=0700,exec p2v /run/p2v
$B cp -R /p2v/. /run/p2v/
for m in /p2v/modules/*.ko; do [ ! -f "$m" ] || $B insmod "$m"; done
"""

# Sourced by initramfs-tools after each of its scripts, the first time with /run mounted; /run moves into the real root.
_PARAM = """\
if [ -d /run ] && [ ! -e /run/p2v/stage.sh ]; then /p2v/busybox sh /p2v/start; fi
"""

_PRE_UDEV = """\
[ -e /run/p2v/stage.sh ] || /p2v/busybox sh /p2v/start
"""

# Sourced by dracut before it enters the real root, which is at /sysroot then.
_PRE_PIVOT = """\
B=/p2v/busybox
[ -e /run/p2v/stage.sh ] || $B sh /p2v/start
for d in run dev proc sys; do $B mount -o rbind /$d /sysroot/$d; done
$B chroot /sysroot /bin/sh /run/p2v/stage.sh </dev/null >/dev/console 2>&1
$B sync
echo o > /proc/sysrq-trigger
while :; do $B sleep 1; done
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """What a self-adaptation boot did. The changes are in the drives' overlays; ``audit`` and ``console`` are files in the folder."""

    items: tuple[ItemResult, ...]
    changes: tuple[Change, ...]
    seconds: float
    console: Path
    audit: Path

    @property
    def changed(self) -> bool:
        """Whether the overlays hold anything that is worth keeping."""
        return bool(self.changes)


def adapt(
    plan: AdaptPlan,
    machine: Machine,
    kernel: GuestKernel,
    drives: Sequence[Drive],
    folder: Path,
    *,
    listen: Callable[[str], None] | None = None,
    accelerator: Accelerator | None = None,
) -> Adaptation:
    """Boot the machine once for the plan's items. Every drive (the boot disk first) must have a kept overlay, which gets the changes.

    ``folder`` gets ``console.log``, ``report.log`` and ``audit.diff``. ``listen`` gets a few words at each step; must not raise.
    Raises ``AdaptationError`` when anything went wrong: the overlays are to be thrown away, the disks below are as they were;
    ``EmulatorError`` when QEMU cannot be started or breaks off.
    """
    if not drives or any(drive.overlay is None for drive in drives):
        raise ValueError("an adaptation needs a kept overlay for every drive")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapt-", dir=folder) as work:
        initramfs = Path(work, "initramfs")
        _write_initramfs(initramfs, plan, machine, kernel)
        direct = DirectKernel(image=kernel.image, initramfs=initramfs, command_line=_command_line(machine, kernel))
        hardware = Hardware(controller=kernel.controller, nic=None, memory=_MEMORY, cpus=2)
        with Emulator(
            hardware,
            drives,
            folder=folder,
            kernel=direct,
            accelerator=accelerator,
            stop_on_reset=True,
            report=True,
        ) as emulator:
            ended = _Watch(emulator, listen or _ignore).run()
            # Answered after the machine was stopped, and with that the overlays' tables were written.
            emulator.execute("query-status")
            seconds, console = emulator.seconds, emulator.console_log
        found = read_report((folder / "report.log").read_bytes())
    report = _accepted(found, ended, console)
    items = _complete(plan, report)
    audit = folder / "audit.diff"
    audit.write_text(audit_text(items, report.changes), encoding="utf-8")
    return Adaptation(items=items, changes=report.changes, seconds=round(seconds, 1), console=console, audit=audit)


def _ignore(_text: str) -> None:
    pass


def _accepted(report: Report | None, ended: str, console: Path) -> Report:
    if report is not None and not report.error:
        return report
    if report is not None:
        raise AdaptationError(
            f"the machine could not adapt itself: {report.error}",
            advice=f"{_advice(report.error)} Nothing was changed. The boot's console: {console}. "
            "--no-adapt converts without it, --adapt-only leaves items out.",
        )
    lines = [line for line in console.read_text("utf-8", "replace").splitlines() if line.strip()]
    last = re.sub(r"[^\x20-\x7e]", "", lines[-1])[:200] if lines else "it printed nothing"
    raise AdaptationError(
        f"the self-adaptation boot did not come to its end: {ended}; the last line of its console: {last}",
        advice=f"Nothing was changed. The boot's console: {console}. --no-adapt converts without adaptation.",
    )


def _advice(error: str) -> str:
    if "no room" in error or "KiB free" in error:
        return "Make room on that file system of the source (old kernels are the usual cause)."
    if "cannot be written" in error:
        return "Check the file system on the source (is it mounted read-only, or has it errors?)."
    if " failed for " in error:
        return "Run that tool on the source by hand to see what it needs."
    if "cannot be mounted" in error:
        return "See /etc/fstab of the source."
    return "See the console."


def _complete(plan: AdaptPlan, report: Report) -> tuple[ItemResult, ...]:
    found = {item.name: item for item in report.items}
    return tuple(
        found.get(item.name) or ItemResult(name=item.name, status=Status.NOTHING, detail="nothing to do")
        for item in plan.items
    )


def _command_line(machine: Machine, kernel: GuestKernel) -> str:
    # panic=1: what cannot go on ends at once. The file systems are checked by their journals alone, as after a power cut.
    extra = "ro console=ttyS0,115200 panic=1 noresume fsck.mode=skip mitigations=off audit=0 selinux=0 systemd.show_status=0"
    if kernel.kind == "initramfs-tools":
        extra += " init=/bin/sh -- /run/p2v/stage.sh"
    else:
        extra += " rd.shell=0 rd.emergency=reboot rd.timeout=120"
    return command_line(machine, extra=extra)


# -- the archive -------------------------------------------------------------------------------------------------------


def find_busybox() -> Path:
    """A static busybox for x86 on this host; ``AdaptationError`` with the package to install if there is none."""
    for folder in os.get_exec_path():
        for name in ("busybox", "busybox-static", "busybox.static"):
            found = Path(folder, name)
            if os.access(found, os.X_OK) and _is_static_x86(found) and _applets(found) >= _APPLETS:
                return found
    raise AdaptationError(
        "no static busybox for x86 with all that is needed is installed; the self-adaptation boot needs one",
        advice="install it (Debian, Ubuntu: apt-get install busybox-static; Fedora: dnf install busybox), or convert with --no-adapt",
    )


def _applets(program: Path) -> frozenset[str]:
    try:
        said = subprocess.run([program, "--list"], capture_output=True, timeout=30, check=False, text=True).stdout
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    return frozenset(said.split())


def _is_static_x86(program: Path) -> bool:
    """An ELF program for x86-64 or i386 without an interpreter (System V ABI: no PT_INTERP, type 3, among the program headers)."""
    with program.open("rb") as file:
        head = file.read(64)
        if head[:4] != b"\x7fELF" or head[5] != 1 or int.from_bytes(head[18:20], "little") not in (3, 62):
            return False
        wide = head[4] == 2
        table, size, count = (slice(32, 40), 54, 56) if wide else (slice(28, 32), 42, 44)
        file.seek(int.from_bytes(head[table], "little"))
        for _ in range(int.from_bytes(head[count : count + 2], "little")):
            if int.from_bytes(file.read(int.from_bytes(head[size : size + 2], "little"))[:4], "little") == 3:
                return False
    return True


def _write_initramfs(target: Path, plan: AdaptPlan, machine: Machine, kernel: GuestKernel) -> None:
    with target.open("wb") as file:
        with kernel.initramfs.open("rb") as own:
            shutil.copyfileobj(own, file, 1 << 20)
        # At least one block of zeroes: old unpackers of LZ4 take them for the end.
        file.write(bytes(-file.tell() % 512 + 512))
        file.write(cpio.archive(_entries(plan, machine, kernel)))


def _entries(plan: AdaptPlan, machine: Machine, kernel: GuestKernel) -> Iterator[cpio.Entry]:
    yield from (cpio.folder("p2v"), cpio.folder("p2v/in"), cpio.folder("p2v/modules"))
    yield cpio.file("p2v/busybox", find_busybox().read_bytes(), 0o755)
    yield cpio.file("p2v/start", _START.encode())
    for name in ("stage.sh", "rename.awk", "lacking.awk"):
        yield cpio.file(f"p2v/{name}", resources.files("p2v.adapt").joinpath(name).read_bytes(), 0o755)
    for name, text in stage_tables(plan, machine).items():
        yield cpio.file(f"p2v/in/{name}", text.encode("utf-8", "replace"))
    for module in kernel.modules:
        yield cpio.file(f"p2v/modules/{module.name}", module.read_bytes())
    # lib may be a symbolic link in the initramfs: only folders below it are named.
    if kernel.kind == "dracut":
        for hook, text in (("pre-udev/01-p2v.sh", _PRE_UDEV), ("pre-pivot/99-p2v.sh", _PRE_PIVOT)):
            yield cpio.file(f"lib/dracut/hooks/{hook}", text.encode(), 0o755)
    else:
        yield cpio.file("conf/param.conf", _PARAM.encode())


def stage_tables(plan: AdaptPlan, machine: Machine) -> dict[str, str]:
    """Everything that the stage reads below ``in``, by file name."""
    tables = dict(facts(machine))
    tables["items"] = "".join(f"{item.name}\n" for item in plan.items)
    tables["nics"] = "".join(f"{name} {mac}\n" for name, mac in named_nics(machine))
    tables["drivers"] = "".join(f"{name}\n" for name in STORAGE_DRIVERS)
    tables["all-drivers"] = "".join(f"{name}\n" for name in (*STORAGE_DRIVERS, *NETWORK_DRIVERS))
    if plan.rebuild:
        tables["rebuild"] = "\n"
    return tables


# -- watching ----------------------------------------------------------------------------------------------------------


class _Watch:
    """Waits for the end of the boot, and ends it when nothing moves any more."""

    def __init__(self, emulator: Emulator, listen: Callable[[str], None]) -> None:
        self._emulator, self._listen = emulator, listen
        self._rest = ""
        self._seen: tuple[object, ...] = ()
        self._moved = time.monotonic()
        self._processor = (time.monotonic(), 0.0)

    def run(self) -> str:
        """How it ended, in words; the machine is off, was reset or hangs then."""
        emulator = self._emulator
        while True:
            emulator.check()
            stopped = [event for event in emulator.events() if event.name == "SHUTDOWN"]
            self._hear()
            if stopped:
                reset = stopped[0].data.get("reason") == "guest-reset"
                return "the machine panicked or restarted" if reset else "the machine switched itself off"
            now = time.monotonic()
            self._look(now)
            if now - self._moved > _IDLE:
                return f"nothing happened for {_IDLE:.0f} s"
            if emulator.seconds > _TOTAL:
                return f"it took more than {_TOTAL:.0f} s"
            time.sleep(_POLL)

    def _hear(self) -> None:
        *lines, self._rest = (self._rest + self._emulator.console.take()).split("\n")
        self._rest = self._rest[-4096:]
        for line in lines:
            _, mark, text = line.partition(_MARK)
            if mark:
                self._listen("".join(letter for letter in text.strip() if letter.isprintable())[:300])

    def _look(self, now: float) -> None:
        emulator = self._emulator
        report = emulator.report.total if emulator.report is not None else 0
        seen = (emulator.console.total, report, emulator.bytes_read())
        then, used = self._processor
        busy = False
        if now - then >= 1:
            current = emulator.processor_seconds()
            busy = (current - used) / (now - then) > _BUSY_SHARE
            self._processor = (now, current)
        if busy or seen != self._seen:
            self._seen, self._moved = seen, now

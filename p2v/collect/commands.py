"""The catalogue of read-only commands that describe a machine, run as one batch.

All commands go into one POSIX shell script that is piped to ``sh``: one round trip, no file on the host; a second one lists the initramfs
images meanwhile. Each command's output is framed on standard output *and* standard error by lines that hold a nonce of this run, so any
bytes may lie between them and both streams stay apart without a temporary file. Times come from /proc/uptime, which a shell reads
without starting a process.

LVM is asked with ``--readonly`` (no locks, no repair) and told to keep no hints, backups or archives: nothing is written.
"""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from p2v.collect import initramfs
from p2v.session import CommandResult

SECONDS = 20
"""After this many seconds a single command is ended, where the host has ``timeout``."""

_BATCH_SECONDS = 300.0
_INITRAMFS_SECONDS = 120


class Runner(Protocol):
    """Runs a command of the source to its end; ``Session`` is one."""

    def run(
        self,
        command: str | Sequence[str],
        *,
        root: bool = False,
        input: bytes = b"",  # noqa: A002 - the session's word for it
        timeout: float = 60.0,
        check: bool = False,
    ) -> CommandResult:
        """As ``Session.run``."""
        ...


class Need(Enum):
    """What it means that a command fails."""

    WANTED = "wanted"  # a notice: something is missing in the record
    OPTIONAL = "optional"  # kept in the log only: most hosts lack the tool or the thing


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One entry of the catalogue.

    ``text`` is one program's arguments or, with ``script``, shell text for the batch's own shell. ``each`` is a glob: the command runs for
    each match, which is ``$p`` in the text and, by its last part, ``$n``; its results are called ``name:LAST PART``.
    """

    name: str
    text: str
    need: Need = Need.OPTIONAL
    script: bool = False
    each: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one command of the batch did. ``seconds`` has the grain of the host's uptime (10 ms)."""

    name: str
    exit_code: int
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def text(self) -> str:
        """Standard output as text."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def error_text(self) -> str:
        """Standard error as text, stripped."""
        return self.stderr.decode("utf-8", "replace").strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLog:
    """All outcomes of a batch by name, in the order in which they were run. ``complete``: the batch came to its end."""

    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    complete: bool = True

    def stdout(self, name: str) -> bytes:
        """Standard output of a command; empty when it was not run."""
        outcome = self.outcomes.get(name)
        return outcome.stdout if outcome is not None else b""

    def text(self, name: str) -> str:
        """Standard output of a command as text; empty when it was not run."""
        return self.stdout(name).decode("utf-8", "replace")

    def family(self, name: str) -> Iterator[tuple[str, Outcome]]:
        """The outcomes of a command that ran for each of something, with what it ran for."""
        prefix = name + ":"
        for key, outcome in self.outcomes.items():
            if key.startswith(prefix):
                yield key[len(prefix) :], outcome


_LVM = """--readonly --config 'backup{backup=0 archive=0} devices{hints="none"}'"""

_DISKS = "/sys/block/*"
_REAL_DISK = "case $n in loop*|ram*|zram*|dm-*|md*|sr*|fd*|nbd*) continue;; esac; "

# The drivers from the disk upwards, nearest first: "sd ahci", "virtio_blk virtio-pci", "nvme".
_DRIVERS = (
    "d=$(readlink -f $p/device) || exit 1; while [ ${#d} -gt 12 ]; do "
    "[ -e $d/driver ] && { l=$(readlink $d/driver); echo ${l##*/}; }; d=${d%/*}; done; :"
)

_DMI = (
    "for f in sys_vendor product_name product_serial product_uuid board_vendor board_name chassis_type bios_vendor bios_version; do "
    "[ -r /sys/class/dmi/id/$f ] && { v=; IFS= read -r v </sys/class/dmi/id/$f; printf '%s=%s\\n' $f \"$v\"; }; done; :"
)

_NIC = (
    "for f in address addr_assign_type operstate carrier; do "
    "v=; IFS= read -r v <$p/$f && printf '%s=%s\\n' $f \"$v\"; done 2>/dev/null; "
    "[ -e $p/device ] || exit 0; echo device=$(readlink -f $p/device); "
    "[ -e $p/device/driver ] && { l=$(readlink $p/device/driver); echo driver=${l##*/}; }; "
    "for f in vendor device; do v=; read -r v <$p/device/$f && echo pci_$f=$v; done 2>/dev/null; :"
)

# Only lines that say who configures which interface: these files may hold Wi-Fi and 802.1X secrets, which must not be collected.
_NETWORK_LINES = (
    "^[[:space:]]*(\\[|auto|allow-|iface|source|inherits|id=|type=|interface-name=|mac-address=|method=|DEVICE|NAME=|TYPE=|HWADDR|BOOTPROTO|ONBOOT|NM_CONTROLLED"
    "|STARTMODE|Name=|MACAddress=|DHCP=|network:|version:|renderer:|ethernets:|bonds:|vlans:|bridges:|macaddress:|match:|name:|dhcp[46]:|[A-Za-z0-9_.-]+:[[:space:]]*$)"
)
_NETWORK_FILES = (
    "/etc/network/interfaces /etc/network/interfaces.d/* /etc/netplan/*.yaml /etc/NetworkManager/system-connections/* "
    "/run/NetworkManager/system-connections/* "
    "/etc/sysconfig/network-scripts/ifcfg-* /etc/sysconfig/network/ifcfg-* /etc/systemd/network/*.network /run/systemd/network/*.network"
)
_NETWORK = (
    f"for f in {_NETWORK_FILES}; do [ -f $f ] && {{ echo \"@file $f\"; grep -E '{_NETWORK_LINES}' $f; }}; done; :"
)

CATALOGUE: tuple[Command, ...] = (
    Command(name="user", text="id -u"),
    Command(name="hostname", text="cat /proc/sys/kernel/hostname", need=Need.WANTED, script=True),
    Command(name="uname", text="uname -s -r -m", need=Need.WANTED),
    Command(name="os-release", text="cat /etc/os-release || cat /usr/lib/os-release", need=Need.WANTED, script=True),
    Command(name="init", text="cat /proc/1/comm", script=True),
    Command(name="cmdline", text="cat /proc/cmdline", need=Need.WANTED, script=True),
    Command(name="memory", text="cat /proc/meminfo", need=Need.WANTED),
    Command(
        name="memory-blocks",
        text="read -r s </sys/devices/system/memory/block_size_bytes && c=0 && "
        "for f in /sys/devices/system/memory/memory[0-9]*; do c=$((c+1)); done && echo $s $c",
        script=True,
    ),
    Command(name="lscpu", text="lscpu -J", need=Need.WANTED),
    Command(name="dmi", text=_DMI, script=True),
    Command(name="virtualization", text="systemd-detect-virt"),
    Command(name="adjtime", text="cat /etc/adjtime", script=True),
    Command(name="efi", text="[ -d /sys/firmware/efi ] && cat /sys/firmware/efi/fw_platform_size", script=True),
    Command(
        name="efivars",
        text="[ ! -d /sys/firmware/efi/efivars ] || tar -C /sys/firmware/efi/efivars -cf - .",
        script=True,
    ),
    Command(name="lsblk", text="lsblk -J -O -b", need=Need.WANTED),
    Command(
        name="lsblk-pairs",
        text="lsblk -P -b -o NAME,KNAME,PKNAME,TYPE,SIZE,FSTYPE,UUID,LABEL,MOUNTPOINT,MODEL,SERIAL,WWN,TRAN,ROTA,RM,LOG-SEC,PHY-SEC",
    ),
    Command(name="links", text="find /dev/disk -type l -printf '%p %l\\n'", need=Need.WANTED),
    Command(name="drivers", text=_DRIVERS, script=True, each=_DISKS),
    Command(name="table", text="sfdisk --json /dev/$n", script=True, each=_DISKS),
    Command(name="head", text="dd if=/dev/$n bs=65536 count=1 2>/dev/null", script=True, each=_DISKS),
    Command(name="mounts", text="cat /proc/self/mountinfo", need=Need.WANTED, script=True),
    Command(name="swaps", text="cat /proc/swaps", script=True),
    Command(name="fstab", text="cat /etc/fstab", need=Need.WANTED, script=True),
    Command(name="crypttab", text="cat /etc/crypttab", script=True),
    Command(name="mdstat", text="cat /proc/mdstat", script=True),
    Command(name="lvm", text=f"lvm fullreport {_LVM} --reportformat json --units b --nosuffix"),
    Command(name="dmsetup", text="dmsetup table"),  # keys of crypt targets are shown as zeroes without --showkeys
    Command(name="addresses", text="ip -j addr", need=Need.WANTED),
    Command(name="routes", text="ip -j route"),
    Command(name="nic", text=_NIC, script=True, each="/sys/class/net/*"),
    Command(name="permanent", text="ethtool -P $n", script=True, each="/sys/class/net/*"),
    Command(name="network", text=_NETWORK, script=True),
    Command(name="managers", text="cat /proc/[0-9]*/comm 2>/dev/null", script=True),
    Command(name="modules", text="cat /proc/modules", script=True),
    Command(
        name="boot",
        text="find /boot -xdev -maxdepth 3 -type f -printf '%p %s\\n' -o -type l -printf '%p 0 %l\\n'",
        need=Need.WANTED,
    ),
    Command(
        name="esp",
        text="for d in /boot/efi /efi /boot; do [ -d $d/EFI ] && find $d/EFI -maxdepth 3 -type f -printf '%p %s\\n'; done; :",
        script=True,
    ),
    Command(name="builtin", text="cat $p/modules.builtin", script=True, each="/lib/modules/*"),
)

_PROLOGUE = """\
set -f; set +f
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin; LC_ALL=C; LVM_SUPPRESS_FD_WARNINGS=1; export PATH LC_ALL LVM_SUPPRESS_FD_WARNINGS
T=; command -v timeout >/dev/null 2>&1 && T='timeout %(seconds)d'
b() { printf '\\n%%s B %%s\\n' "$N" "$1"; printf '\\n%%s B %%s\\n' "$N" "$1" >&2; read -r t _ </proc/uptime; }
e() { r=$?; read -r u _ </proc/uptime; printf '\\n%%s E %%s %%s %%s\\n' "$N" $r $t $u; printf '\\n%%s E\\n' "$N" >&2; }
"""


_EPILOGUE = "printf '\\n%s Z\\n' \"$N\"\n"


def script(nonce: str, catalogue: Sequence[Command] = CATALOGUE) -> str:
    """The catalogue as shell text; ``nonce`` marks its frames."""
    parts = [_prologue(nonce)]
    for command in catalogue:
        body = f"( {command.text} ) </dev/null" if command.script else f"$T {command.text} </dev/null"
        if command.each:
            only = _REAL_DISK if command.each == _DISKS else ""
            parts.append(
                f'for p in {command.each}; do [ -e "$p" ] || continue; n=${{p##*/}}; {only}b "{command.name}:$n"; {body}; e; done\n'
            )
        else:
            parts.append(f"b {command.name}; {body}; e\n")
    return "".join([*parts, _EPILOGUE])


def initramfs_script(nonce: str) -> str:
    """The listing of the initramfs images as shell text; the slowest part, so it runs beside the catalogue."""
    return (
        f"{_prologue(nonce)}"
        'P=; for c in python3 /usr/libexec/platform-python python; do command -v $c >/dev/null 2>&1 && "$c" -c '
        "'import sys; sys.exit(sys.version_info < (3, 4))' 2>/dev/null && { P=$c; break; }; done\n"
        f'b initramfs; if [ -n "$P" ]; then ${{T%% *}} ${{T:+{_INITRAMFS_SECONDS}}} "$P" -I -S -B -c '
        f"{shlex.quote(initramfs.PROGRAM)} {initramfs.GLOBS} </dev/null; "
        f'else echo "no python3" >&2; (exit 127); fi; e\n{_EPILOGUE}'
    )


def _prologue(nonce: str) -> str:
    return f"N=@{nonce}\n{_PROLOGUE % {'seconds': SECONDS}}"


def collect(runner: Runner, *, root: bool = True) -> CommandLog:
    """Run the catalogue on the source and return every result.

    What ``runner.run`` raises is passed on: without a connection or a way to become root there is nothing to collect.
    """
    nonce = secrets.token_hex(12)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="initramfs") as beside:

        def run(text: str) -> CommandLog:
            result = runner.run("sh -s", root=root, input=text.encode(), timeout=_BATCH_SECONDS)
            return parse(nonce, result.stdout, result.stderr)

        slow = beside.submit(run, initramfs_script(nonce))
        logs = (run(script(nonce)), slow.result())
    return CommandLog(
        outcomes={name: outcome for log in logs for name, outcome in log.outcomes.items()},
        complete=all(log.complete for log in logs),
    )


def parse(nonce: str, stdout: bytes, stderr: bytes) -> CommandLog:
    """Take the frames of a batch apart; what is cut off in the end is left out and ``complete`` is False."""
    begin = re.compile(rb"\n@%b B ([^\n]{1,300})\n" % nonce.encode())
    end = re.compile(rb"\n@%b E (-?\d{1,5}) ([\d.]{1,20}) ([\d.]{1,20})\n" % nonce.encode())
    errors = _errors(nonce, stderr)
    outcomes: dict[str, Outcome] = {}
    position = 0
    while (opening := begin.search(stdout, position)) is not None:
        closing = end.search(stdout, opening.end() - 1)
        if closing is None:
            break
        name = opening[1].decode("utf-8", "replace")
        outcomes[name] = Outcome(
            name=name,
            exit_code=int(closing[1]),
            # an empty output lets both frames share their line feed
            stdout=stdout[opening.end() : max(closing.start(), opening.end())],
            stderr=errors.get(name, b""),
            seconds=round(float(closing[3]) - float(closing[2]), 2),
        )
        position = closing.end() - 1
    return CommandLog(outcomes=outcomes, complete=stdout.rstrip(b"\n").endswith(b"@%b Z" % nonce.encode()))


def _errors(nonce: str, stderr: bytes) -> dict[str, bytes]:
    frame = re.compile(rb"\n@%b B ([^\n]{1,300})\n(.*?)\n@%b E\n" % (nonce.encode(), nonce.encode()), re.DOTALL)
    found: dict[str, bytes] = {}
    position = 0
    while (match := frame.search(stderr, position)) is not None:
        found[match[1].decode("utf-8", "replace")] = match[2]
        position = match.end() - 1
    return found

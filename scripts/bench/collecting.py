"""What a copy of a half-empty ext4 disk over SSH costs, against ``ssh dd > raw; qemu-img convert``.

The disk is made of ordinary files (this computer's /usr) to about 48 %, and its free space holds deleted leftovers. Both ways run in
turn against one sshd on loopback; medians count. Ours runs in a process of its own, so that its peak memory is seen.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from formats.block import Extent, Kind
from formats.images import create_sink, open_source
from formats.layers import UsedOnly
from formats.layouts import ext
from formats.transfer import copy, fingerprint
from p2v.collect.agent import Agent
from p2v.session import Session, SshTarget
from tests.p2v.sshd import SshServer, ssh_server

MIB, GIB = 1 << 20, 1 << 30
WALL_TARGET, WIRE_TARGET, MEMORY_TARGET = 0.6, 0.5, 300 << 20


def main() -> None:
    """Run the measurement that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", type=float, default=4.0, help="GiB of the disk")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to work; default: /dev/shm when the files fit, else /tmp"
    )
    parser.add_argument(
        "--cipher",
        default="aes128-gcm@openssh.com",
        help="of ssh dd; the default is the fastest, not ssh's own default",
    )
    parser.add_argument("--ours", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        print(json.dumps(ours(json.loads(options.ours))))
        return
    size = int(options.size * GIB)
    work = Path(tempfile.mkdtemp(prefix="p2v-bench-", dir=options.folder or _roomy(3 * size)))
    try:
        with ssh_server() as server:
            half_empty(server, work, size, options.runs, options.cipher)
            vast(server, work)
    finally:
        shutil.rmtree(work)


def _roomy(size: int) -> Path:
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > size else Path("/tmp")


def half_empty(server: SshServer, work: Path, size: int, runs: int, cipher: str) -> None:
    """Both ways in turn, then the medians."""
    disk = build(work, size)
    used = sum(extent.length for extent in _used(disk))
    print(
        f"disk: {size / GIB:.1f} GiB in {work}, {used / size:.0%} in use; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    theirs: list[float] = []
    mine: list[dict[str, float]] = []
    processor = [0.0, 0.0]
    for number in range(runs):
        before = _processor_seconds(server)
        theirs.append(by_hand(server, disk, work, cipher))
        between = _processor_seconds(server)
        mine.append(_in_own_process(server, disk, work / "ours.qcow2", used_only=True))
        processor[0] += between - before
        processor[1] += _processor_seconds(server) - between
        print(f"run {number + 1}: ssh dd + qemu-img convert {theirs[-1]:.2f} s; ours {mine[-1]['seconds']:.2f} s")
    check(disk, work / "ours.qcow2")
    wall = statistics.median(m["seconds"] for m in mine) / statistics.median(theirs)
    wire = statistics.median(m["wire"] for m in mine) / size
    memory = max(m["memory"] for m in mine)
    report("wall", wall, WALL_TARGET)
    report("bytes on the wire", wire, WIRE_TARGET)
    report("peak memory", memory, MEMORY_TARGET)
    print(
        f"processor time of both ends, per run: {processor[0] / runs:.1f} s by hand, {processor[1] / runs:.1f} s ours: "
        f"{processor[1] / processor[0]:.2f} (steadier than the wall where others use the cores)"
    )
    print(
        f"compressed replies: {sum(m['compressed'] for m in mine):.0f}; our own process: {mine[-1]['cpu']:.1f} s of processor time"
    )
    (work / "ours.qcow2").unlink()
    disk.unlink()


def _processor_seconds(server: SshServer) -> float:
    """Processor time of all that has ended so far: our children, and the server's."""
    time.sleep(1.0)  # the server reaps a session a moment after its client is gone
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return usage.ru_utime + usage.ru_stime + (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def vast(server: SshServer, work: Path) -> None:
    """Peak memory for a sparse file of 16 TiB that holds 2 GiB in 256 places; on tmpfs, as ext4 has no such files."""
    path = work / "vast"
    block = os.urandom(8 << 20)
    with path.open("wb") as file:
        try:
            file.truncate(16 << 40)
        except OSError as error:
            print(f"16 TiB: not measured, {work} takes no such file ({error})")
            return
        for number in range(256):
            file.seek(number * (64 << 30) + number * 4096)
            file.write(block)
    done = _in_own_process(server, path, work / "vast.qcow2", used_only=False)
    report(f"16 TiB with 2 GiB of data, {done['seconds']:.1f} s: peak memory", done["memory"], MEMORY_TARGET)


def report(what: str, value: float, target: float) -> None:
    """One line of the result."""
    shown = (
        f"{value:.2f} (target {target})" if target < 10 else f"{value / MIB:.0f} MiB (target {target / MIB:.0f} MiB)"
    )
    print(f"{'met   ' if value <= target else 'MISSED'} {what}: {shown}")


def build(work: Path, size: int) -> Path:
    """A disk whose file system is 48 % full of files, its free space full of what was deleted."""
    disk, mount = work / "disk.raw", work / "mount"
    mount.mkdir()
    with disk.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(disk)], check=True)
    subprocess.run(["mount", "-o", "loop", str(disk), str(mount)], check=True)
    try:
        fill(mount / "old", mount, 0.90)
        shutil.rmtree(mount / "old")
        os.sync()
        fill(mount / "now", mount, 0.48)
    finally:
        subprocess.run(["umount", str(mount)], check=True)
    return disk


def fill(folder: Path, mount: Path, share: float) -> None:
    """Copy files of /usr, round after round, until ``share`` of the file system is in use."""
    usage = shutil.disk_usage(mount)
    left = share * usage.total - usage.used
    for number in range(64):
        for root, _, names in os.walk("/usr"):
            into = folder / str(number) / Path(root).relative_to("/")
            into.mkdir(parents=True, exist_ok=True)
            left -= 4096
            for name in names:
                path = Path(root, name)
                size = path.lstat().st_size
                if not stat.S_ISREG(path.lstat().st_mode) or size > 64 << 20:
                    continue
                left -= -(-size // 4096) * 4096
                if left <= 0:
                    return
                shutil.copyfile(path, into / name)


def _used(disk: Path) -> list[Extent]:
    source = open_source(disk, format="raw")
    used = ext.used(source)
    if used is None:
        raise SystemExit("the file system's map is not trusted: the benchmark's disk is broken")
    found = [extent for extent in used.extents(0, source.size) if extent.kind is Kind.DATA]
    source.close()
    return found


def by_hand(server: SshServer, disk: Path, work: Path, cipher: str) -> float:
    """Seconds of ``ssh dd > raw; qemu-img convert``."""
    raw, image = work / "theirs.raw", work / "theirs.qcow2"
    target = server.target()
    ssh = [
        "ssh",
        "-F",
        "none",
        "-p",
        str(server.port),
        "-i",
        str(server.identity),
        "-o",
        f"UserKnownHostsFile={server.known_hosts}",
    ]
    started = time.monotonic()
    with raw.open("wb") as file:
        subprocess.run(
            [*ssh, "-c", cipher, f"{target.user}@{target.host}", f"dd if={disk} bs=1M status=none"],
            stdout=file,
            check=True,
        )
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)], check=True)
    seconds = time.monotonic() - started
    raw.unlink()
    image.unlink()
    return seconds


def _in_own_process(server: SshServer, disk: Path, image: Path, *, used_only: bool) -> dict[str, float]:
    target = server.target()
    asked = {
        "host": target.host,
        "user": target.user,
        "port": target.port,
        "identity": str(target.identity),
        "known_hosts": str(target.known_hosts),
        "disk": str(disk),
        "image": str(image),
        "used_only": used_only,
    }
    command = [sys.executable, "-m", "scripts.bench.collecting", "--ours", json.dumps(asked)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return {name: float(value) for name, value in json.loads(done.stdout).items()}


def ours(asked: dict[str, str]) -> dict[str, float]:
    """Copy the disk's used blocks into a qcow2, from connecting to flushed; what it took."""
    started = time.monotonic()
    target = SshTarget(
        host=asked["host"],
        user=asked["user"],
        port=int(asked["port"]),
        identity=Path(asked["identity"]),
        known_hosts=Path(asked["known_hosts"]),
        config=None,
    )
    with Session.connect(target) as session, Agent.start(session) as agent:
        disk = agent.disk(asked["disk"])
        used = ext.used(disk) if asked["used_only"] else None
        sink = create_sink(Path(asked["image"]), "qcow2", disk.size)
        done = copy(UsedOnly(disk, used.extents) if used is not None else disk, sink)
        sink.flush()
        sink.close()
        wire, compressed = session.bytes_received, agent.compressed_replies
    seconds = time.monotonic() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "wire": wire,
        "read": done.read,
        "memory": usage.ru_maxrss * 1024,
        "cpu": usage.ru_utime + usage.ru_stime,
        "compressed": compressed,
    }


def check(disk: Path, image: Path) -> None:
    """The image must be sound and hold exactly the used blocks."""
    subprocess.run(["qemu-img", "check", "-q", str(image)], check=True)
    source, copied = open_source(disk, format="raw"), open_source(image, format="qcow2")
    used = ext.used(source)
    assert used is not None
    differences = fingerprint(UsedOnly(source, used.extents)).differences(fingerprint(copied))
    source.close()
    copied.close()
    if differences:
        raise SystemExit(f"the copy differs from the disk in {differences}")
    print("the copy holds every used block, and qemu-img check finds it sound")


if __name__ == "__main__":
    main()

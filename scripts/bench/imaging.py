"""What writing a disk image costs, ours beside ``qemu-img convert``.

The disk is ordinary data: pieces of 6 MiB of a tar of this computer's /usr, each followed by 2 MiB of zeroes that are stored. Both ways
run in turn, each in a process of its own, and medians count. CPU seconds include those of servers; they are what to compare on
a busy computer.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from formats import qemu_img
from formats.images import FORMATS, create_sink, open_source
from formats.transfer import copy

MIB = 1 << 20
MEMORY = 300 * MIB
PLAIN = (0.9, 99.0)
# How many times as fast as qemu-img, and at most how many times as large.
HELD = {"streamOptimized": (15.0, 1.15), "-c zlib": (8.0, 1.15), "-c zstd": (1.3, 1.15)}
CASES = (
    ("vmdk", "streamOptimized"),
    ("qcow2", "-c zlib"),  # qemu-img convert -c -W
    ("qcow2", "-c zstd"),
    ("qcow2", "compat=1.1"),
    ("vhd", "dynamic"),
    ("vhdx", "dynamic"),
    ("vmdk", "monolithicSparse"),
    ("vdi", "dynamic"),
    ("parallels", "expanding"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of wall and CPU time, bytes of peak memory (ours only, without servers) and of the file."""

    wall: float
    cpu: float
    memory: int
    size: int


def main() -> None:
    """Run the measurement that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024, help="MiB of the disk")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: /dev/shm")
    parser.add_argument("--only", default="", help="a subformat, for example streamOptimized")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        who, name, subformat, folder = options.case
        print(json.dumps(asdict(measure(who, name, subformat, Path(folder)))))
        return
    memory = Path("/dev/shm")
    work = Path(tempfile.mkdtemp(prefix="p2v-bench-", dir=options.folder or (memory if memory.is_dir() else None)))
    try:
        ordinary(work / "source.raw", options.size * MIB)
        table(work, [case for case in CASES if options.only in ("", case[1])], options.runs)
    finally:
        shutil.rmtree(work)


def ordinary(path: Path, size: int) -> None:
    """Write the disk."""
    with subprocess.Popen(
        ["tar", "-C", "/", "-cf", "-", "usr"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as tar:
        assert tar.stdout is not None
        with path.open("wb") as disk:
            while disk.tell() < size:
                disk.write(tar.stdout.read(6 * MIB).ljust(8 * MIB, b"\0"))
            disk.truncate(size)
        tar.kill()


def table(work: Path, cases: list[tuple[str, str]], runs: int) -> None:
    """Print a line for each format: medians of ours and qemu-img's, and what they are held to."""
    print(
        f"{'':28}{'ours: s':>8}{'cpu':>7}{'MiB':>7}{'peak':>6}   {'qemu: s':>7}{'cpu':>7}{'MiB':>7}   speed  size  held to"
    )
    for name, subformat in cases:
        costs: dict[str, list[Cost]] = {"ours": [], "qemu": []}
        for _ in range(runs):
            for who, found in costs.items():
                argv = [sys.executable, "-m", "scripts.bench.imaging", "--case", who, name, subformat, str(work)]
                found.append(Cost(**json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)))
        ours, qemu = middle(costs["ours"]), middle(costs["qemu"])
        same = qemu_img.compare(work / "ours", FORMATS[name].driver, work / "source.raw", "raw").equal
        speed, size = qemu.wall / ours.wall, ours.size / qemu.size
        least, most = HELD.get(subformat, PLAIN)
        held = speed >= least and size <= most and ours.memory < MEMORY and same
        wanted = f">= {least:g}x" + (f", <= {most:g}" if most < PLAIN[1] else "")
        print(
            f"{name + ' ' + subformat:28}{ours.wall:8.2f}{ours.cpu:7.2f}{ours.size // MIB:7}{ours.memory // MIB:6}"
            f"   {qemu.wall:7.2f}{qemu.cpu:7.2f}{qemu.size // MIB:7}   {speed:4.1f}x {size:5.2f}  "
            f"{wanted}: {'yes' if held else 'NO'}{'' if same else ' (CONTENT DIFFERS)'}",
            flush=True,
        )


def middle(costs: list[Cost]) -> Cost:
    """The median of each figure."""
    return Cost(
        wall=statistics.median(cost.wall for cost in costs),
        cpu=statistics.median(cost.cpu for cost in costs),
        memory=max(cost.memory for cost in costs),
        size=costs[0].size,
    )


def measure(who: str, name: str, subformat: str, work: Path) -> Cost:
    """Convert once, in this process and its children."""
    source, target = work / "source.raw", work / who
    target.unlink(missing_ok=True)
    begin, used = time.monotonic(), _cpu()
    compress = subformat.removeprefix("-c ") if subformat.startswith("-c ") else ""
    if who == "ours":
        disk = open_source(source, format="raw")
        sink = create_sink(target, name, disk.size, subformat="" if compress else subformat, compress=compress)
        copy(disk, sink)
        sink.flush()
        sink.close()
        disk.close()
    else:
        options = ["-o", f"subformat={subformat}"] if name in ("vmdk", "vhd", "vhdx") else []
        options = ["-c", "-W", "-o", f"compression_type={compress}"] if compress else options
        command: list[str | Path] = [
            "qemu-img",
            "convert",
            "-f",
            "raw",
            "-O",
            FORMATS[name].driver,
            *options,
            source,
            target,
        ]
        subprocess.run(command, check=True)
    wall, cpu = time.monotonic() - begin, _cpu() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Cost(wall=wall, cpu=cpu, memory=peak, size=target.stat().st_blocks * 512)


def _cpu() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()

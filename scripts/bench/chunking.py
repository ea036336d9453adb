"""What the chunkers store, on the disks of `scripts.bench.chunking_disks`, as a Markdown table.

A repository of each chunker gets `first`; then each of the other disks is added to that state (not to each other). A cell is
what is newly stored, in MB: plain / after zstd per chunk, with `COST` bytes for each new chunk (its header and tag in a pack, and its index
entry); in brackets the number of new chunks. Chunks of zeroes are not stored by any. The same for restic (its default chunker and
compression), by the growth of its repository.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import time
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import blake3
import zstandard

from backup.chunk import GRAIN, AlignedContent, Chunker, FixedGrid, cut, recut
from scripts.bench import chunking_disks

KEY = bytes(range(32))
SPAN = 16 << 20  # no chunk crosses a span of the manifest
COST, ENTRY, ZERO_ENTRY = 100, 36, 4
LEVEL = 3
KIB = 1024


def _aligned(minimum: int, usual: int, maximum: int) -> Chunker:
    return AlignedContent(KEY, minimum=minimum * KIB, usual=usual * KIB, maximum=maximum * KIB)


CHUNKERS: tuple[Chunker, ...] = (
    *(FixedGrid(size * KIB) for size in (16, 32, 64, 128, 256)),
    _aligned(8, 32, 256),
    _aligned(16, 16, 256),
    _aligned(16, 32, 128),
    _aligned(16, 32, 256),
    _aligned(16, 64, 256),
    _aligned(32, 64, 256),
    _aligned(64, 128, 512),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A disk that was cut: its chunks by id with the place of one, their number, and bytes of manifest leaves."""

    chunks: dict[bytes, tuple[int, int]]
    count: int
    manifest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What a disk added."""

    chunks: int
    plain: int
    stored: int


def _spans(disk: Path) -> Iterator[tuple[int, memoryview]]:
    """The spans of a disk that hold data, and where they begin."""
    with disk.open("rb") as file:
        size, place = os.fstat(file.fileno()).st_size, 0
        while place < size:
            try:
                place = os.lseek(file.fileno(), place, os.SEEK_DATA) // SPAN * SPAN
            except OSError:  # nothing but a hole is left
                return
            yield place, memoryview(os.pread(file.fileno(), SPAN, place))
            place += SPAN


def _cut(chunker: Chunker, disk: Path) -> Cut:
    chunks: dict[bytes, tuple[int, int]] = {}
    count = manifest = 0
    for base, data in _spans(disk):
        for start, end in pairwise([0, *chunker.cuts(data, final=True)]):
            piece = data[start:end]
            if not piece[0] and piece == bytes(len(piece)):
                manifest += ZERO_ENTRY
                continue
            count += 1
            manifest += ENTRY
            chunks.setdefault(blake3.blake3(piece).digest(16), (base + start, end - start))
    return Cut(chunks=chunks, count=count, manifest=manifest)


def _growth(disk: Path, done: Cut, known: dict[bytes, tuple[int, int]]) -> Growth:
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    new = [place for name, place in done.chunks.items() if name not in known]
    with disk.open("rb") as file:
        stored = sum(
            min(length, len(compressor.compress(os.pread(file.fileno(), length, start)))) for start, length in new
        )
    return Growth(chunks=len(new), plain=sum(length for _, length in new), stored=stored + COST * len(new))


def _speed(chunker: Chunker, disk: Path) -> float:
    """MB/s of the cutter alone, on 512 MiB of data in memory: the best of three."""
    spans = []
    for _, data in _spans(disk):
        spans.append(data)
        if len(spans) * SPAN >= 512 << 20:
            break
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        for data in spans:
            list(chunker.cuts(data, final=True))
        best = min(best, time.perf_counter() - begun)
    return sum(map(len, spans)) / best / 1e6


def _row(chunker: Chunker, disks: dict[str, Path]) -> str:
    first = _cut(chunker, disks["first"])
    cells = [chunker.name, f"{sum(place[1] for place in first.chunks.values()) / len(first.chunks) / KIB:.0f}"]
    for name, disk in disks.items():
        done = first if name == "first" else _cut(chunker, disk)
        growth = _growth(disk, done, {} if name == "first" else first.chunks)
        cells.append(f"{growth.plain / 1e6:.0f} / {growth.stored / 1e6:.1f} ({growth.chunks})")
    cells += [f"{first.count}", f"{first.manifest / 1e6:.2f}"]
    return " | ".join(cells)


def _changed(one: Path, other: Path) -> list[tuple[int, int]]:
    """The ranges of whole blocks in which two disks of one size differ."""
    changed: list[tuple[int, int]] = []
    with one.open("rb") as first, other.open("rb") as second:
        for base in range(0, os.fstat(first.fileno()).st_size, SPAN):
            old, new = first.read(SPAN), second.read(SPAN)
            if old == new:
                continue
            for place in range(0, len(old), GRAIN):
                if old[place : place + GRAIN] != new[place : place + GRAIN]:
                    if changed and changed[-1][1] == base + place:
                        changed[-1] = (changed[-1][0], base + place + GRAIN)
                    else:
                        changed.append((base + place, base + place + GRAIN))
    return changed


def _recut(chunker: Chunker, base: Path, disk: Path) -> str:
    """Cut ``disk`` around what differs from ``base``; the result is compared with cutting all of it."""
    changed = _changed(base, disk)

    def all_cuts(path: Path) -> list[int]:
        with path.open("rb") as file:
            return list(cut(chunker, partial(_read, file.fileno()), 0, path.stat().st_size, step=SPAN))

    old = all_cuts(base)
    with disk.open("rb") as file:
        begun = time.perf_counter()
        pieces = list(recut(chunker, old, changed, partial(_read, file.fileno())))
        seconds = time.perf_counter() - begun
    merged, position = [], 0
    for start, stop, ends in pieces:
        low = bisect_right(old, start)
        merged += [*old[position:low], *ends]
        position = bisect_right(old, stop)
    equal = [*merged, *old[position:]] == all_cuts(disk)
    dirty, again = (
        sum(end - start for start, end in runs) / 1e6 for runs in (changed, [piece[:2] for piece in pieces])
    )
    return f"{disk.stem} | {chunker.name} | {dirty:.0f} in {len(changed)} | {again:.0f} | {seconds:.2f} | {'yes' if equal else 'NO'}"


def _read(descriptor: int, start: int, length: int) -> memoryview:
    return memoryview(os.pread(descriptor, length, start))


def _restic(disks: dict[str, Path], folder: Path) -> str:
    cells = ["restic", "~1000"]
    base, repository = folder / "restic-first", folder / "restic"
    for name, disk in disks.items():
        shutil.rmtree(repository, ignore_errors=True)
        if name != "first":
            shutil.copytree(base, repository)
        before = _bytes_in(repository)
        command = ["restic", "--no-cache", "-q", "-r", str(repository)]
        environment = {**os.environ, "RESTIC_PASSWORD": "x"}
        if name == "first":
            subprocess.run([*command, "init", "--repository-version", "2"], check=True, env=environment)
        begun = time.monotonic()
        subprocess.run([*command, "backup", str(disk)], check=True, env=environment)
        cells.append(f"{(_bytes_in(repository) - before) / 1e6:.1f} ({time.monotonic() - begun:.0f} s)")
        if name == "first":
            shutil.rmtree(base, ignore_errors=True)
            repository.rename(base)
    shutil.rmtree(repository)
    shutil.rmtree(base)
    return " | ".join([*cells, "", ""])


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Build the disks, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path.home() / ".cache/p2v-toolkit/chunk", help="where the disks are kept"
    )
    parser.add_argument("--restic", action=argparse.BooleanOptionalAction, default=shutil.which("restic") is not None)
    options = parser.parse_args()
    disks = chunking_disks.build(options.folder)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    print(
        f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, zstd level {LEVEL}\n"
    )
    titles = ["chunker", "mean KiB", *disks, "chunks of first", "manifest MB", "MB/s"]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    speeds = [_speed(chunker, disks["first"]) for chunker in CHUNKERS]  # while nothing else runs
    with ProcessPoolExecutor() as pool:
        for row, speed in zip(pool.map(partial(_row, disks=disks), CHUNKERS), speeds, strict=True):
            print(f"| {row} | {speed:.0f} |", flush=True)
    if options.restic:
        print(f"| {_restic(disks, options.folder)} | |", flush=True)
    print(
        "\n| changed in place | chunker | MB changed, runs | MB cut anew | s | equals cutting all anew |\n|"
        + " --- |" * 6
    )
    for name in ("day", "database", "update"):
        for chunker in (FixedGrid(), AlignedContent(KEY)):
            print(f"| {_recut(chunker, disks['first'], disks[name])} |", flush=True)


if __name__ == "__main__":
    main()

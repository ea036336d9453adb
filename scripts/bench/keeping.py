"""What keeping a disk costs, ours beside restic and Borg: first backup, again unchanged, restore, a second machine of the same
distribution.

Each step is a command of its own, start and password included; the disks are in the page cache; medians count. Then, ours alone: 256 MiB
changed on disks of growing size, with a list of changes, and the first read of a point of 1 TiB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from backup.chunk import chunker_named
from backup.engine import Backup
from backup.keys import Kdf
from backup.reader import StoredDisk
from backup.repository import Repository
from backup.store.local import LocalStore
from formats.block import Extent, Kind
from formats.capture import Changed
from formats.memory import MemoryDisk
from p2v.config import Secret
from tests.fakes.tracked_origin import TrackedCapture, TrackedOrigin

MIB, GIB = 1 << 20, 1 << 30
_CACHE = Path.home() / ".cache/p2v-toolkit/machines"


@dataclass(frozen=True, slots=True)
class Step:
    """A command: wall and CPU seconds, peak memory in bytes, and the bytes that the repository has afterwards."""

    wall: float
    cpu: float
    memory: int
    stored: int


def run(command: Sequence[str], environment: dict[str, str], folder: Path, repository: Path) -> Step:
    """Run a command to its end."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {said.decode(errors='replace')}")
    wall = time.monotonic() - started
    return Step(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, _size(repository))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True, slots=True)
class Tool:
    """How a program does the steps; ``{}`` stands for the image, the repository and the target."""

    name: str
    environment: Callable[[Path], dict[str, str]]
    init: Callable[[Path], list[str]]
    backup: Callable[[Path, Path, str], list[str]]
    restore: Callable[[Path, Path], list[str]]


def ours(level: int) -> Tool:
    """p2v-backup at a zstd level."""
    me = [sys.executable, "-c", "from backup.cli import main; main()"]
    root = str(Path(__file__).parents[2])
    return Tool(
        f"ours, level {level}",
        lambda repo: {
            "P2V_REPOSITORY": str(repo),
            "P2V_PASSWORD": "bench",
            "XDG_STATE_HOME": f"{repo}.state",
            "PYTHONPATH": root,
            # As an installed program has it: compiled once, whatever this environment says of its own Python.
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(repo.parents[1] / "bytecode"),
        },
        lambda _: [*me, "init"],
        lambda _, image, name: [*me, "backup", str(image), "--level", str(level), "--tag", name],
        lambda _, target: [*me, "restore", "latest", "--disk", "0", "--device", str(target / "disk.raw")],
    )


def others() -> list[Tool]:
    """restic and Borg, where they are installed."""
    restic = Tool(
        "restic",
        lambda repo: {"RESTIC_REPOSITORY": str(repo), "RESTIC_PASSWORD": "bench", "RESTIC_CACHE_DIR": f"{repo}.cache"},
        lambda _: ["restic", "init"],
        lambda _, image, __: ["restic", "backup", "--force", str(image)],
        lambda _, target: ["restic", "restore", "latest", "--target", str(target)],
    )
    borg = Tool(
        "borg",
        lambda repo: {"BORG_REPO": str(repo), "BORG_PASSPHRASE": "bench", "BORG_BASE_DIR": f"{repo}.base"},
        lambda _: ["borg", "init", "-e", "repokey"],
        lambda _, image, name: [
            "borg", "create", "-C", "zstd,3", "--sparse", "--files-cache=disabled", f"::{name}", str(image)
        ],
        lambda _, __: ["borg", "extract", "--sparse", "::second"],
    )  # fmt: skip
    return [tool for tool in (restic, borg) if shutil.which(tool.name)]


def measure(tool: Tool, image: Path, second: Path | None, folder: Path) -> Iterator[tuple[str, Step]]:
    """All steps once, in a fresh repository."""
    repository, target = folder / "repository", folder / "target"
    shutil.rmtree(folder, ignore_errors=True)
    target.mkdir(parents=True)
    environment = tool.environment(repository)
    run(tool.init(repository), environment, folder, repository)
    yield "first", run(tool.backup(repository, image, "first"), environment, folder, repository)
    yield "again", run(tool.backup(repository, image, "second"), environment, folder, repository)
    yield "restore", run(tool.restore(repository, target), environment, target, repository)
    restored = next(path for path in target.rglob("*.raw"))
    if subprocess.run(["cmp", "-s", restored, image], check=False).returncode:
        raise SystemExit(f"{tool.name} restored something else")
    if second is not None:
        yield "second machine", run(tool.backup(repository, second, "third"), environment, folder, repository)


def compare(tools: Sequence[Tool], image: Path, second: Path | None, folder: Path, runs: int) -> None:
    """The table: medians of ``runs``, tool by tool in turns."""
    found: dict[tuple[str, str], list[Step]] = {}
    for _ in range(runs):
        for tool in tools:
            for path in (image, second):
                if path is not None:
                    subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
            for name, step in measure(tool, image, second, folder):
                found.setdefault((tool.name, name), []).append(step)
    print(f"{'':18}{'step':16}{'wall s':>8}{'CPU s':>8}{'peak MiB':>10}{'repository MiB':>16}")
    for (tool_name, name), steps in found.items():
        wall, cpu = (statistics.median(getattr(step, key) for step in steps) for key in ("wall", "cpu"))
        peak = max(step.memory for step in steps)
        print(f"{tool_name:18}{name:16}{wall:8.2f}{cpu:8.2f}{peak / MIB:10.0f}{steps[-1].stored / MIB:16.1f}")
    print(json.dumps({f"{tool}: {name}": [step.wall for step in steps] for (tool, name), steps in found.items()}))


class _Listed(TrackedCapture):
    """A capture whose list of changes is given."""

    extents: tuple[Extent, ...] = ()

    def changes(self, disk_id: str) -> Changed:  # noqa: ARG002
        return Changed(extents=self.extents)


def changes(folder: Path) -> None:
    """256 MiB changed, in runs of 1 MiB all over disks of growing size."""
    generator = random.Random(1)
    pieces = [generator.randbytes(MIB // 2) + bytes(range(256)) * (MIB // 512) for _ in range(256)]
    print(f"{'disk':>10}{'256 MiB changed, s':>22}{'first read of the point, s':>30}")
    for size in (10 * GIB, 100 * GIB, 1024 * GIB):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        store = LocalStore(folder)
        repository = Repository.create(store, Secret("bench"), kdf=Kdf(memory_kib=64, iterations=1, lanes=1))
        disk, extents, step = MemoryDisk(size), [], size // 256 // MIB * MIB
        parent = None
        for turn in range(2):
            for number, piece in enumerate(pieces):
                disk.write(memoryview(bytes((turn,)) * 512 + piece[512:]), number * step)
                extents.append(Extent(number * step, MIB, Kind.DATA))
            started = time.monotonic()
            with Backup(
                repository, chunker_named(repository.config.chunker, repository.keyring.cut_key), audit=4
            ) as work:
                origin = TrackedOrigin({"disk": 1})
                capture = _Listed(origin, {})
                capture.extents = tuple(extents[:256])
                capture.disks["disk"] = replace(capture.disks["disk"], source=disk)
                parent = work.store(capture, parent=parent)
            took = time.monotonic() - started
        started = time.monotonic()
        again = Repository.open(store, Secret("bench"))
        source = StoredDisk(again, again.find_point("latest").disks[0])
        source.readinto(memoryview(bytearray(4096)), size // 2)
        print(f"{size // GIB:6} GiB{took:22.2f}{time.monotonic() - started:30.3f}", flush=True)


def vast(tool: Tool, folder: Path) -> None:
    """Time and peak memory for a disk of 16 TiB that holds 2 GiB in 256 places; on tmpfs, as ext4 has no such files."""
    image, repository = folder / "vast.raw", folder / "repository"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = tool.environment(repository)
    with image.open("wb") as file:
        file.truncate(16 << 40)
        for number in range(256):
            file.seek(number * (64 << 30) + number * 4096)
            file.write(random.Random(number).randbytes(8 << 20))
    run(tool.init(repository), environment, folder, repository)
    for name in ("first", "again"):
        step = run(tool.backup(repository, image, name), environment, folder, repository)
        print(f"16 TiB, 2 GiB of data, {name}: {step.wall:.1f} s, peak {step.memory / MIB:.0f} MiB", flush=True)
    image.unlink()
    (folder / "target").mkdir()
    step = run(tool.restore(repository, folder / "target"), environment, folder, repository)
    print(f"16 TiB, 2 GiB of data, restore: {step.wall:.1f} s, peak {step.memory / MIB:.0f} MiB", flush=True)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--image", type=Path, help="raw disk; default: a machine that tests have built")
    parser.add_argument("--second", type=Path, help="raw disk of another machine of the same distribution")
    parser.add_argument("--levels", default="3")
    parser.add_argument("--only", default="", help="ours, restic, borg, changes or vast")
    arguments = parser.parse_args()
    image = arguments.image or next(iter(sorted(_CACHE.glob("bios-plain-*/disk.raw"))), None)
    second = arguments.second or next(iter(sorted(_CACHE.glob("bios-lvm-*/disk.raw"))), None)
    if image is None:
        raise SystemExit("no disk to measure with: give --image, or build the machines of the tests")
    tools = [ours(int(level)) for level in arguments.levels.split(",")] + others()
    tools = [tool for tool in tools if tool.name.startswith(arguments.only)]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        if tools:
            compare(tools, image, second, Path(scratch) / "work", arguments.runs)
        if arguments.only in ("", "changes"):
            changes(Path(scratch) / "changes")
    if arguments.only in ("", "vast"):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
            vast(ours(3), Path(scratch) / "vast")


if __name__ == "__main__":
    main()

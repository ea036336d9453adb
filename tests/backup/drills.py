"""Small machines to drill: boot sectors that do in a second what they are told, and data disks."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from backup.repository import Point, Repository
from backup.store.base import Store
from backup.store.local import LocalStore
from formats.machine import Boot, Disk, Machine, Volume
from p2v.target.evidence import Patience
from tests.backup.repositories import back_up, new_repository, opened
from tests.fakes.tracked_origin import TrackedOrigin
from tests.p2v.boot_sector import Step, boot_sector

QUICK = Patience(total=30, idle=6, busy=6, early=4, settle=0.6)
WORKS: tuple[Step, ...] = (("wait", 10), ("serial", "\nmetal1 login: "))
PANICS: tuple[Step, ...] = (("serial", "Kernel panic - not syncing: No working init found.\n"),)
MIB = 1 << 20


class SmallMachine(TrackedOrigin):
    """A machine of a boot sector and data disks; ``volumes`` are what its record says of them."""

    def __init__(
        self,
        name: str,
        steps: Sequence[Step],
        *,
        ending: str = "idle",
        data: dict[str, bytes] | None = None,
        volumes: tuple[Volume, ...] = (),
    ) -> None:
        contents = {"boot": boot_sector(*steps, ending=ending).ljust(MIB, b"\0"), **(data or {})}
        super().__init__({disk: len(content) for disk, content in contents.items()})
        self._name, self._volumes = name, volumes
        for disk, content in contents.items():
            self.write(disk, content, 0)

    def inspect(self) -> Machine:
        """With names as a live host's disks have."""
        disks = tuple(
            Disk(id=disk, size=len(content), name=f"sd{'abcd'[number]}")
            for number, (disk, content) in enumerate(self.content.items())
        )
        return Machine(name=self._name, disks=disks, volumes=self._volumes, boot=Boot(disk="boot"))


def file_system(folder: Path, kind: str = "ext4", size: int = 8 * MIB) -> bytes:
    """A fresh file system without a partition table."""
    path = folder / f"{kind}.raw"
    path.write_bytes(bytes(size))
    subprocess.run([f"mkfs.{kind}", "-q", str(path)], check=True, capture_output=True)
    return path.read_bytes()


def uuid_of(content: bytes) -> str:
    """The UUID of an ext file system."""
    digits = content[0x468:0x478].hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def stored(folder: Path, *machines: SmallMachine) -> tuple[Store, Repository, list[Point]]:
    """A repository with one point of each machine."""
    folder.mkdir(exist_ok=True)
    store = LocalStore(folder)
    new_repository(store)
    points = [back_up(store, machine) for machine in machines]
    return store, opened(store), points

"""The stage in the root of a real system, in a chroot instead of a boot: its own shell and depmod, its own kernel's modules."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from formats.images.raw import RawFile
from formats.layouts import lvm, partition
from formats.layouts.window import Window
from formats.machine import Boot, Kernel, Machine, OperatingSystem
from p2v.adapt.plan import STORAGE_DRIVERS, plan_adaptation
from p2v.adapt.stage import find_busybox, stage_tables
from p2v.collect import initramfs
from p2v.drivers import word
from tests.machines.builder import BuiltMachine
from tests.requirement import needs, needs_root

pytestmark = [needs("busybox", "cpio", "debugfs", "chroot"), needs_root()]

_SOURCE = Path(__file__).parents[3] / "p2v" / "adapt"
_PRETENDED = ("virtio", "nvme", "hv_", "mpt")


def _unpack(disk: Path, folder: Path) -> None:
    """The root file system of bios-lvm (its folders etc and usr) and /boot, below ``folder``."""
    source = RawFile(disk)
    try:
        table = partition.read_table(source)
        assert table is not None
        boot, physical = table.partitions
        window = Window(source, physical.start, physical.size)
        label = lvm.read_label(window)
        assert label is not None and label.group is not None
        group = label.group
        volume = next(volume for volume in group.logical if volume.name == "root")
        root = lvm.lv_source(group, volume, {group.physical[0].name: window})
        image = folder.with_suffix(".img")
        with image.open("wb") as file:
            file.truncate(root.size)
            for extent in root.extents(0, root.size):
                for start in range(extent.start, extent.start + extent.length, 1 << 20):
                    data = bytearray(min(1 << 20, extent.start + extent.length - start))
                    root.readinto(memoryview(data), start)
                    if any(data):
                        file.seek(start)
                        file.write(data)
    finally:
        source.close()
    (folder / "boot").mkdir(parents=True)
    for name in ("etc", "usr"):
        subprocess.run(["debugfs", "-R", f"rdump /{name} {folder}", str(image)], check=True, capture_output=True)
    image.unlink()
    subprocess.run(
        ["debugfs", "-R", f"rdump / {folder / 'boot'}", f"{disk}?offset={boot.start}"], check=True, capture_output=True
    )
    for name in ("bin", "sbin", "lib", "lib64"):
        (folder / name).symlink_to(f"usr/{name}")
    (folder / "dev").mkdir()
    os.mknod(folder / "dev/null", 0o20666, os.makedev(1, 3))
    os.mknod(folder / "dev/zero", 0o20666, os.makedev(1, 5))


@pytest.fixture(scope="module")
def root(bios_lvm_disk: BuiltMachine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "root"
    try:
        _unpack(bios_lvm_disk.disk, folder)
    except PermissionError as error:
        pytest.skip(f"devices cannot be made here: {error}")
    return folder


def _record(root: Path) -> Machine:
    image = next((root / "boot").glob("initrd.img-*"))
    version = image.name.removeprefix("initrd.img-")
    said = subprocess.run([sys.executable, "-c", initramfs.PROGRAM, str(image)], check=True, capture_output=True).stdout
    held = initramfs.parse(said)[str(image)]
    assert not held.error and held.kind == "initramfs-tools"
    kernel = Kernel(
        version=version,
        image=f"/boot/vmlinuz-{version}",
        initramfs=f"/boot/{image.name}",
        initramfs_kind=held.kind,
        drivers=tuple(name for name in held.modules if not word(name).startswith(_PRETENDED)),
        host_only=True,
    )
    return Machine(
        name="m", system=OperatingSystem(family="linux"), boot=Boot(kernels=(kernel,), running_kernel=version)
    )


def _run(root: Path, record: Machine) -> str:
    home = root / "run/p2v"
    shutil.rmtree(home, ignore_errors=True)
    (home / "in").mkdir(parents=True)
    for name in ("stage.sh", "rename.awk", "lacking.awk"):
        shutil.copy(_SOURCE / name, home / name)
    shutil.copy(find_busybox(), home / "busybox")
    for name, text in stage_tables(plan_adaptation(record), record).items():
        (home / "in" / name).write_text(text)
    ran = subprocess.run(
        ["chroot", str(root), "/bin/sh", "/run/p2v/stage.sh", "--files"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    assert not (home / "out/error").exists(), (home / "out/error").read_text()
    return ran.stdout


def test_drivers_that_an_initramfs_lacks_are_appended_with_their_indexes(root: Path, tmp_path: Path) -> None:
    record = _record(root)
    (kernel,) = record.boot.kernels
    image = root / kernel.initramfs[1:]
    own = image.read_bytes()
    said = _run(root, record)
    assert "added" in said and "virtio_blk" in said
    now = image.read_bytes()
    start = (len(own) + 511) // 512 * 512 + 512
    assert now.startswith(own) and not any(now[len(own) : start])
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    archive = gzip.decompress(now[start:])
    subprocess.run(["cpio", "-id", "--quiet"], input=archive, cwd=unpacked, check=True, capture_output=True)
    names = subprocess.run(
        ["cpio", "-it", "--quiet"], input=archive, check=True, capture_output=True, text=False
    ).stdout.split()
    assert b"lib" not in names and b"usr" not in names
    # The system's own modprobe finds every driver by the appended indexes, and each file is in one archive or the other.
    held = {word(name) for name in kernel.drivers or ()}
    shutil.copytree(unpacked, root / "run/unpacked")
    for driver in STORAGE_DRIVERS:
        command = [
            "chroot",
            str(root),
            "modprobe",
            "-d",
            "/run/unpacked",
            "-S",
            kernel.version,
            "--show-depends",
            driver,
        ]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        assert asked.returncode == 0, asked.stderr
        for line in asked.stdout.splitlines():
            kind, path = line.split()[:2]
            assert kind == "builtin" or (root / path[1:]).exists() or word(Path(path).name.partition(".")[0]) in held
    # An inspection of the adapted machine sees them too.
    seen = initramfs.parse(
        subprocess.run([sys.executable, "-c", initramfs.PROGRAM, str(image)], check=True, capture_output=True).stdout
    )
    assert not seen[str(image)].error and set(STORAGE_DRIVERS) <= {word(name) for name in seen[str(image)].modules}
    again = _run(root, record)
    assert "adapted before" in again and image.read_bytes() == now

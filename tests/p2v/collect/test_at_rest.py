"""What is learnt of a Linux machine from its disks alone."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from formats.machine import Machine
from p2v.collect.at_rest import RestFiles, learn
from p2v.collect.files import FileOrigin
from tests.machines.builder import BuiltMachine
from tests.p2v.conversion import p2v
from tests.requirement import needs

MIB = 1 << 20
ROOT, BOOT = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"

pytestmark = needs("mke2fs", "sfdisk")

GRUB = """\
set default="0"
menuentry 'GNU/Linux' {
\tlinux\t/boot/vmlinuz-6.1.0-2-amd64 root=/dev/vda2 ro  quiet console=ttyS0,115200 ${extra}
\tinitrd\t/boot/initrd.img-6.1.0-2-amd64
}
menuentry 'GNU/Linux (recovery mode)' {
\tlinux\t/boot/vmlinuz-6.1.0-2-amd64 root=/dev/vda2 ro single
}
"""
KERNELS = {"vmlinuz-6.1.0-1-amd64": "k1", "vmlinuz-6.1.0-2-amd64": "k2", "initrd.img-6.1.0-2-amd64": "no cpio"}


def write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def disk(path: Path, *trees: tuple[Path | None, str], sizes: int = 32) -> Path:
    """A disk with an MBR and one partition for each (tree, UUID); without a tree it holds zeroes."""
    with path.open("wb") as file:
        file.truncate((1 + sizes * len(trees) + 1) * MIB)
    table = "label: dos\n" + f",{sizes}M\n" * len(trees)
    subprocess.run(["sfdisk", "-q", path], input=table, text=True, check=True, capture_output=True)
    for number, (tree, uuid) in enumerate(trees):
        if tree is not None:
            offset = ["-E", f"offset={(1 + sizes * number) * MIB}"]
            run = ["mke2fs", "-q", "-F", "-t", "ext4", "-U", uuid, "-L", f"part{number + 1}", *offset, "-d", str(tree)]
            subprocess.run([*run, str(path), f"{sizes}M"], check=True, capture_output=True)
    return path


def inspected(path: Path) -> Machine:
    return FileOrigin(path).inspect()


def test_a_root_on_a_partition_tells_all(tmp_path: Path) -> None:
    fstab = (
        f'# old\nUUID="{ROOT}" / ext4 errors=remount-ro 0 1\n/dev/vda1 /boot/spare ext4 defaults 0 2\nproc /proc proc\n'
    )
    files = {f"boot/{name}": text for name, text in KERNELS.items()}
    files |= {
        "etc/fstab": fstab,
        "boot/grub/grub.cfg": GRUB,
        "lib/modules/6.1.0-2-amd64/modules.builtin": "x/ahci.ko\n",
    }
    root = write(tmp_path / "root", files | {"etc/os-release": 'ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian 12"\n'})
    spare = write(tmp_path / "spare", {"known": "yes"})
    machine = inspected(disk(tmp_path / "d.raw", (spare, BOOT), (root, ROOT)))
    assert (machine.system.id, machine.system.family) == ("debian", "linux")
    assert machine.boot.command_line == "root=/dev/vda2 ro quiet console=ttyS0,115200"
    assert machine.boot.consoles == ("ttyS0,115200",) and machine.boot.loader == "grub"
    assert machine.boot.running_kernel == "6.1.0-2-amd64"
    first, second = machine.boot.kernels
    assert not first.initramfs and second.initramfs == "/boot/initrd.img-6.1.0-2-amd64"
    assert second.drivers is None and second.builtin == ("ahci",)
    assert {v.path: (v.uuid, v.mountpoints) for v in machine.volumes} == {
        "/dev/vda1": (BOOT, ("/boot/spare",)),
        "/dev/vda2": (ROOT, ("/",)),
    }
    assert machine.disks[0].name == "vda"


@pytest.mark.parametrize("spec", [f"UUID={BOOT}", "LABEL=part1", "/dev/nvme0n1p1"])
def test_a_boot_of_its_own_is_found_by_any_name(tmp_path: Path, spec: str) -> None:
    root = write(tmp_path / "root", {"etc/fstab": f"/dev/nvme0n1p2 / ext4\n{spec} /boot ext4\n", "boot/hidden": "x"})
    boot = write(tmp_path / "boot", {**KERNELS, "grub/grub.cfg": GRUB.replace("/boot/", "/")})
    path = disk(tmp_path / "d.raw", (boot, BOOT), (root, ROOT))
    machine = inspected(path)
    assert [kernel.image for kernel in machine.boot.kernels] == [f"/boot/vmlinuz-6.1.0-{n}-amd64" for n in (1, 2)]
    assert machine.boot.running_kernel == "6.1.0-2-amd64"
    assert machine.disks[0].name == ("nvme0n1" if spec else "")
    with FileOrigin(path).capture() as capture:
        files = RestFiles.of(machine, {key: disk.source for key, disk in capture.disks.items()})
        assert files is not None and files.places == {"/", "/boot"}
        assert files.read("/boot/vmlinuz-6.1.0-2-amd64") == b"k2" and files.read("/boot/hidden") is None


def test_boot_loader_specification_and_a_root_that_is_not_read(tmp_path: Path) -> None:
    def entry(version: str) -> str:
        return f"title X\nversion {version}\nlinux /vmlinuz-{version}\ninitrd /initramfs-{version}.img\noptions $kernelopts $tuned"

    names = ("5.14.0-9.el9", "5.14.0-10.el9", "0-rescue-abc")
    files = {f"loader/entries/id-{name}.conf": entry(name) for name in names}
    files |= {f"{kind}{name}{end}": "x" for name in names for kind, end in (("vmlinuz-", ""), ("initramfs-", ".img"))}
    files["grub2/grubenv"] = (
        "# GRUB Environment Block\nkernelopts=root=/dev/mapper/rhel-root ro rd.lvm.lv=rhel/root\n####"
    )
    boot = write(tmp_path / "boot", files)
    machine = inspected(disk(tmp_path / "d.raw", (boot, BOOT), (None, "")))
    assert machine.boot.command_line == "root=/dev/mapper/rhel-root ro rd.lvm.lv=rhel/root"
    assert machine.boot.running_kernel == "5.14.0-10.el9"
    assert machine.system.family == "linux"


@pytest.mark.parametrize("tree", [None, {"documents/letter": "Dear"}])
def test_what_is_no_linux_machine_stays_as_it_was(tmp_path: Path, tree: dict[str, str] | None) -> None:
    folder = None if tree is None else write(tmp_path / "tree", tree)
    origin = FileOrigin(disk(tmp_path / "d.raw", (folder, ROOT)))
    with origin.capture() as capture:
        assert learn(capture.machine, {key: disk.source for key, disk in capture.disks.items()}) == capture.machine
        assert origin.inspect() == capture.machine


@pytest.mark.slow_boot
def test_a_real_disk_tells_what_the_live_machine_says(bios_lvm_disk: BuiltMachine) -> None:
    machine = inspected(bios_lvm_disk.disk)
    (kernel,) = machine.boot.kernels
    assert kernel.host_only is False and kernel.initramfs_kind == "initramfs-tools"
    assert {"virtio_blk", "ahci", "nvme"} <= set(kernel.drivers or ()) and "virtio_pci" in (kernel.drivers or ())
    assert machine.boot.command_line.startswith("root=/dev/mapper/vg0-root ro")
    assert {v.path: v.mountpoints for v in machine.volumes if v.mountpoints} == {
        "/dev/sda1": ("/boot",),
        "/dev/mapper/vg0-root": ("/",),
    }


@pytest.mark.nightly
@pytest.mark.slow_boot
def test_a_disk_of_the_hard_machine_is_adapted_and_boots(uefi_dracut_disk: BuiltMachine, tmp_path: Path) -> None:
    """Its root is XFS, which is not read: kernel and command line come from /boot. The second disk of fstab is not there."""
    done = p2v(
        "convert", str(uefi_dracut_disk.disk), "--to", "libvirt", "-o", str(tmp_path / "vm"), "--boot-timeout", "900"
    )
    items = {item["name"]: item["status"] for item in done.envelope["data"]["adaptation"][0]["items"]}
    assert items["initramfs"] == items["efi-fallback"] == items["names"] == "done"
    assert done.code == 70, done.log  # the data disk is missing
    assert "mount-failed" in {finding["code"] for finding in done.envelope["data"]["verdict"]["findings"]}

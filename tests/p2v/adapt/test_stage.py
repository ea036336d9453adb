"""The stage's work on files, in trees that look like distributions' roots, under the shells that machines have."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from formats.machine import Boot, Machine
from p2v.adapt.plan import ITEMS, AdaptItem, AdaptPlan
from p2v.adapt.stage import _APPLETS, find_busybox, stage_tables
from p2v.errors import AdaptationError
from tests.p2v.adapt.machines import DATA_UUID, LUKS_UUID, MAC, ROOT_UUID, SWAP_UUID, kernel, machine
from tests.requirement import needs

pytestmark = needs("busybox")

_SOURCE = Path(__file__).parents[3] / "p2v" / "adapt"
_SHELLS = {"dash": ["dash"], "bash": ["bash", "--posix"], "busybox": ["busybox", "sh"]}

_DEBIAN = {
    "etc/fstab": "# /dev/sda2 was on / during installation\n"
    "/dev/sda2\t/     ext4  errors=remount-ro 0 1\n"
    "/dev/disk/by-path/pci-0000:00:1f.2-ata-1-part3 none swap sw 0 0\n"
    "/dev/nvme0n1p1 /data\txfs defaults 0 2\n"
    "/dev/mapper/vg0-home /home ext4 defaults 0 2\n"
    "LABEL=x /x ext4 noauto 0 0\n"
    "//server/share /s cifs password=/dev/sda2 0 0\n",
    "etc/crypttab": "secret  /dev/sda4 none luks\nswap /dev/sda5 /dev/urandom swap\n",
    "etc/default/grub": 'GRUB_CMDLINE_LINUX_DEFAULT="quiet resume=/dev/sda3 console=ttyS1,115200"\n'
    'GRUB_SERIAL_COMMAND="serial --speed=115200 --unit=1"\n',
    "boot/grub/grub.cfg": "  set root='hd0,gpt2'\n  linux /vmlinuz root=/dev/sda2 ro console=ttyS1,115200 resume=/dev/sda3\n"
    "  linux /vmlinuz myroot=/dev/sda2 root=/dev/sda22 root=/dev/mapper/vg0-root\n",
    "boot/grub/device.map": "(hd0)\t/dev/disk/by-id/ata-MAKER_X\n",
    "etc/initramfs-tools/initramfs.conf": "MODULES=most\n",
    "etc/initramfs-tools/conf.d/driver-policy": "MODULES=dep\n",
    "etc/initramfs-tools/conf.d/resume": "RESUME=/dev/sda3\n",
    "usr/sbin/update-initramfs": "",
    "lib/systemd/network/99-default.link": "[Link]\nNamePolicy=keep\n",
    "boot/initrd.img-6.1.0-1-amd64": "image" * 100,
    "lib/modules/6.1.0-1-amd64/modules.dep": "kernel/drivers/ata/ahci.ko:\n",
}
_RED_HAT = {
    "etc/fstab": f"UUID={ROOT_UUID} / xfs defaults 0 0\n",
    "etc/kernel/cmdline": "root=/dev/sda2 ro resume=/dev/sda3",
    "boot/loader/entries/abc-6.1.conf": "title RHEL\nlinux /vmlinuz\noptions root=/dev/sda2 ro resume=/dev/sda3 $tuned_params\n",
    "boot/grub2/grubenv": ("# GRUB Environment Block\nkernelopts=root=/dev/sda2 ro\nsaved_entry=abc\n").ljust(
        1024, "#"
    ),
    "etc/lvm/devices/system.devices": "IDTYPE=sys_serial IDNAME=X DEVNAME=/dev/sda5 PVID=p\n",
    "etc/selinux/config": "SELINUX=enforcing\nSELINUXTYPE=targeted\n",
    "usr/bin/dracut": "",
    "usr/lib/systemd/network/99-default.link": "",
    "boot/efi/EFI/redhat/shimx64.efi": "shim",
    "boot/efi/EFI/redhat/grubx64.efi": "grub",
    "boot/efi/EFI/redhat/mmx64.efi": "mm",
    "boot/efi/EFI/redhat/fbx64.efi": "fallback",
    "boot/efi/EFI/redhat/grub.cfg": "configfile /grub2/grub.cfg\n",
    "lib/modules/6.1.0-1-amd64/modules.dep": "kernel/a/virtio_blk.ko.xz: kernel/a/virtio.ko.xz\nkernel/a/vmxnet3.ko.xz:\n",
}
_SUSE = {
    "etc/fstab": "/dev/disk/by-id/ata-MAKER_X-part2 / btrfs defaults 0 0\n",
    "boot/grub2/device.map": "(hd0) /dev/disk/by-id/ata-MAKER_X\n",
    "etc/default/grub": 'GRUB_CMDLINE_LINUX_DEFAULT="splash=silent resume=/dev/disk/by-id/ata-MAKER_X-part3"\n',
    "boot/efi/EFI/opensuse/shim.efi": "shim",
    "boot/efi/EFI/opensuse/grub.efi": "grub",
    "boot/efi/EFI/opensuse/MokManager.efi": "mok",
    "etc/udev/rules.d/70-persistent-net.rules": f'ATTR{{address}}=="{MAC.upper()}", NAME="enp0s25"\n',
}
_OLD = {"etc/fstab": "/dev/sda2 / ext3 defaults 1 1\n", "etc/udev/rules.d/60-other.rules": ""}


@dataclass(slots=True)
class _Stage:
    """One run of the stage on a tree."""

    tree: Path
    home: Path
    items: dict[str, tuple[str, str]] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    error: str = ""

    def read(self, path: str) -> str:
        return (self.tree / path).read_text()

    def exists(self, path: str) -> bool:
        return (self.tree / path).exists()


def _plant(tree: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("etc", "boot"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    return tree


def _run(
    tree: Path,
    home: Path,
    record: Machine | None = None,
    *,
    shell: str = "dash",
    items: tuple[str, ...] = ITEMS,
    rebuild: bool = False,
) -> _Stage:
    plan = AdaptPlan(items=tuple(AdaptItem(name=name, reason="") for name in items), rebuild=rebuild)
    shutil.rmtree(home, ignore_errors=True)
    (home / "in").mkdir(parents=True)
    for name in ("stage.sh", "rename.awk", "lacking.awk"):
        shutil.copy(_SOURCE / name, home / name)
    (home / "busybox").symlink_to(find_busybox())
    for name, text in stage_tables(plan, record or machine()).items():
        (home / "in" / name).write_text(text)
    environment = {**os.environ, "P2V_HOME": str(home), "P2V_ROOT": str(tree)}
    if shutil.which(_SHELLS[shell][0]) is None:
        pytest.skip(f"not installed: {_SHELLS[shell][0]}")
    ran = subprocess.run(
        [*_SHELLS[shell], str(home / "stage.sh"), "--files"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr.strip(), ran.stderr
    out = home / "out"
    rows = [line.split("\t", 2) for line in (out / "items").read_text().splitlines()]
    changes = [line.split("\t", 1)[1] for line in (out / "changes").read_text().splitlines()]
    error = (out / "error").read_text().strip() if (out / "error").exists() else ""
    return _Stage(tree, home, {name: (status, detail) for name, status, detail in rows}, changes, error)


def _no_kernels() -> Machine:
    return machine(boot=Boot(loader="grub", consoles=("ttyS1",)))


@pytest.mark.parametrize("shell", sorted(_SHELLS))
def test_debian(tmp_path: Path, shell: str) -> None:
    done = _run(_plant(tmp_path / "root", _DEBIAN), tmp_path / "home", _no_kernels(), shell=shell, items=ITEMS[:6])
    assert not done.error
    assert done.read("etc/fstab") == _DEBIAN["etc/fstab"].replace("\n/dev/sda2\t", f"\nUUID={ROOT_UUID}\t").replace(
        "/dev/disk/by-path/pci-0000:00:1f.2-ata-1-part3", f"UUID={SWAP_UUID}"
    ).replace("/dev/nvme0n1p1", f"UUID={DATA_UUID}")
    assert done.read("etc/crypttab") == (
        f"secret  UUID={LUKS_UUID} none luks\nswap PARTUUID=aaaaaaaa-0000-0000-0000-000000000005 /dev/urandom swap\n"
    )
    assert done.read("etc/default/grub") == (
        f'GRUB_CMDLINE_LINUX_DEFAULT="quiet resume=UUID={SWAP_UUID} console=ttyS0,115200"\n'
        'GRUB_SERIAL_COMMAND="serial --speed=115200 --unit=0"\n'
    )
    assert done.read("boot/grub/grub.cfg") == (
        f"  set root='hd0,gpt2'\n  linux /vmlinuz root=UUID={ROOT_UUID} ro console=ttyS0,115200 resume=UUID={SWAP_UUID}\n"
        "  linux /vmlinuz myroot=/dev/sda2 root=/dev/sda22 root=/dev/mapper/vg0-root\n"
    )
    assert not done.exists("boot/grub/device.map")
    assert done.read("etc/initramfs-tools/conf.d/resume") == f"RESUME=UUID={SWAP_UUID}\n"
    assert "MODULES=most" in done.read("etc/initramfs-tools/conf.d/zz-p2v")
    assert (
        done.read("etc/systemd/network/10-p2v-enp0s25.link")
        == f"[Match]\nMACAddress={MAC}\nType=ether\n\n[Link]\nName=enp0s25\n"
    )
    assert {name: status for name, (status, _) in done.items.items()} == {
        "names": "done",
        "device-map": "done",
        "lvm-devices": "nothing",
        "network": "done",
        "console": "done",
        "initramfs": "done",
    }
    # The originals are kept, and nothing else was touched.
    for path in ("etc/fstab", "etc/crypttab", "boot/grub/grub.cfg", "boot/grub/device.map"):
        assert done.read(f"var/lib/p2v/originals/{path}") == _DEBIAN[path]
    for path, text in _DEBIAN.items():
        if f"/{path}" not in done.changed:
            assert done.read(path) == text


def test_a_second_run_finds_nothing_to_do(tmp_path: Path) -> None:
    tree = _plant(tmp_path / "root", _DEBIAN | _RED_HAT | {"etc/fstab": _DEBIAN["etc/fstab"]})
    first = _run(tree, tmp_path / "home", _no_kernels())
    second = _run(tree, tmp_path / "home", _no_kernels())
    assert first.changed and not second.changed
    assert {status for status, _ in second.items.values()} == {"nothing"}


def test_red_hat(tmp_path: Path) -> None:
    done = _run(_plant(tmp_path / "root", _RED_HAT), tmp_path / "home", _no_kernels())
    assert not done.error
    assert done.read("etc/kernel/cmdline").strip() == f"root=UUID={ROOT_UUID} ro resume=UUID={SWAP_UUID}"
    assert f"options root=UUID={ROOT_UUID} ro resume=UUID={SWAP_UUID} $tuned_params" in done.read(
        "boot/loader/entries/abc-6.1.conf"
    )
    block = done.read("boot/grub2/grubenv")
    assert len(block) == 1024 and block.startswith(
        f"# GRUB Environment Block\nkernelopts=root=UUID={ROOT_UUID} ro\nsaved_entry=abc\n#"
    )
    assert not done.exists("etc/lvm/devices/system.devices")
    assert done.exists("var/lib/p2v/originals/etc/lvm/devices/system.devices")
    added = done.read("etc/dracut.conf.d/zz-p2v.conf")
    assert (
        "virtio_blk" in added
        and "vmxnet3" in added
        and "nvme" not in added
        and "hostonly" not in added.replace("# ", "")
    )
    fallback = done.tree / "boot/efi/EFI/BOOT"
    assert {path.name: path.read_text() for path in fallback.iterdir()} == {
        "BOOTX64.EFI": "shim",
        "grubx64.efi": "grub",
        "mmx64.efi": "mm",
        "grub.cfg": "configfile /grub2/grub.cfg\n",
    }
    assert done.exists(".autorelabel")
    assert "/.autorelabel" in done.changed


def test_suse(tmp_path: Path) -> None:
    done = _run(_plant(tmp_path / "root", _SUSE), tmp_path / "home", _no_kernels())
    assert done.read("etc/fstab") == f"UUID={ROOT_UUID} / btrfs defaults 0 0\n"
    assert f"resume=UUID={SWAP_UUID}" in done.read("etc/default/grub")
    assert not done.exists("boot/grub2/device.map")
    assert done.read("boot/efi/EFI/BOOT/BOOTX64.EFI") == "shim"
    assert {path.name for path in (done.tree / "boot/efi/EFI/BOOT").iterdir()} == {
        "BOOTX64.EFI",
        "grub.efi",
        "MokManager.efi",
    }
    assert done.items["network"][0] == "nothing"
    assert not done.exists(".autorelabel")


def test_an_old_udev_gets_a_rule(tmp_path: Path) -> None:
    done = _run(_plant(tmp_path / "root", _OLD), tmp_path / "home", _no_kernels(), items=("network",))
    assert f'ATTR{{address}}=="{MAC}"' in done.read("etc/udev/rules.d/70-persistent-net.rules")
    assert 'NAME="enp0s25"' in done.read("etc/udev/rules.d/70-persistent-net.rules")


def test_a_fallback_loader_that_is_there_stays(tmp_path: Path) -> None:
    tree = _plant(tmp_path / "root", _RED_HAT | {"boot/efi/EFI/Boot/bootx64.efi": "mine"})
    done = _run(tree, tmp_path / "home", _no_kernels(), items=("efi-fallback",))
    assert done.items["efi-fallback"][0] == "nothing" and not done.changed


def test_a_missing_esp_is_an_error_that_says_so(tmp_path: Path) -> None:
    done = _run(_plant(tmp_path / "root", _OLD), tmp_path / "home", _no_kernels(), items=("names", "efi-fallback"))
    assert "EFI system partition" in done.error


def test_only_what_is_asked_for_is_changed(tmp_path: Path) -> None:
    done = _run(_plant(tmp_path / "root", _DEBIAN), tmp_path / "home", _no_kernels(), items=("network",))
    assert done.changed == ["/etc/systemd/network/10-p2v-enp0s25.link"]


@needs("cpio")
def test_what_the_initramfs_must_know_is_appended(tmp_path: Path) -> None:
    tree = _plant(tmp_path / "root", _DEBIAN | {"etc/crypttab": "swap /dev/sda5 /dev/urandom swap\n"})
    record = machine(boot=Boot(loader="grub", kernels=(kernel(),)))
    done = _run(tree, tmp_path / "home", record, items=("names", "network", "initramfs"))
    assert not done.error
    assert "lacks no driver of its kernel" in done.items["initramfs"][1]
    image = (tree / "boot/initrd.img-6.1.0-1-amd64").read_bytes()
    assert image.startswith(b"image" * 100 + b"\0") and image[1024:1026] == b"\x1f\x8b"
    archive = subprocess.run(["gzip", "-dc"], input=image[1024:], check=True, capture_output=True).stdout
    folder = tmp_path / "unpacked"
    folder.mkdir()
    subprocess.run(["cpio", "-id", "--quiet"], input=archive, cwd=folder, check=True, capture_output=True)
    assert (folder / "conf/conf.d/resume").read_text() == f"RESUME=UUID={SWAP_UUID}\n"
    assert (folder / "etc/systemd/network/10-p2v-enp0s25.link").exists()
    again = _run(tree, tmp_path / "home", record, items=("names", "network", "initramfs"))
    assert not again.changed and "adapted before" in again.items["initramfs"][1]
    # One that was seen to lack something is made anew, whatever was appended to it (here there is no system that could).
    anew = _run(tree, tmp_path / "home", record, items=("initramfs",), rebuild=True)
    assert "no tool is run on a mere tree" in anew.error


@needs("cpio")
def test_what_other_items_appended_is_not_taken_for_drivers(tmp_path: Path) -> None:
    """A first adaptation without the initramfs, then a repair with it."""
    tree = _plant(tmp_path / "root", _DEBIAN)
    record = machine(boot=Boot(loader="grub", kernels=(kernel(),)))
    image = tree / "boot/initrd.img-6.1.0-1-amd64"
    first = _run(tree, tmp_path / "home", record, items=("network",))
    size = image.stat().st_size
    assert "/boot/initrd.img-6.1.0-1-amd64" in first.changed and size > 1024
    second = _run(tree, tmp_path / "home", record, items=("network", "initramfs"))
    assert "lacks no driver of its kernel" in second.items["initramfs"][1]
    assert image.stat().st_size == size  # and is not appended twice


def test_modules_that_are_lacking_are_found_with_what_they_need(tmp_path: Path) -> None:
    held, wanted, dep = tmp_path / "held", tmp_path / "wanted", tmp_path / "dep"
    held.write_text("none\nahci\nlibata\n")
    wanted.write_text("ahci\nvirtio_blk\nxen_blkfront\nnvme\n")
    dep.write_text(
        "kernel/ahci.ko.xz: kernel/libahci.ko.xz kernel/libata.ko.xz\nkernel/libata.ko.xz:\n"
        "kernel/virtio_blk.ko.xz: kernel/virtio_ring.ko.xz kernel/libata.ko.xz\nkernel/xen-blkfront.ko.xz:\nkernel/e1000.ko.xz:\n"
    )

    def listed(show: str) -> set[str]:
        command = [
            "busybox",
            "awk",
            "-v",
            f"show={show}",
            "-f",
            str(_SOURCE / "lacking.awk"),
            str(held),
            str(wanted),
            str(dep),
        ]
        return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())

    assert listed("names") == {"virtio_blk", "xen_blkfront"}
    assert listed("new") == {"kernel/virtio_blk.ko.xz", "kernel/virtio_ring.ko.xz", "kernel/xen-blkfront.ko.xz"}
    assert listed("all") == listed("new") | {"kernel/ahci.ko.xz", "kernel/libata.ko.xz"}


@needs("shellcheck")
def test_the_stage_is_clean_shell() -> None:
    ran = subprocess.run(["shellcheck", str(_SOURCE / "stage.sh")], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


def test_the_stage_uses_no_applet_that_was_not_asked_for() -> None:
    text = (_SOURCE / "stage.sh").read_text()
    used = set(re.findall(r"\bbb ([a-z0-9]+)", text)) | set(re.findall(r'"\$H/busybox" ([a-z0-9]+)', text))
    assert used and used <= _APPLETS


def test_a_dynamic_busybox_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy("/bin/ls", tmp_path / "busybox")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AdaptationError) as caught:
        find_busybox()
    assert "busybox-static" in caught.value.advice

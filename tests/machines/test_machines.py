"""The machines themselves: the cache, the writer's check, and that a built machine is what its recipe says."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from tests.machines import builder, installer
from tests.machines.board import escape, program
from tests.machines.errors import MachineError
from tests.machines.physical import MAC, MODEL, SERIAL, DataDisk, PhysicalMachine
from tests.machines.recipe import BIOS_LVM, BIOS_PLAIN, RECIPES, UEFI_DRACUT, FileSystem, Recipe, User, VolumeGroup
from tests.machines.writer import verify_command
from tests.requirement import needs

slow_boot = pytest.mark.slow_boot

# --- cache keys -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> builder.Keys:
    return builder.keys(tmp_path_factory.mktemp("cache"))


@needs("ssh-keygen")
@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(BIOS_LVM, hostname="other"),
        dataclasses.replace(BIOS_LVM, disk_mib=BIOS_LVM.disk_mib + 1),
        dataclasses.replace(BIOS_LVM, users=(*BIOS_LVM.users, User(name="one", password="more"))),
        dataclasses.replace(BIOS_LVM, commands=("true",)),
        dataclasses.replace(BIOS_LVM, fstab_names=(("/boot", "/dev/sda1"),)),
        dataclasses.replace(BIOS_LVM, further_disks=UEFI_DRACUT.further_disks),
        dataclasses.replace(BIOS_LVM, tree=dataclasses.replace(BIOS_LVM.tree, controller="ahci")),
        dataclasses.replace(BIOS_LVM, tree=dataclasses.replace(BIOS_LVM.tree, packages=("zstd",))),
    ],
    ids=["hostname", "disk", "user", "command", "fstab", "further disk", "controller", "package"],
)
def test_every_change_of_a_recipe_changes_its_key(keys: builder.Keys, other: Recipe) -> None:
    assert builder.machine_key(other, keys) != builder.machine_key(BIOS_LVM, keys)
    assert builder.machine_key(dataclasses.replace(BIOS_LVM), keys) == builder.machine_key(BIOS_LVM, keys)


@needs("ssh-keygen")
def test_other_key_files_change_the_key(keys: builder.Keys, tmp_path: Path) -> None:
    assert builder.machine_key(BIOS_LVM, builder.keys(tmp_path)) != builder.machine_key(BIOS_LVM, keys)


@needs("ssh-keygen")
def test_private_keys_are_private(keys: builder.Keys) -> None:
    for path in (keys.identity, keys.host_key):
        assert path.stat().st_mode & 0o077 == 0


def test_equal_packages_share_a_tree() -> None:
    changed = dataclasses.replace(BIOS_LVM.tree, packages=("zstd",))
    assert builder.tree_key(BIOS_LVM.tree) == builder.tree_key(BIOS_PLAIN.tree) != builder.tree_key(changed)


# --- publication ----------------------------------------------------------------------------------------------------


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise MachineError("no")

    with pytest.raises(MachineError):
        builder.publish(tmp_path, "thing", build)
    assert [path.name for path in tmp_path.iterdir()] == [".lock-thing"]


_SLOW_BUILD = """
import sys, time
from pathlib import Path
from tests.machines import builder

def build(folder):
    (folder / "half").write_text("half")
    print("building", flush=True)
    time.sleep(600)

builder.publish(Path(sys.argv[1]), "thing", build)
"""


def test_a_killed_build_publishes_nothing_and_does_not_block_the_next(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW_BUILD, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"building\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "thing").exists()

    folder = builder.publish(tmp_path, "thing", lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not list(tmp_path.glob(".part-*"))


def test_an_entry_is_built_once(tmp_path: Path) -> None:
    def again(folder: Path) -> None:
        raise AssertionError("built twice")

    first = builder.publish(tmp_path, "thing", lambda folder: (folder / "one").touch())
    assert builder.publish(tmp_path, "thing", again) == first


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_layout_of_a_recipe_fits_its_disk(recipe: Recipe) -> None:
    assert sum(partition.size_mib or 0 for partition in recipe.partitions) < recipe.disk_mib
    assert all(partition.size_mib is not None for partition in recipe.partitions[:-1])
    mounts = [content.mount for _, _, content in recipe.areas() if isinstance(content, FileSystem)]
    assert mounts.count("/") == 1
    assert len(set(mounts)) == len(mounts)
    assert {mount for mount, _ in recipe.fstab_names} <= set(mounts)
    for disk in recipe.further_disks:
        assert sum(partition.size_mib or 0 for partition in disk.partitions) < disk.disk_mib
        assert all(partition.size_mib is not None for partition in disk.partitions[:-1])
        assert not any(isinstance(partition.content, VolumeGroup) for partition in disk.partitions)
    for partition in recipe.partitions:
        if isinstance(partition.content, VolumeGroup):
            assert all(volume.size_mib is not None for volume in partition.content.volumes[:-1])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_installer_is_a_valid_shell_script(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "install"
    path.write_text(installer.script(recipe))
    subprocess.run(["sh", "-n", str(path)], check=True)


def test_the_hard_machine_mounts_by_device_name_uuid_and_mapper() -> None:
    names = {line.split()[1]: line.split()[0] for line in installer.fstab(UEFI_DRACUT).splitlines()[1:]}
    assert names == {
        "/boot/efi": "/dev/sda1",
        "/boot": f"UUID={UEFI_DRACUT.uuid('/boot')}",
        "/": "/dev/mapper/vg0-root",
        "/home": "/dev/mapper/vg0-home",
        "none": "/dev/mapper/vg0-swap",
        "/data": "/dev/sdb1",
    }


# --- the hard machine's disks, as they were built -------------------------------------------------------------------


def _partition_starts(disk: Path) -> list[int]:
    """The partitions' offsets in bytes, in order."""
    output = subprocess.run([program("sfdisk"), "--json", str(disk)], capture_output=True, check=True).stdout
    table = json.loads(output)["partitiontable"]
    return [int(partition["start"]) * int(table["sectorsize"]) for partition in table["partitions"]]


def _cpio_names(image: bytes) -> set[str]:
    """The names in an initramfs of uncompressed archives followed by one that gzip compressed, as dracut makes it here."""
    start = next(match.start() for match in re.finditer(rb"\x1f\x8b\x08", image) if match.start() % 512 == 0)
    archive = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(image[start:])
    listing = subprocess.run([program("cpio"), "-t", "--quiet"], input=archive, capture_output=True, check=True)
    return set(listing.stdout.decode().split("\n"))


@pytest.mark.nightly  # the machine takes minutes to build
@slow_boot
@needs("debugfs", "cpio")
def test_the_initramfs_of_the_hard_machine_is_for_its_own_controller_only(
    uefi_dracut_disk: builder.BuiltMachine, tmp_path: Path
) -> None:
    # a partition with a plain ext4, so that it can be read without a boot
    boot = f"{uefi_dracut_disk.disk}?offset={_partition_starts(uefi_dracut_disk.disk)[1]}"
    subprocess.run([program("debugfs"), "-R", f"rdump / {tmp_path}", boot], check=True, capture_output=True)
    (image,) = tmp_path.glob("initrd.img-*")
    names = _cpio_names(image.read_bytes())
    modules = {Path(name).name.removesuffix(".ko") for name in names if name.endswith(".ko")}
    assert {"ahci", "sd_mod", "xfs", "dm-mod"} <= modules
    assert "usr/sbin/lvm" in names
    assert not {module for module in modules if module.startswith("virtio_")}


@pytest.mark.nightly  # the machine takes minutes to build
@slow_boot
@needs("mdir")
def test_the_hard_machine_boots_by_its_variables_only(uefi_dracut_disk: builder.BuiltMachine) -> None:
    esp = f"{uefi_dracut_disk.disk}@@{_partition_starts(uefi_dracut_disk.disk)[0]}"
    listing = subprocess.run([program("mdir"), "-/", "-b", "-i", esp, "::"], capture_output=True, text=True, check=True)
    loaders = [line.removeprefix("::").lower() for line in listing.stdout.splitlines() if line.lower().endswith(".efi")]
    assert loaders == ["/efi/debian/grubx64.efi"]
    assert uefi_dracut_disk.variables is not None
    assert r"\EFI\debian\grubx64.efi".encode("utf-16-le") in uefi_dracut_disk.variables.read_bytes()


# --- the writer's check, on this computer's Python ------------------------------------------------------------------


def _write(folder: Path, changes: int) -> int:
    """Run the writer here until it acknowledged `changes`; return the number of its last change."""
    command = verify_command(str(folder)).replace(" verify ", " write ")
    with subprocess.Popen(["sh", "-c", f"exec {command}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        last = 0
        for line in process.stdout:
            last = int(line)
            if last == changes:
                process.stdin.close()
    return last


def _verify(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", verify_command(str(folder))], capture_output=True, text=True, check=False)


def test_the_check_accepts_what_was_written(tmp_path: Path) -> None:
    last = _write(tmp_path, 40)
    result = _verify(tmp_path)
    assert (result.returncode, result.stdout) == (0, f"{last}\n")


def test_the_check_sees_a_torn_file(tmp_path: Path) -> None:
    _write(tmp_path, 20)
    with (tmp_path / "file3").open("r+b") as file:
        file.seek(100)
        file.write(b"\0" * 16)
    assert _verify(tmp_path).returncode == 1


def test_the_check_sees_an_older_file(tmp_path: Path) -> None:
    _write(tmp_path, 10)
    older = (tmp_path / "file2").read_bytes()
    _write(tmp_path, 20)
    (tmp_path / "file2").write_bytes(older)
    assert _verify(tmp_path).returncode == 1


def test_the_check_sees_a_damaged_journal(tmp_path: Path) -> None:
    _write(tmp_path, 20)
    journal = tmp_path / "journal"
    journal.write_bytes(journal.read_bytes().replace(b"\n7 ", b"\n8 ", 1))
    assert _verify(tmp_path).returncode == 1


# --- the machine ----------------------------------------------------------------------------------------------------


@slow_boot
def test_the_machine_is_what_its_recipe_says(physical_bios_lvm: PhysicalMachine) -> None:
    physical = physical_bios_lvm
    text = physical.run("lsblk -rno NAME,TYPE,FSTYPE,MOUNTPOINT; vgs --noheadings --units m -o vg_name,vg_free").stdout
    lines = [line.split() for line in text.splitlines()]
    assert ["sda", "disk"] in lines
    assert ["sda1", "part", "ext4", "/boot"] in lines
    assert ["sda2", "part", "LVM2_member"] in lines
    assert ["vg0-root", "lvm", "ext4", "/"] in lines
    assert ["vg0-swap", "lvm", "swap", "[SWAP]"] in lines
    assert float(next(fields[1] for fields in lines if fields[0] == "vg0" and len(fields) == 2)[:-1]) >= 1024

    facts = physical.run(
        "hostname; cat /sys/class/net/enp0s25/address; systemd-detect-virt; runuser -u admin -- sudo -n id -u;"
        " runuser -u nosudo -- sudo -n id -u 2>/dev/null || echo refused; cat /sys/block/sda/device/model;"
        " lsblk -dno SERIAL /dev/sda; systemctl --failed --plain --no-legend"
    ).stdout
    assert [line.strip() for line in facts.splitlines()] == ["metal1", MAC, "none", "0", "refused", MODEL, SERIAL]
    assert "login:" in physical.console.read_text(errors="replace")


@pytest.mark.nightly  # the machine takes minutes to build
@slow_boot
def test_the_hard_machine_is_what_its_recipe_says(physical_uefi_dracut: PhysicalMachine) -> None:
    physical = physical_uefi_dracut
    text = physical.run(
        "for mount in / /boot /boot/efi /home /data;"
        " do findmnt -rno TARGET,SOURCE,FSTYPE $mount; done; swapon --noheadings --show=TYPE;"
        " vgs --noheadings --units m --nosuffix -o vg_free | tr -d ' '"
    ).stdout
    lines = [tuple(line.split()) for line in text.splitlines()]
    assert lines[:5] == [
        ("/", "/dev/mapper/vg0-root", "xfs"),
        ("/boot", "/dev/sda2", "ext4"),
        ("/boot/efi", "/dev/sda1", "vfat"),
        ("/home", "/dev/mapper/vg0-home", "ext4"),
        ("/data", "/dev/sdb1", "ext4"),
    ]
    assert lines[5] == ("partition",)
    assert float(lines[6][0]) >= 1024

    facts = physical.run(
        "hostname; systemd-detect-virt; lsblk -dno SERIAL /dev/sda /dev/sdb;"
        " basename $(readlink -f /sys/class/net/enp0s31f6/device/driver); cat /sys/class/net/enp0s31f6/address;"
        " ip -4 -o address show dev enp0s31f6 | tr -s ' ' | cut -d' ' -f4; ip route show default | cut -d' ' -f3;"
        " cat /data/known /home/known; test -d /sys/firmware/efi && echo efi;"
        " systemctl --failed --plain --no-legend; lsmod | grep -c ^virtio",
        check=False,
    ).stdout
    assert facts.splitlines() == [
        *("metal3", "none", SERIAL, UEFI_DRACUT.further_disks[0].serial, "e1000e", MAC, "10.0.2.15/24", "10.0.2.2"),
        *("on the data disk", "on the home volume", "efi", "0"),
    ]
    assert "login:" in physical.console.read_text(errors="replace")


@slow_boot
def test_the_machine_has_no_way_out(physical_bios_lvm: PhysicalMachine) -> None:
    # the address is the user network's own gateway, which leads to this computer's loopback
    probe = "timeout 10 bash -c 'exec 3<>/dev/tcp/10.0.2.2/22' 2>&1"
    assert physical_bios_lvm.run(probe, check=False).returncode != 0


@slow_boot
def test_the_writer_and_its_check_on_the_machine(physical_bios_lvm: PhysicalMachine) -> None:
    writer = physical_bios_lvm.start_writer()
    while len(writer.acknowledged) < 20:
        time.sleep(0.1)
    acknowledged = physical_bios_lvm.stop_writer()
    assert [item.number for item in acknowledged] == list(range(1, len(acknowledged) + 1))
    assert int(physical_bios_lvm.run(verify_command()).stdout) >= acknowledged[-1].number
    physical_bios_lvm.run("rm -r /srv/writer")


@slow_boot
@needs("e2fsck", "debugfs")
def test_faults_of_the_machine(bios_plain_disk: builder.BuiltMachine, tmp_path: Path) -> None:
    """Link cut, a disk gone, and the power cut under the writer: what was acknowledged is on the disk."""
    overlay = tmp_path / "disk.qcow2"
    data = tmp_path / "data.raw"
    with data.open("wb") as file:
        file.truncate(64 << 20)
    with PhysicalMachine(
        bios_plain_disk, overlay=overlay, data_disks=[DataDisk(path=data, serial="P2VSRC0002")]
    ) as physical:
        physical.set_link(up=False)
        with pytest.raises(subprocess.TimeoutExpired):
            physical.run("true", timeout=5)
        physical.set_link(up=True)
        physical.wait_for_ssh()

        assert physical.run("head -c 4096 /dev/sdb | wc -c").stdout.strip() == "4096"
        physical.remove_disk("sdb")
        assert physical.run("head -c 4096 /dev/sdb", check=False).returncode != 0

        writer = physical.start_writer()
        while len(writer.acknowledged) < 20:
            time.sleep(0.1)
        physical.kill()
        acknowledged = writer.acknowledged[-1].number

    # the partition is cut out: e2fsck forgets an offset when it opens the file again after replaying the journal
    root = tmp_path / "root.raw"
    size = BIOS_PLAIN.partitions[0].size_mib
    partition = f"driver=raw,offset=1M,size={size}M,file.driver=qcow2,file.file.filename={escape(overlay)}"
    subprocess.run([program("qemu-img"), "convert", "--image-opts", partition, "-O", "raw", str(root)], check=True)
    replay = subprocess.run([program("e2fsck"), "-p", str(root)], capture_output=True, text=True, check=False)
    assert replay.returncode in (0, 1), replay.stdout + replay.stderr
    dump = [program("debugfs"), "-R", f"rdump /srv/writer {tmp_path}", str(root)]
    subprocess.run(dump, check=True, capture_output=True)
    result = _verify(tmp_path / "writer")
    assert result.returncode == 0, result.stdout
    assert int(result.stdout) >= acknowledged

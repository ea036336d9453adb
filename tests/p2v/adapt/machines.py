"""Records of machines for the tests of adaptation."""

from __future__ import annotations

from formats.machine import (
    Boot,
    Bus,
    Cpu,
    Disk,
    Firmware,
    Kernel,
    Machine,
    Nic,
    OperatingSystem,
    Partition,
    PartitionTable,
    TableKind,
    Volume,
    VolumeGroup,
)

MAC = "52:54:00:a1:00:01"
ROOT_UUID = "11111111-1111-1111-1111-111111111111"
SWAP_UUID = "22222222-2222-2222-2222-222222222222"
DATA_UUID = "33333333-3333-3333-3333-333333333333"
LUKS_UUID = "44444444-4444-4444-4444-444444444444"
ESP_UUID = "ABCD-1234"

_ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
_LINUX = "0fc63daf-8483-4772-8e79-3d69d8477de4"

GENERIC: tuple[str, ...] = (
    "virtio_pci",
    "virtio_blk",
    "virtio_scsi",
    "ahci",
    "nvme",
    "ata_piix",
    "ata_generic",
    "sd_mod",
    "mptspi",
    "mptsas",
)
GENERIC += ("vmw_pvscsi", "megaraid_sas", "hv_vmbus", "hv_storvsc", "xen-blkfront")


def kernel(
    version: str = "6.1.0-1-amd64", drivers: tuple[str, ...] | None = ("ahci", "sd_mod"), **other: object
) -> Kernel:
    """A kernel, host-only on AHCI unless told otherwise."""
    facts: dict[str, object] = {
        "image": f"/boot/vmlinuz-{version}",
        "initramfs": f"/boot/initrd.img-{version}",
        "initramfs_kind": "initramfs-tools",
        "host_only": True,
    }
    return Kernel(version=version, drivers=drivers, **{**facts, **other})  # type: ignore[arg-type]


def machine(**changes: object) -> Machine:
    """Two disks: sda with ESP, root, swap and an encrypted partition, nvme0n1 with one file system; one NIC; UEFI, GRUB, LVM."""
    table = PartitionTable(
        kind=TableKind.GPT,
        id="aaaaaaaa-0000-0000-0000-000000000000",
        partitions=tuple(
            Partition(
                number=n,
                start=n << 20,
                size=1 << 20,
                type=_ESP if n == 1 else _LINUX,
                uuid=f"aaaaaaaa-0000-0000-0000-00000000000{n}",
            )
            for n in range(1, 6)
        ),
    )
    data = PartitionTable(
        kind=TableKind.GPT, id="b" * 8, partitions=(Partition(number=1, start=1, size=1, type=_LINUX),)
    )
    disks = (
        Disk(
            id="serial-X",
            size=8 << 30,
            name="sda",
            bus=Bus.SATA,
            links=("/dev/disk/by-id/ata-MAKER_X", "/dev/disk/by-path/pci-0000:00:1f.2-ata-1"),
            table=table,
        ),
        Disk(
            id="serial-Y",
            size=8 << 30,
            name="nvme0n1",
            bus=Bus.NVME,
            links=("/dev/disk/by-id/nvme-MAKER_Y",),
            table=data,
        ),
    )
    volumes = (
        Volume(path="/dev/sda1", kind="part", size=1 << 20, content="vfat", uuid=ESP_UUID),
        Volume(path="/dev/sda2", kind="part", size=1 << 20, content="ext4", uuid=ROOT_UUID, mountpoints=("/",)),
        Volume(path="/dev/sda3", kind="part", size=1 << 20, content="swap", uuid=SWAP_UUID),
        Volume(path="/dev/sda4", kind="part", size=1 << 20, content="crypto_LUKS", uuid=LUKS_UUID),
        Volume(path="/dev/sda5", kind="part", size=1 << 20),
        Volume(path="/dev/nvme0n1p1", kind="part", size=1 << 20, content="xfs", uuid=DATA_UUID, mountpoints=("/data",)),
        Volume(
            path="/dev/mapper/vg0-home", kind="lvm", size=1 << 20, content="ext4", uuid="5" * 8, mountpoints=("/home",)
        ),
    )
    facts: dict[str, object] = {
        "name": "metal",
        "firmware": Firmware.UEFI,
        "cpu": Cpu(),
        "disks": disks,
        "volumes": volumes,
        "volume_groups": (
            VolumeGroup(
                name="vg0",
                uuid="u",
                extent_size=1,
                extent_count=1,
                free_extents=0,
                physical_volumes=("/dev/sda5",),
                logical_volumes=("/dev/mapper/vg0-home",),
            ),
        ),
        "nics": (Nic(name="enp0s25", mac=MAC, configured_by="ifupdown", up=True),),
        "system": OperatingSystem(family="linux", id="debian"),
        "boot": Boot(
            loader="grub",
            disk="serial-X",
            command_line="BOOT_IMAGE=/vmlinuz root=/dev/sda2 ro quiet resume=/dev/sda3 console=ttyS1,115200 net.ifnames=1 "
            "rd.lvm.lv=vg0/home",
            consoles=("ttyS1,115200",),
            kernels=(kernel(),),
            running_kernel="6.1.0-1-amd64",
        ),
    }
    return Machine(**{**facts, **changes})  # type: ignore[arg-type]

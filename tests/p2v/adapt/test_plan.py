"""What is planned for which machine, and the facts that the stage gets."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.definitions import Hardware
from formats.errors import UsageError
from formats.machine import Boot, Bus, EfiVariable, Firmware, OperatingSystem
from p2v.adapt import ITEMS, plan_adaptation
from p2v.adapt.kernel import adaptation_kernel
from p2v.adapt.linux import choose_controller, command_line, facts, loaders, stable_names
from p2v.emulator import Controller
from p2v.errors import AdaptationError
from tests.p2v.adapt.machines import DATA_UUID, ESP_UUID, GENERIC, LUKS_UUID, MAC, ROOT_UUID, SWAP_UUID, kernel, machine


def _reason(name: str, hardware: Hardware | None = None, **changes: object) -> str:
    return next((item.reason for item in plan_adaptation(machine(**changes), hardware).items if item.name == name), "")


def test_a_machine_with_everything_gets_every_item_in_order() -> None:
    assert tuple(item.name for item in plan_adaptation(machine()).items) == ITEMS


def test_reasons_name_what_is_missing_for_the_target() -> None:
    reason = _reason("initramfs", Hardware(bus=Bus.VIRTIO, nic="virtio"))
    assert "lacks virtio_pci, virtio_blk, which the target's virtio disks need" in reason
    assert MAC in _reason("network") and "enp0s25" in _reason("network")
    assert "ttyS1" in _reason("console")


def test_a_generic_initramfs_is_left_alone() -> None:
    generic = Boot(kernels=(kernel(drivers=GENERIC, host_only=False),))
    assert not _reason("initramfs", boot=generic)
    unknown = Boot(kernels=(kernel(drivers=None, host_only=None),))
    assert "not known" in _reason("initramfs", boot=unknown)


def test_items_that_do_not_apply() -> None:
    plain = machine(
        firmware=Firmware.BIOS, volume_groups=(), nics=(), boot=Boot(consoles=("tty0", "ttyS0,115200", "ttyS1"))
    )
    assert plan_adaptation(plain).names == {"names", "selinux"}
    assert not plan_adaptation(machine(system=OperatingSystem(family="windows"))).items


def test_only_some_items() -> None:
    assert plan_adaptation(machine(), only=frozenset({"network", "names"})).names == {"network", "names"}
    assert not plan_adaptation(machine(), only=frozenset({"selinux"})).items
    with pytest.raises(UsageError, match="no-such"):
        plan_adaptation(machine(), only=frozenset({"no-such"}))


def test_stable_names_come_from_recorded_uuids() -> None:
    names = {name.old: name for name in stable_names(machine())}
    assert names["/dev/sda2"].file_system == names["/dev/sda2"].root == f"UUID={ROOT_UUID}"
    assert names["/dev/disk/by-path/pci-0000:00:1f.2-ata-1-part3"].file_system == f"UUID={SWAP_UUID}"
    assert names["/dev/disk/by-id/nvme-MAKER_Y-part1"].file_system == f"UUID={DATA_UUID}"
    assert names["/dev/sda1"].file_system == f"UUID={ESP_UUID}"
    assert names["/dev/sda4"].file_system == f"UUID={LUKS_UUID}"
    assert names["/dev/sda5"].file_system == "PARTUUID=aaaaaaaa-0000-0000-0000-000000000005"
    assert not any(old.startswith("/dev/mapper") for old in names)


def test_a_kernel_without_initramfs_gets_partuuids_for_its_root() -> None:
    names = {name.old: name for name in stable_names(machine(boot=Boot(kernels=(kernel(initramfs=""),))))}
    assert names["/dev/sda2"].root == "PARTUUID=aaaaaaaa-0000-0000-0000-000000000002"
    assert names["/dev/sda2"].file_system == f"UUID={ROOT_UUID}"


def test_the_command_line_keeps_what_the_machine_needs() -> None:
    words = command_line(machine(), extra="EXTRA").split()
    assert words == [f"root=UUID={ROOT_UUID}", "net.ifnames=1", "rd.lvm.lv=vg0/home", "EXTRA"]


@pytest.mark.parametrize(
    ("drivers", "builtin", "expected"),
    [
        (GENERIC, (), Controller.VIRTIO_BLK),
        (("ahci", "sd_mod"), (), Controller.SATA),
        (("ahci",), ("sd_mod",), Controller.SATA),
        (("ahci",), None, Controller.SATA),
        (("ahci",), (), None),
        (("virtio_blk",), (), None),
        (("nvme",), (), Controller.NVME),
        (("mptsas", "sd-mod"), (), Controller.MPTSAS1068),
        (("hpsa", "sd_mod"), (), None),
        (None, None, Controller.SATA),
    ],
)
def test_the_controller_is_one_that_the_initramfs_drives(
    drivers: tuple[str, ...] | None, builtin: tuple[str, ...] | None, expected: Controller | None
) -> None:
    assert choose_controller(kernel(drivers=drivers, builtin=builtin)) is expected


def test_the_running_kernel_is_booted() -> None:
    old, new = kernel("5.10"), kernel("6.1")
    assert adaptation_kernel(machine(boot=Boot(kernels=(old, new), running_kernel="5.10"))) is old
    assert adaptation_kernel(machine(boot=Boot(kernels=(old, new), running_kernel="4.19"))) is new
    with pytest.raises(AdaptationError, match="mkinitcpio"):
        adaptation_kernel(machine(boot=Boot(kernels=(kernel(initramfs_kind="mkinitcpio"),))))


def _entry(path: str, *, active: int = 1) -> bytes:
    name = "debian".encode("utf-16-le") + b"\0\0"
    disk = b"\x04\x01" + (42).to_bytes(2, "little") + bytes(38)
    text = path.encode("utf-16-le") + b"\0\0"
    nodes = disk + b"\x04\x04" + (4 + len(text)).to_bytes(2, "little") + text + b"\x7f\xff\x04\x00"
    return struct.pack("<IH", active, len(nodes)) + name + nodes


def _variables(order: list[int], entries: dict[int, bytes]) -> tuple[EfiVariable, ...]:
    rows = {"BootOrder": struct.pack(f"<{len(order)}H", *order)} | {f"Boot{n:04X}": data for n, data in entries.items()}
    return tuple(EfiVariable(name=name, guid="g", attributes=7, data=data) for name, data in rows.items())


def test_loaders_follow_the_boot_order() -> None:
    entries = {
        0: _entry("\\EFI\\debian\\shimx64.efi"),
        1: _entry("\\EFI\\old\\grubx64.efi"),
        10: _entry("\\EFI\\off\\x.efi", active=0),
    }
    assert loaders(_variables([10, 1, 0, 7], entries)) == ("EFI/old/grubx64.efi", "EFI/debian/shimx64.efi")
    assert loaders(_variables([0], {0: _entry("\\..\\..\\etc\\passwd")})) == ()
    assert loaders(_variables([0], {0: _entry("\\EFI\\..\\x.efi")})) == ()


@given(st.binary(max_size=200))
def test_any_bytes_for_a_boot_entry(data: bytes) -> None:
    loaders(_variables([0], {0: data}))


def test_facts_hold_no_row_that_would_break_a_table() -> None:
    strange = dataclasses.replace(machine().volumes[1], uuid="a\tb\nc")
    tables = facts(machine(volumes=(strange, *machine().volumes[2:])))
    rows = [row.split("\t") for row in tables["names"].splitlines()]
    assert rows and all(len(row) == 3 and all(row) for row in rows)
    assert tables["drivers.6.1.0-1-amd64"].split() == ["none", "ahci", "sd_mod"]
    assert tables["esp"] == ""

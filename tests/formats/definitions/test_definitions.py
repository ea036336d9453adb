"""What every definition has in common: the table, validation, kept files, reading back, and finding disks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.definitions import (
    PLATFORMS,
    DefinedDisk,
    Hardware,
    locate,
    profile_of,
    read,
    render,
    validate,
)
from formats.definitions.text import display_name, file_stem, is_file_name, mac_of
from formats.errors import ImageError, ImageUnsupportedError, UnsafeImageError, UsageError
from formats.machine import Bus, Cpu, Firmware, Machine, Nic, Platform
from tests.formats.definitions.sample import CHOICES, FOLDER, FORMATS, METAL, MODERN, disks_of, sample

# Whatever a host may call itself: quotes, line ends, expansions, entities, controls, other scripts.
LETTERS = "a B.-_/\\'\"`$(){}<>&;|,:=#%*!\n\r\t\0\x1b\u2018\u2019\u201b\u00fc\u4e2d\u2028"
ATTEMPTS = [
    "$(touch owned)",
    "`id`",
    "';exit 7;'",
    '"; rm -rf .',
    "]]>",
    "&xxe;",
    "|22",
    "a\nb = 'c'",
    "%s%n",
    "-rf",
    "..",
]
NAMES = st.text(LETTERS, max_size=30) | st.sampled_from(ATTEMPTS)


@pytest.mark.parametrize("name", CHOICES)
def test_a_definition_is_the_kept_one(name: str) -> None:
    """On purpose different? ``python -m tests.formats.definitions.sample`` writes them anew."""
    definition = sample(name)
    kept = FOLDER / (name + Path(definition.main).suffix)
    assert definition.files[definition.main] == kept.read_bytes().decode("utf-8")
    assert list(definition.files) == [definition.main]
    assert definition.scripts == (
        {definition.main} if name.startswith(("qemu", "proxmox", "virtualbox")) else frozenset()
    )


def test_the_table_fits_together() -> None:
    for name, profile in PLATFORMS.items():
        assert profile.name == name
        assert set(profile.subformats) <= set(profile.formats)
        for firmware in profile.firmwares:
            machine = replace(METAL, firmware=firmware)
            hardware = profile.default_hardware(machine)
            assert hardware.bus in profile.buses
            assert set(profile.format_names(firmware)) <= set(profile.formats)
            kind = profile.format_names(firmware)[0]
            disk = DefinedDisk(file=f"a.{kind}", format=kind, size=1 << 30)
            definition = render(name, machine, [disk], hardware)
            assert definition.main.endswith(profile.suffix)


def test_every_bus_of_every_platform_is_rendered_up_to_its_last_slot() -> None:
    for name, profile in PLATFORMS.items():
        for firmware in profile.firmwares:
            for bus in profile.bus_names(firmware):
                kind = profile.format_names(firmware)[0]
                disks = [DefinedDisk(file=f"d{n}.{kind}", format=kind) for n in range(profile.buses[bus].slots)]
                hardware = Hardware(bus=bus, nic=profile.nics[0], firmware=firmware)
                definition = render(name, replace(METAL, firmware=firmware), disks, hardware)
                assert all(disk.file in definition.files[definition.main] for disk in disks)
                with pytest.raises(ImageUnsupportedError, match="more than"):
                    validate(name, METAL, [*disks, disks[0]], hardware)


VMWARE: dict[str, object] = {"bus": Bus.SCSI, "nic": "e1000"}
HYPERV: dict[str, object] = {"bus": Bus.SCSI, "nic": "synthetic"}


@pytest.mark.parametrize(
    ("platform", "machine", "disk", "hardware", "error"),
    [
        ("amiga", {}, {}, {}, UsageError),
        ("qemu", {}, {}, {"nic": "ne2000"}, UsageError),
        ("qemu", {}, {}, {"bus": Bus.MMC}, UsageError),
        ("qemu", {}, {}, {"controller": "pvscsi"}, UsageError),
        ("qemu", {}, {}, {"secure_boot": True}, UsageError),
        ("qemu", {}, {}, {"firmware": Firmware.UEFI, "nvram": "../vars"}, UsageError),
        ("qemu", {}, {"file": "../a.qcow2"}, {}, UsageError),
        ("qemu", {}, {"file": "/etc/passwd"}, {}, UsageError),
        ("qemu", {}, {"file": "a\nb"}, {}, UsageError),
        ("qemu", {}, {"format": "parallels"}, {}, ImageUnsupportedError),
        ("qemu", {}, {"logical_sector": 4096}, {"bus": Bus.SATA}, ImageUnsupportedError),
        ("qemu", {}, {"logical_sector": 520}, {}, ImageUnsupportedError),
        ("qemu", {"cpu": Cpu(sockets=300)}, {}, {}, ImageUnsupportedError),
        ("qemu", {"cpu": Cpu(architecture="aarch64")}, {}, {}, ImageUnsupportedError),
        ("qemu", {"memory": 8 << 40}, {}, {}, ImageUnsupportedError),
        ("vmware-workstation", {}, {"format": "qcow2"}, VMWARE, ImageUnsupportedError),
        ("vmware-workstation", {}, {"format": "vmdk", "size": 3 << 40}, VMWARE, ImageUnsupportedError),
        ("hyperv", {}, {"format": "vhd"}, HYPERV | {"firmware": Firmware.UEFI}, ImageUnsupportedError),
        ("hyperv", {}, {"format": "vhd"}, HYPERV, UsageError),
        ("hyperv", {}, {"format": "vhd", "size": 2041 << 30}, HYPERV | {"bus": Bus.IDE}, ImageUnsupportedError),
    ],
)
def test_what_a_platform_cannot_take_is_refused(
    platform: str,
    machine: dict[str, object],
    disk: dict[str, object],
    hardware: dict[str, object],
    error: type[Exception],
) -> None:
    defaults: dict[str, object] = {"bus": Bus.VIRTIO, "nic": "virtio-net-pci"}
    with pytest.raises(error) as caught:
        render(
            platform,
            replace(METAL, **machine),  # type: ignore[arg-type]
            [DefinedDisk(**{"file": "a.img", "format": "qcow2", "size": 1 << 30, **disk})],  # type: ignore[arg-type]
            Hardware(**(defaults | hardware)),  # type: ignore[arg-type]
        )
    assert caught.type is error


def test_a_machine_without_disks_is_refused() -> None:
    with pytest.raises(ImageUnsupportedError, match="without disks"):
        validate("qemu", METAL, [], PLATFORMS["qemu"].default_hardware(METAL))


def test_no_platform_of_that_name_names_those_there_are() -> None:
    with pytest.raises(UsageError) as caught:
        profile_of("amiga")
    assert all(name in caught.value.advice for name in PLATFORMS)


READABLE = [name for name in CHOICES if PLATFORMS[CHOICES[name][0]].readable]


@pytest.mark.parametrize("name", READABLE)
def test_what_was_written_is_read_back(tmp_path: Path, name: str) -> None:
    platform, machine, hardware = CHOICES[name]
    definition = sample(name)
    path = tmp_path / definition.main
    path.write_text(definition.files[definition.main], encoding="utf-8")
    parsed = read(path)
    assert parsed.platform == platform
    assert parsed.machine.name == machine.name
    assert parsed.machine.firmware is machine.firmware
    assert parsed.machine.cpu.count == machine.cpu.count
    assert parsed.machine.cpu.sockets == machine.cpu.sockets
    assert 0 <= parsed.machine.memory - machine.memory < PLATFORMS[platform].memory_step
    assert [nic.mac for nic in parsed.machine.nics] == [mac_of(nic.mac) for nic in machine.nics]
    assert parsed.machine.platform.uuid == machine.platform.uuid
    assert [Path(disk.file).name for disk in parsed.disks] == [disk.file for disk in disks_of(platform)]
    assert [disk.format for disk in parsed.disks] == [FORMATS[platform]] * 2
    assert [disk.boot for disk in parsed.disks] == [False, True]
    assert (parsed.hardware.bus, parsed.hardware.nic) == (hardware.bus, hardware.nic)
    assert parsed.hardware.firmware is hardware.firmware
    assert bool(parsed.hardware.secure_boot) == bool(hardware.secure_boot)
    # Rendered again, it is the same machine.
    hardware = replace(parsed.hardware, controller="")
    again = render(platform, parsed.machine, disks_of(platform), hardware, folder="/srv/vm")
    assert len(again.files[again.main]) > 500


@settings(max_examples=60, deadline=None)
@given(words=st.tuples(NAMES, NAMES, NAMES, NAMES, NAMES), readable=st.sampled_from(READABLE))
def test_whatever_a_machine_is_called_it_is_data(
    tmp_path_factory: pytest.TempPathFactory, words: tuple[str, str, str, str, str], readable: str
) -> None:
    name, serial, network, mac, identity = words
    platform, machine, hardware = CHOICES[readable]
    hostile = replace(
        machine,
        name=name,
        nics=(Nic(name=name, mac=mac), Nic(name="x", mac="52:54:00:00:00:01")),
        disks=tuple(replace(disk, serial=serial) for disk in machine.disks),
        platform=Platform(uuid=identity),
    )
    definition = render(platform, hostile, disks_of(platform), replace(hardware, network=network), folder="/srv/$(vm)")
    path = tmp_path_factory.mktemp("d") / definition.main
    path.write_bytes(definition.files[definition.main].encode("utf-8"))
    parsed = read(path)
    assert parsed.machine.name == display_name(name)
    assert [nic.mac for nic in parsed.machine.nics] == [mac_of(mac), "52:54:00:00:00:01"]
    assert [Path(disk.file).name for disk in parsed.disks] == [disk.file for disk in disks_of(platform)]
    assert parsed.hardware.bus is hardware.bus


@given(NAMES)
def test_names_are_made_harmless(name: str) -> None:
    assert is_file_name(file_stem(name))
    assert set(file_stem(name)) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    shown = display_name(name)
    assert shown.strip() == shown != ""
    assert shown.isprintable()
    assert display_name(shown) == shown
    assert len(shown) <= 80


@pytest.mark.parametrize(
    ("mac", "expected"),
    [
        ("52:54:00:A1:00:01", "52:54:00:a1:00:01"),
        ("52-54-00-a1-00-01", "52:54:00:a1:00:01"),
        ("01:00:5e:00:00:01", ""),
        ("00:00:00:00:00:00", ""),
        ("52:54:00:a1:00", ""),
        ("52:54:00:a1:00:01'", ""),
    ],
)
def test_only_addresses_of_cards_are_kept(mac: str, expected: str) -> None:
    assert mac_of(mac) == expected


@settings(max_examples=200, deadline=None)
@given(readable=st.sampled_from(READABLE), data=st.data())
def test_a_damaged_definition_is_refused_or_read_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, readable: str, data: st.DataObject
) -> None:
    definition = sample(readable)
    text = definition.files[definition.main]
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    text = text[:start] + data.draw(st.text("<>&;\"'=|0129aF \n{}[],\u00fc", max_size=10)) + text[end:]
    path = tmp_path_factory.mktemp("d") / definition.main
    path.write_bytes(text.encode("utf-8"))
    try:
        parsed = read(path)
    except ImageError:
        return
    assert parsed.disks


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.ps1", b"", ImageUnsupportedError),
        ("a.xml", b"\xff\xfe\x00", ImageError),
        ("a.xml", b"<domain", ImageError),
        ("a.xml", b"<network/>", ImageError),
        ("a.xml", b"<domain/>", ImageError),
        ("a.xml", b'<!DOCTYPE d [<!ENTITY a "b">]><domain>&a;</domain>', UnsafeImageError),
        ("a.xml", b"<domain><devices><disk><source dev='/dev/sda'/></disk></devices></domain>", ImageUnsupportedError),
        ("a.xml", b" " * (1 << 20) + b"<domain/>", UnsafeImageError),
        ("a.vmx", b"", ImageError),
        ("a.vmx", b'guestOS = "other"\nnot an entry\n', ImageError),
        ("a.vmx", b'guestOS = "other"\n', ImageError),
        ("a.vmx", b'guestOS = "other"\nscsi0:0.fileName = "/dev/sda"\n', ImageUnsupportedError),
        ("a.vmx", b"a" + b" " * 900_000 + b"= x y", ImageError),
        ("a.sh", b"#!/bin/sh\necho hello\n", ImageError),
        ("a.sh", b"#!/bin/sh\n# p2v-definition: {}\n", ImageError),
        ("a.sh", b'#!/bin/sh\n# p2v-definition: {"version":1,"surprise":2}\n', ImageError),
    ],
)
def test_what_is_no_definition_is_refused(tmp_path: Path, name: str, content: bytes, error: type[Exception]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error) as caught:
        read(path)
    assert caught.type is error


def test_a_definition_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        read(tmp_path / "none.xml")


def test_disks_are_found_beside_the_definition_alone(tmp_path: Path) -> None:
    folder = tmp_path / "vm"
    folder.mkdir()
    (folder / "a.qcow2").write_bytes(b"")
    (tmp_path / "secret").write_bytes(b"")
    (folder / "link.qcow2").symlink_to(tmp_path / "secret")
    (folder / "near.qcow2").symlink_to("a.qcow2")

    def found(name: str) -> Path:
        return locate(folder, DefinedDisk(file=name, format="qcow2"))

    assert found("a.qcow2") == folder / "a.qcow2"
    assert found("/moved/from/a.qcow2") == folder / "a.qcow2"
    assert found("near.qcow2") == folder / "near.qcow2"
    for name in ("link.qcow2", "../secret", str(tmp_path / "secret"), "sub/a.qcow2", "missing", "", ".", "..", "/"):
        with pytest.raises(UnsafeImageError):
            found(name)


def test_a_name_of_another_script_survives() -> None:
    for platform in PLATFORMS:
        hardware = PLATFORMS[platform].default_hardware(replace(MODERN, firmware=Firmware.BIOS))
        kind = PLATFORMS[platform].format_names(Firmware.BIOS)[0]
        machine = Machine(name="M\u00fcller \u4e2d\u6587")
        definition = render(platform, machine, [DefinedDisk(file=f"a.{kind}", format=kind)], hardware)
        text = definition.files[definition.main]
        assert "M\u00fcller \u4e2d\u6587" in text
        assert text.startswith("\ufeff") == (platform == "hyperv")


@pytest.mark.parametrize(
    ("platform", "kind", "advice"), [("hyperv", "vhd", "vhdx"), ("virtualbox", "vhd", "vdi"), ("vsphere", "vmdk", "")]
)
def test_too_large_a_disk_is_told_what_the_platform_takes_instead(platform: str, kind: str, advice: str) -> None:
    disk = DefinedDisk(file=f"a.{kind}", format=kind, size=(3 if advice else 63) << 40)
    with pytest.raises(ImageUnsupportedError, match="larger than") as caught:
        validate(platform, METAL, [disk], PLATFORMS[platform].default_hardware(METAL))
    assert caught.value.advice == (f"use {advice}" if advice else "")

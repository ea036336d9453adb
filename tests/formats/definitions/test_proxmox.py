"""The script for Proxmox VE, run by a shell in which `qm` and `pvesh` note what they are asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from formats.definitions import DefinedDisk, Hardware, render
from formats.errors import UsageError
from formats.machine import Bus
from tests.formats.definitions.program import asked_of
from tests.formats.definitions.sample import METAL, MODERN, disks_of
from tests.formats.definitions.test_definitions import NAMES

PROGRAMS = {"pvesh": "#!/bin/sh\necho 123\n"}


def commands(
    folder: Path, text: str, disks: list[DefinedDisk], *words: str, fail: str = "", code: int = 0
) -> list[list[str]]:
    """What the script asks of qm."""
    return asked_of("qm", folder, text, disks, *words, fail=fail, code=code, programs=PROGRAMS)


def test_it_makes_the_machine(tmp_path: Path) -> None:
    disks = disks_of("proxmox")
    hardware = Hardware(bus=Bus.VIRTIO_SCSI, nic="virtio", firmware=MODERN.firmware)
    definition = render("proxmox", MODERN, disks, hardware)
    create, efi, boot_disk, data_disk, order = commands(tmp_path, definition.files[definition.main], disks)
    assert create[:4] == ["qm", "create", "123", "--name"]
    options = dict(zip(create[3::2], create[4::2], strict=True))
    assert options["--name"] == "B-ro-Server-alt"
    assert options["--description"] == "B\u00fcro-Server (alt)"
    assert (options["--bios"], options["--machine"], options["--memory"]) == ("ovmf", "q35", "16384")
    assert options["--net0"] == "virtio=3C:EC:EF:00:11:22,bridge=vmbr0"
    assert efi[3:] == ["--efidisk0", "local-lvm:1,efitype=4m,pre-enrolled-keys=0"]
    place = tmp_path / "a folder"
    assert boot_disk[3:] == ["--scsi0", f"local-lvm:0,import-from={place}/metal1.qcow2,discard=on,serial=P2VSRC0001"]
    assert data_disk[3:] == ["--scsi1", f"local-lvm:0,import-from={place}/metal1-data.qcow2,discard=on"]
    assert order[3:] == ["--boot", "order=scsi0"]


def test_id_and_storage_can_be_given_and_half_a_machine_is_removed(tmp_path: Path) -> None:
    disks = disks_of("proxmox")
    definition = render("proxmox", METAL, disks, Hardware(bus=Bus.SATA, nic="e1000"))
    text = definition.files[definition.main]
    asked = commands(tmp_path, text, disks, "900", "tank")
    assert asked[0][2] == "900" and "tank:0,import-from=" in asked[1][4]
    assert asked[-1] == ["qm", "set", "900", "--boot", "order=sata0"]
    failed = commands(tmp_path, text, disks, fail="set", code=1)
    assert failed[-1] == ["qm", "destroy", "123", "--purge"]
    assert len(commands(tmp_path, text, disks, fail="create", code=1)) == 1  # what is there under this id stays


def test_a_missing_disk_is_said_before_anything_is_made(tmp_path: Path) -> None:
    definition = render("proxmox", METAL, disks_of("proxmox"), Hardware(bus=Bus.SATA, nic="e1000"))
    assert commands(tmp_path, definition.files[definition.main], [], code=1) == []


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, network=NAMES)
@pytest.mark.parametrize("suffix", ["", "}", "'}`id`"])
def test_names_are_data_and_never_syntax(tmp_path: Path, suffix: str, name: str, network: str) -> None:
    disks = disks_of("proxmox")
    hardware = Hardware(bus=Bus.SATA, nic="e1000", network=network + suffix)
    definition = render("proxmox", replace(METAL, name=name + suffix), disks, hardware)
    asked = commands(tmp_path, definition.files[definition.main], disks)
    assert [words[1] for words in asked] == ["create", "set", "set", "set"]
    card = asked[0][asked[0].index("--net0") + 1]
    assert card.count(",") == 1 and card.startswith("e1000=52:54:00:A1:00:01,bridge=")


def test_a_disk_that_qm_cannot_name() -> None:
    disk = DefinedDisk(file="a,b.qcow2", format="qcow2")
    with pytest.raises(UsageError, match="comma"):
        render("proxmox", METAL, [disk], Hardware(bus=Bus.SATA, nic="e1000"))

"""The script for VirtualBox, run by a shell in which `VBoxManage` notes what it is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from formats.definitions import DefinedDisk, Hardware, render
from formats.machine import Bus
from tests.formats.definitions.program import asked_of
from tests.formats.definitions.sample import METAL, MODERN, disks_of
from tests.formats.definitions.test_definitions import NAMES

BIOS = Hardware(bus=Bus.IDE, nic="e1000")


def commands(
    folder: Path, text: str, disks: list[DefinedDisk], *words: str, fail: str = "", code: int = 0
) -> list[list[str]]:
    """What the script asks of VBoxManage."""
    return asked_of("VBoxManage", folder, text, disks, *words, fail=fail, code=code)


def test_it_makes_the_machine(tmp_path: Path) -> None:
    disks = disks_of("virtualbox")
    hardware = Hardware(bus=Bus.SATA, nic="virtio", firmware=MODERN.firmware, network="my lan")
    definition = render("virtualbox", MODERN, disks, hardware)
    create, modify, card, controller, boot_disk, data_disk = commands(
        tmp_path, definition.files[definition.main], disks
    )
    name = "B\u00fcro-Server (alt)"
    assert create[1:] == ["createvm", "--name", name, "--ostype", "Linux_64", "--register"]
    assert modify[2] == name and modify[modify.index("--firmware") + 1] == "efi"
    assert card[3:] == [
        "--nic1",
        "bridged",
        "--nictype1",
        "virtio",
        "--bridgeadapter1",
        "my lan",
        "--macaddress1",
        "3CECEF001122",
    ]
    assert controller[3:] == [
        "--name",
        "disks",
        "--add",
        "sata",
        "--controller",
        "IntelAhci",
        "--portcount",
        "2",
        "--bootable",
        "on",
    ]
    assert boot_disk[-1] == str(tmp_path / "a folder" / "metal1.vdi") and boot_disk[6:10] == [
        "0",
        "--device",
        "0",
        "--type",
    ]
    assert data_disk[-1] == str(tmp_path / "a folder" / "metal1-data.vdi")


def test_ide_has_two_disks_a_port(tmp_path: Path) -> None:
    disks = [DefinedDisk(file=f"d{n}.vdi", format="vdi") for n in range(4)]
    definition = render("virtualbox", METAL, disks, BIOS)
    asked = commands(tmp_path, definition.files[definition.main], disks, "another name")
    places = [(words[6], words[8]) for words in asked if words[1] == "storageattach"]
    assert places == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert {words[2] for words in asked if words[1] != "createvm"} == {"another name"}


def test_half_a_machine_is_unregistered_and_its_disks_stay(tmp_path: Path) -> None:
    disks = disks_of("virtualbox")
    definition = render("virtualbox", METAL, disks, BIOS)
    text = definition.files[definition.main]
    failed = commands(tmp_path, text, disks, fail="storageattach", code=1)
    assert failed[-1] == ["VBoxManage", "unregistervm", "metal1"]  # with --delete the disks would go too
    assert len(commands(tmp_path, text, disks, fail="createvm", code=1)) == 1
    for disk in disks:
        (tmp_path / "a folder" / disk.file).unlink()
    assert commands(tmp_path, text, [], code=1) == []


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, network=NAMES)
@pytest.mark.parametrize("suffix", ["", "}", "'}`id`"])
def test_names_are_data_and_never_syntax(tmp_path: Path, suffix: str, name: str, network: str) -> None:
    disks = disks_of("virtualbox")
    hardware = replace(BIOS, network=network + suffix)
    definition = render("virtualbox", replace(METAL, name=name + suffix), disks, hardware)
    asked = commands(tmp_path, definition.files[definition.main], disks)
    cards = ["modifyvm"] * len(METAL.nics)
    assert [words[1] for words in asked] == [
        "createvm",
        "modifyvm",
        *cards,
        "storagectl",
        "storageattach",
        "storageattach",
    ]

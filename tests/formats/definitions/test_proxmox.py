"""The script for Proxmox VE, run by a shell in which `qm` and `pvesh` note what they are asked for."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from formats.definitions import DefinedDisk, Hardware, render
from formats.errors import UsageError
from formats.machine import Bus
from tests.formats.definitions.sample import METAL, MODERN, disks_of
from tests.formats.definitions.test_definitions import NAMES

QM = """#!/bin/sh
for word in qm "$@"; do printf '%s\\0' "$word"; done >>"$LOG"; printf '\\n' >>"$LOG"
case "$FAIL" in "$1") exit 1;; esac
"""


def commands(
    folder: Path, text: str, disks: list[DefinedDisk], *words: str, fail: str = "", code: int = 0
) -> list[list[str]]:
    """What the script asks of qm."""
    programs, place = folder / "bin", folder / "a folder"
    for made in (programs, place):
        made.mkdir(exist_ok=True)
    for name, content in (("qm", QM), ("pvesh", "#!/bin/sh\necho 123\n")):
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    for disk in disks:
        (place / disk.file).touch()
    (place / "machine.sh").write_text(text)
    log = folder / "log"
    log.write_bytes(b"")
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "LOG": str(log), "FAIL": fail}
    ran = subprocess.run(
        ["sh", place / "machine.sh", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == code, ran.stderr
    return [line.decode().rstrip("\0").split("\0") for line in log.read_bytes().split(b"\0\n") if line]


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
def test_names_are_data_and_never_syntax(tmp_path: Path, name: str, network: str) -> None:
    disks = disks_of("proxmox")
    hardware = Hardware(bus=Bus.SATA, nic="e1000", network=network)
    definition = render("proxmox", replace(METAL, name=name), disks, hardware)
    asked = commands(tmp_path, definition.files[definition.main], disks)
    assert [words[1] for words in asked] == ["create", "set", "set", "set"]


def test_a_disk_that_qm_cannot_name() -> None:
    disk = DefinedDisk(file="a,b.qcow2", format="qcow2")
    with pytest.raises(UsageError, match="comma"):
        render("proxmox", METAL, [disk], Hardware(bus=Bus.SATA, nic="e1000"))

"""A machine that is restored to run beside its original."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from backup.clone import cloned, shared_identity
from formats.machine import Machine, Nic, OperatingSystem, Platform
from tests.backup.shell import Shell

ORIGINAL = Machine(
    name="web.example.org",
    nics=(
        Nic(name="eth0", mac="00:11:22:33:44:55", addresses=("192.0.2.7/24",), dhcp=False),
        Nic(name="eth1", mac="00:11:22:33:44:56", addresses=("198.51.100.9/24",), dhcp=True),
        Nic(name="eth2", mac=""),
    ),
    system=OperatingSystem(family="linux"),
    platform=Platform(vendor="Example", uuid="00000000-0000-0000-0000-00000000000a", serial="X1"),
)


def test_a_clone_is_another_machine() -> None:
    one, other = cloned(ORIGINAL), cloned(ORIGINAL)
    assert one.name == "web-clone.example.org"
    assert one.platform == Platform(vendor="Example")
    macs = [nic.mac for machine in (ORIGINAL, one, other) for nic in machine.nics if nic.mac]
    assert len(set(macs)) == len(macs) == 6
    assert all(nic.mac.startswith("52:54:00:") for nic in one.nics[:2])
    assert one.nics[2].mac == ""
    assert [replace(nic, mac="") for nic in one.nics] == [replace(nic, mac="") for nic in ORIGINAL.nics]


@pytest.mark.parametrize(
    ("machine", "codes"),
    [
        (ORIGINAL, ["clone-address", "clone-identity", "clone-uuids"]),
        (replace(ORIGINAL, nics=ORIGINAL.nics[1:]), ["clone-identity", "clone-uuids"]),
        (replace(ORIGINAL, nics=(), system=OperatingSystem(family="windows")), ["clone-identity", "clone-uuids"]),
        (replace(ORIGINAL, nics=(), system=OperatingSystem()), ["clone-uuids"]),
    ],
)
def test_what_both_still_share_is_said(machine: Machine, codes: list[str]) -> None:
    notices = list(shared_identity(machine))
    assert [notice.code for notice in notices] == codes
    assert all(notice.advice for notice in notices)
    assert "198.51.100.9" not in str(notices)  # DHCP gives a clone another one


def test_on_the_command_line(tmp_path: Path) -> None:
    shell, image, folder = Shell(tmp_path), tmp_path / "web.raw", tmp_path / "vm"
    shell("init")
    image.write_bytes(bytes(range(256)) * 4096)
    shell("backup", str(image))
    done = shell("restore", "latest", "--to", "libvirt", "-o", str(folder), "--as-clone", expect=3)
    assert [notice["code"] for notice in done["notices"]][-1] == "clone-uuids"
    assert (folder / "web-clone.xml").exists()
    assert json.loads((folder / "machine.json").read_text())["machine"]["name"] == "web-clone"
    shell("restore", "latest", "--disk", "0", "--device", str(tmp_path / "out"), "--as-clone", expect=2)

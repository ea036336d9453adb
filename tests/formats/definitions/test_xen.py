"""xl's configuration: its syntax is near enough to Python's that Python reads it."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

from hypothesis import given

from formats.definitions import DefinedDisk, Hardware, render
from formats.machine import Bus
from tests.formats.definitions.sample import METAL, MODERN, disks_of
from tests.formats.definitions.test_definitions import NAMES


def read(text: str) -> dict[str, Any]:
    """The assignments of a configuration."""
    found = {}
    for node in ast.parse(text).body:
        assert isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def test_a_machine() -> None:
    hardware = Hardware(bus=Bus.XEN, nic="rtl8139", firmware=MODERN.firmware, network="br0")
    definition = render("xen", MODERN, disks_of("xen"), hardware, folder="/srv/vm")
    found = read(definition.files[definition.main])
    assert (found["name"], found["type"], found["firmware"], found["memory"]) == (
        "B\u00fcro-Server (alt)",
        "hvm",
        "uefi",
        16384,
    )
    assert found["disk"][0] == "format=qcow2, vdev=xvda, access=rw, target=/srv/vm/metal1.qcow2"  # the boot disk
    assert found["vif"] == ["mac=3c:ec:ef:00:11:22,bridge=br0,model=rtl8139"]
    assert found["localtime"] == 1


@given(name=NAMES, network=NAMES, file=NAMES)
def test_names_are_data_and_never_syntax(name: str, network: str, file: str) -> None:
    disk = DefinedDisk(file="a.qcow2", format="qcow2")
    hardware = Hardware(bus=Bus.XEN, nic="e1000", network=network)
    definition = render("xen", replace(METAL, name=name), [disk], hardware, folder=f"/srv/{file}")
    found = read(definition.files[definition.main])
    assert found["disk"][0].startswith("format=qcow2, vdev=xvda, access=rw, target=/srv/")
    assert [part.count(",") for part in found["vif"]] == [2, 1]

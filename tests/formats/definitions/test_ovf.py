"""The OVF descriptor, held to the rules of DSP0243 that importers insist on."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from hypothesis import given

from formats.definitions import DefinedDisk, Hardware, render
from formats.machine import Bus, Machine
from tests.formats.definitions.sample import CHOICES, FOLDER, METAL
from tests.formats.definitions.test_definitions import NAMES

OVF = "{http://schemas.dmtf.org/ovf/envelope/1}"
RASD = "{http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData}"
# The order in which CIM_ResourceAllocationSettingData has its properties: of the alphabet.
PROPERTIES = (
    *("Address", "AddressOnParent", "AllocationUnits", "AutomaticAllocation", "AutomaticDeallocation", "Caption"),
    *("Connection", "ConsumerVisibility", "Description", "ElementName", "HostResource", "InstanceID", "Limit"),
    *("MappingBehavior", "OtherResourceType", "Parent", "PoolID", "Reservation", "ResourceSubType", "ResourceType"),
    *("VirtualQuantity", "Weight"),
)


def items(text: str) -> list[dict[str, str]]:
    """The hardware items, each as a mapping; the order of their properties is looked at."""
    found = []
    for item in ET.fromstring(text).iter(f"{OVF}Item"):
        names = [element.tag.removeprefix(RASD) for element in item]
        assert names == sorted(names, key=PROPERTIES.index)
        assert {"ElementName", "InstanceID", "ResourceType"} <= set(names)
        found.append({name: element.text or "" for name, element in zip(names, item, strict=True)})
    return found


def descriptor(machine: Machine, disks: int, hardware: Hardware) -> str:
    named = [DefinedDisk(file=f"d{n}.vmdk", format="vmdk", size=(n + 1) << 30) for n in range(disks)]
    definition = render("vsphere", machine, named, hardware)
    return definition.files[definition.main]


@pytest.mark.parametrize("name", [name for name in CHOICES if name.startswith("vsphere")])
def test_the_kept_descriptors_keep_the_rules(name: str) -> None:
    root = ET.parse(FOLDER / f"{name}.ovf").getroot()
    files = {file.get(f"{OVF}id"): file.get(f"{OVF}href") for file in root.iter(f"{OVF}File")}
    disks = {disk.get(f"{OVF}diskId"): disk for disk in root.iter(f"{OVF}Disk")}
    assert {disk.get(f"{OVF}fileRef") for disk in disks.values()} == set(files)
    assert all((disk.get(f"{OVF}format") or "").endswith("#streamOptimized") for disk in disks.values())
    found = items((FOLDER / f"{name}.ovf").read_text())
    identities = [item["InstanceID"] for item in found]
    assert len(set(identities)) == len(identities)
    kinds = {item["InstanceID"]: item["ResourceType"] for item in found}
    networks = {network.get(f"{OVF}name") for network in root.iter(f"{OVF}Network")}
    for item in found:
        if item["ResourceType"] == "17":
            assert item["HostResource"].removeprefix("ovf:/disk/") in disks
            assert kinds[item["Parent"]] in {"5", "6", "20"}
        if item["ResourceType"] == "10":
            assert item["Connection"] in networks
    order = [element.tag.removeprefix(OVF) for element in root]
    assert order == ["References", "DiskSection", "NetworkSection", "VirtualSystem"]


@pytest.mark.parametrize(
    ("bus", "disks", "controllers"),
    [(Bus.SCSI, 16, 2), (Bus.SCSI, 15, 1), (Bus.SATA, 31, 2), (Bus.IDE, 4, 2), (Bus.NVME, 16, 2)],
)
def test_every_disk_has_a_place_of_its_own(bus: Bus, disks: int, controllers: int) -> None:
    found = items(descriptor(METAL, disks, Hardware(bus=bus, nic="e1000")))
    places = [(item["Parent"], item["AddressOnParent"]) for item in found if item["ResourceType"] == "17"]
    assert len(set(places)) == disks
    assert len({parent for parent, _ in places}) == controllers
    if bus is Bus.SCSI:
        assert "7" not in {address for _, address in places}  # the controller's own


def test_a_machine_without_network() -> None:
    text = descriptor(replace(METAL, nics=()), 1, Hardware(bus=Bus.SCSI, nic="vmxnet3"))
    assert "NetworkSection" not in text and not [item for item in items(text) if item["ResourceType"] == "10"]


@given(name=NAMES, network=NAMES)
def test_names_are_data_and_never_syntax(name: str, network: str) -> None:
    root = ET.fromstring(descriptor(replace(METAL, name=name), 1, Hardware(bus=Bus.SCSI, nic="e1000", network=network)))
    assert len(list(root.iter(f"{OVF}Item"))) == 6

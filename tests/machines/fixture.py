"""Session fixtures of the real machines; `tests/conftest.py` makes them known to all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.machines.builder import BuiltMachine, build
from tests.machines.physical import PhysicalMachine
from tests.machines.recipe import BIOS_LVM, BIOS_LVM_FULL, BIOS_PLAIN, UEFI_DRACUT, Recipe
from tests.requirement import missing

BUILD_PROGRAMS = ("mmdebstrap", "mke2fs", "sfdisk", "qemu-system-x86_64", "qemu-img", "ssh", "ssh-keygen", "setpriv")
"""What building and booting a machine takes; a test that uses a fixture from here is skipped when one is missing."""


def _built(recipe: Recipe) -> BuiltMachine:
    absent = missing(*BUILD_PROGRAMS)
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}")
    return build(recipe)


@pytest.fixture(scope="session")
def bios_lvm_disk() -> BuiltMachine:
    """The machine `bios-lvm`: BIOS, MBR, GRUB, /boot, LVM with free extents. Built on first use; do not write to it."""
    return _built(BIOS_LVM)


@pytest.fixture(scope="session")
def bios_lvm_full_disk() -> BuiltMachine:
    """The machine `bios-lvm-full`: the same without free extents."""
    return _built(BIOS_LVM_FULL)


@pytest.fixture(scope="session")
def bios_plain_disk() -> BuiltMachine:
    """The machine `bios-plain`: one ext4 root and a swap partition, no LVM."""
    return _built(BIOS_PLAIN)


@pytest.fixture(scope="session")
def uefi_dracut_disk() -> BuiltMachine:
    """The machine `uefi-dracut`: UEFI without a fallback loader, host-only initramfs, XFS on LVM, a data disk, static address."""
    return _built(UEFI_DRACUT)


@pytest.fixture(scope="session")
def physical_bios_lvm(bios_lvm_disk: BuiltMachine) -> Iterator[PhysicalMachine]:
    """The machine `bios-lvm`, running. Shared by the session: leave it as it was found, and running."""
    with PhysicalMachine(bios_lvm_disk) as physical:
        yield physical


@pytest.fixture(scope="session")
def physical_uefi_dracut(uefi_dracut_disk: BuiltMachine) -> Iterator[PhysicalMachine]:
    """The machine `uefi-dracut`, running. Shared by the session: leave it as it was found, and running."""
    with PhysicalMachine(uefi_dracut_disk) as physical:
        yield physical

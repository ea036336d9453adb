"""Which failures are worth another try."""

from __future__ import annotations

import pytest

from p2v.adapt import ITEMS
from p2v.adapt.repair import _CURES, Repair, repair_of
from p2v.prove import LACKS_DRIVER
from p2v.target.failures import FAILURES


def test_every_cure_belongs_to_a_failure_class_and_an_item() -> None:
    assert set(_CURES) <= {failure.code for failure in FAILURES} | {LACKS_DRIVER}
    assert set().union(*_CURES.values()) <= set(ITEMS)


def test_an_initramfs_that_still_lacks_something_is_made_anew() -> None:
    repair = repair_of(["root-device-missing", "initramfs-shell"], ITEMS)
    assert repair == Repair(items=frozenset({"initramfs", "names", "lvm-devices"}), rebuild=True)


def test_items_that_were_left_out_are_done_first() -> None:
    assert repair_of(["uefi-shell"], ["names"]) == Repair(items=frozenset({"efi-fallback"}), rebuild=False)


@pytest.mark.parametrize("failures", [[], ["reboot-loop"], ["grub-kernel-missing"], ["uefi-shell"], ["emergency-mode"]])
def test_nothing_is_tried_without_a_known_cure(failures: list[str]) -> None:
    assert repair_of(failures, ITEMS) is None

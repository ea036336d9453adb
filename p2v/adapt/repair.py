"""Which failure of a boot has a fix that the adaptation can make: one more try on the overlay, and what was tried is told."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

_INITRAMFS = frozenset({"initramfs", "names", "lvm-devices"})
_LOADER = frozenset({"efi-fallback"})
_MOUNTS = frozenset({"names"})

# Findings of a boot (p2v.target.failures, p2v.prove), by code, and the items that cure them.
_CURES = {
    "root-device-missing": _INITRAMFS,
    "volume-group-missing": _INITRAMFS,
    "initramfs-shell": _INITRAMFS,
    "dracut-shell": _INITRAMFS,
    "root-mount-failed": _INITRAMFS,
    "initramfs-lacks-driver": _INITRAMFS,
    "initramfs-damaged": _INITRAMFS,
    "no-bootable-device": _LOADER,
    "uefi-shell": _LOADER,
    "uefi-boot-entry-failed": _LOADER,
    "mount-failed": _MOUNTS,
    "emergency-mode": _MOUNTS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """One more adaptation: ``items`` by name; ``rebuild`` has every initramfs made anew by the distribution's own tool."""

    items: frozenset[str]
    rebuild: bool


def repair_of(failures: Collection[str], done: Collection[str]) -> Repair | None:
    """What to try after a boot that failed with these codes, when the items ``done`` were adapted before it; None for no known cure.

    An initramfs that was seen to lack something, although drivers were appended to it, is made anew.
    """
    cures = frozenset[str]().union(*(_CURES.get(code, frozenset()) for code in failures))
    rebuild = "initramfs" in cures and "initramfs" in done
    missing = cures - frozenset(done)
    if not missing and not rebuild:
        return None
    return Repair(items=missing | (_INITRAMFS & cures), rebuild=rebuild)

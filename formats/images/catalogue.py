"""The disk formats the toolkit writes: what QEMU calls them, and how large a disk each can hold.

Limits: VHD 2040 GiB (Microsoft, IVMVirtualPC); VHDX 64 TiB ([MS-VHDX]); hosted sparse VMDK 2 TiB (32-bit sector pointers);
streamOptimized VMDK 62 TiB (ESXi's largest disk); VDI 2^30 - 1 blocks of 1 MiB (QEMU block/vdi.c).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from formats.errors import ImageUnsupportedError, UsageError

_GIB, _TIB = 1 << 30, 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Subformat:
    """One way a format lays out a disk.

    ``limit`` is the largest disk in bytes and ``alternative`` what to take beyond it. ``options`` are qemu-img's creation options.
    ``sequential`` formats take ascending writes, each range once.
    """

    name: str
    limit: int
    alternative: str
    options: Mapping[str, str] = field(default_factory=dict)
    sequential: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFormat:
    """A disk format: ``name`` for people, ``driver`` as QEMU calls it; the first subformat is the default.

    ``sector``: a disk's size is rounded up to a multiple of this many bytes.
    """

    name: str
    driver: str
    suffix: str
    subformats: tuple[Subformat, ...]
    sector: int = 512

    def subformat(self, name: str = "") -> Subformat:
        """The subformat called ``name``, or the default; ``UsageError`` when there is none of that name."""
        for candidate in self.subformats:
            if name in ("", candidate.name):
                return candidate
        known = ", ".join(candidate.name for candidate in self.subformats)
        raise UsageError(f"{self.name} has no subformat {name!r}", advice=f"it has: {known}")


_VMDK = {"adapter_type": "lsilogic", "hwversion": "14", "toolsversion": "2147483647"}
_VMDK_BEYOND = "qcow2 or VHDX, or VMDK streamOptimized for import into vSphere"

FORMATS: Mapping[str, ImageFormat] = {
    "raw": ImageFormat(
        name="raw",
        driver="raw",
        suffix=".raw",
        sector=1,
        subformats=(Subformat(name="sparse", limit=1 << 62, alternative=""),),
    ),
    "qcow2": ImageFormat(
        name="qcow2",
        driver="qcow2",
        suffix=".qcow2",
        subformats=(
            Subformat(name="compat=1.1", limit=1 << 50, alternative="raw", options={"compat": "1.1"}),
            Subformat(name="compat=0.10", limit=1 << 50, alternative="raw", options={"compat": "0.10"}),
        ),
    ),
    "vhd": ImageFormat(
        name="vhd",
        driver="vpc",
        suffix=".vhd",
        subformats=(
            # force_size: without it QEMU enlarges the disk to the next cylinder, and the backup GPT is not at its end.
            Subformat(
                name="dynamic",
                limit=2040 * _GIB,
                alternative="VHDX",
                options={"subformat": "dynamic", "force_size": "on"},
            ),
            Subformat(
                name="fixed", limit=2040 * _GIB, alternative="VHDX", options={"subformat": "fixed", "force_size": "on"}
            ),
        ),
    ),
    "vhdx": ImageFormat(
        name="vhdx",
        driver="vhdx",
        suffix=".vhdx",
        subformats=(
            # QEMU's "fixed" is none: it reserves the room and then stores what is written behind it (7.2).
            Subformat(name="dynamic", limit=64 * _TIB, alternative="qcow2 or raw", options={"subformat": "dynamic"}),
        ),
    ),
    "vmdk": ImageFormat(
        name="vmdk",
        driver="vmdk",
        suffix=".vmdk",
        subformats=(
            Subformat(
                name="monolithicSparse",
                limit=2 * _TIB,
                alternative=_VMDK_BEYOND,
                options={"subformat": "monolithicSparse", **_VMDK},
            ),
            Subformat(name="streamOptimized", limit=62 * _TIB, alternative="qcow2 or raw", sequential=True),
            Subformat(
                name="monolithicFlat",
                limit=62 * _TIB,
                alternative="qcow2 or raw",
                options={"subformat": "monolithicFlat", **_VMDK},
            ),
            Subformat(
                name="twoGbMaxExtentSparse",
                limit=2 * _TIB,
                alternative=_VMDK_BEYOND,
                options={"subformat": "twoGbMaxExtentSparse", **_VMDK},
            ),
        ),
    ),
    "vdi": ImageFormat(
        name="vdi",
        driver="vdi",
        suffix=".vdi",
        subformats=(
            Subformat(name="dynamic", limit=0x3FFFFFFF << 20, alternative="qcow2 or raw"),
            Subformat(name="static", limit=0x3FFFFFFF << 20, alternative="qcow2 or raw", options={"static": "on"}),
        ),
    ),
    "parallels": ImageFormat(
        name="parallels",
        driver="parallels",
        suffix=".hds",
        subformats=(Subformat(name="expanding", limit=64 * _TIB, alternative="qcow2 or raw"),),
    ),
}
"""Every format that can be written, by the name a person gives it."""


def image_format(name: str) -> ImageFormat:
    """The format called ``name``; ``UsageError`` when there is none."""
    try:
        return FORMATS[name]
    except KeyError:
        raise UsageError(f"there is no disk format {name!r}", advice=f"the formats are: {', '.join(FORMATS)}") from None


def image_size(name: str, size: int, subformat: str = "") -> int:
    """Bytes of the virtual disk that an image for ``size`` bytes will have: rounded up to the format's sectors.

    ``ImageUnsupportedError`` names the alternative when the format cannot hold it: ask before a byte is written.
    """
    chosen = image_format(name)
    layout = chosen.subformat(subformat)
    rounded = -(-size // chosen.sector) * chosen.sector
    if rounded > layout.limit:
        raise ImageUnsupportedError(
            f"a disk of {size} bytes is too large for {chosen.name} ({layout.name}): the limit is {layout.limit} bytes",
            advice=f"take {layout.alternative}" if layout.alternative else "",
        )
    return rounded

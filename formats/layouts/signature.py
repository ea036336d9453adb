"""Which kinds of content a volume shows signs of.

A used-blocks map is made only when a volume shows the sign of *one* kind: an ext superblock that survived below a RAID
member, a LUKS container or a later file system would make blocks look free that are not.

Facts: the magic numbers and places of libblkid, from each format's own description.
"""

from __future__ import annotations

from formats.block import BlockSource

_HEAD = 68 * 1024
_TAIL = 132 * 1024
_PAGES = (4096, 8192, 16384, 32768, 65536)
SWAP_SIGNATURES = (b"SWAPSPACE2", b"SWAP-SPACE")
HIBERNATION_SIGNATURES = (b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001", b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c")

# kind: (offset, magic)
_MAGICS: tuple[tuple[str, int, bytes], ...] = (
    ("ext", 0x438, b"\x53\xef"),
    ("xfs", 0, b"XFSB"),
    ("btrfs", 0x10040, b"_BHRfS_M"),
    ("crypto_LUKS", 0, b"LUKS\xba\xbe"),
    ("crypto_LUKS", 0, b"SKUL\xba\xbe"),
    ("BitLocker", 3, b"-FVE-FS-"),
    ("ntfs", 3, b"NTFS    "),
    ("exfat", 3, b"EXFAT   "),
    ("vfat", 0x36, b"FAT12   "),
    ("vfat", 0x36, b"FAT16   "),
    ("vfat", 0x52, b"FAT32   "),
    ("f2fs", 0x400, b"\x10\x20\xf5\xf2"),
    ("nilfs2", 0x406, b"\x34\x34"),
    ("jfs", 0x8000, b"JFS1"),
    ("reiserfs", 0x10034, b"ReIsEr"),
    ("reiserfs", 0x2034, b"ReIsEr"),
    ("reiser4", 0x10000, b"ReIsEr4"),
    ("ocfs2", 0x1000, b"OCFSV2"),
    ("gfs2", 0x10000, b"\x01\x16\x19\x70"),
    ("squashfs", 0, b"hsqs"),
    ("erofs", 0x400, b"\xe2\xe1\xf5\xe0"),
    ("iso9660", 0x8001, b"CD001"),
    ("linux_raid_member", 0, b"\xfc\x4e\x2b\xa9"),  # metadata 1.1
    ("linux_raid_member", 0x1000, b"\xfc\x4e\x2b\xa9"),  # metadata 1.2
    ("bcache", 0x1018, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    ("bcachefs", 0x1018, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"),
    ("vdo", 0, b"dmvdo001"),
    ("integrity", 0, b"integrt\0"),
    ("snapshot_cow", 0, b"SnAp"),
    ("stratis", 0x204, b"!Stra0tis\x86\xff\x02^\x41rh"),
    ("ubifs", 0, b"\x31\x18\x10\x06"),
)
_LVM_LABEL = b"LABELONE"
_MD_MAGIC = b"\xfc\x4e\x2b\xa9"
_ZFS_UBERBLOCK = (b"\x0c\xb1\xba\x00\x00\x00\x00\x00", b"\x00\x00\x00\x00\x00\xba\xb1\x0c")


def signatures(source: BlockSource) -> frozenset[str]:
    """The kinds of content that the volume shows signs of, in libblkid's words (``ext`` stands for ext2, ext3 and
    ext4).

    Two reads: 68 KiB at the start and 132 KiB at the end.
    """
    head = _read(source, 0, min(_HEAD, source.size))
    found = {kind for kind, offset, magic in _MAGICS if head[offset : offset + len(magic)] == magic}
    if any(head[512 * n : 512 * n + 8] == _LVM_LABEL for n in range(4)):
        found.add("LVM2_member")
    for page in _PAGES:
        end = head[page - 10 : page]
        if end in SWAP_SIGNATURES:
            found.add("swap")
        elif any(end.startswith(magic) for magic in HIBERNATION_SIGNATURES):
            found.add("swsuspend")
    return frozenset(found | _at_the_end(source))


def _at_the_end(source: BlockSource) -> set[str]:
    """Kinds that keep their description behind the data: software and firmware RAID, DRBD, ZFS."""
    size = source.size
    start = max(0, size - _TAIL) & ~511
    tail = _read(source, start, size - start)

    def at(offset: int, magic: bytes) -> bool:
        return offset >= start and tail[offset - start : offset - start + len(magic)] == magic

    found = set()
    if at((size & ~0xFFFF) - 0x10000, _MD_MAGIC) or at((size - 0x2000) & ~0xFFF, _MD_MAGIC):
        found.add("linux_raid_member")  # metadata 0.90, 1.0
    if b"Intel Raid ISM Cfg Sig. " in tail:
        found.add("isw_raid_member")
    if at(size - 512, b"\xde\x11\xde\x11") or at(size - 512, b"\x11\xde\x11\xde"):
        found.add("ddf_raid_member")
    if at((size & ~0xFFF) - 4096 + 0x3C, b"\x83\x74\x02\x6b") or at((size & ~0xFFF) - 4096 + 0x3C, b"\x83\x74\x02\x67"):
        found.add("drbd")
    # ZFS keeps 256-KiB labels at both ends; the uberblocks of the last label fill the last 128 KiB.
    if any(tail[position : position + 8] in _ZFS_UBERBLOCK for position in range(0, len(tail), 1024)):
        found.add("zfs_member")
    return found


def _read(source: BlockSource, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    if length:
        source.readinto(memoryview(buffer), offset)
    return bytes(buffer)

"""The initramfs lister, run by this computer's Python on images made here."""

from __future__ import annotations

import gzip
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from p2v.collect import initramfs
from p2v.collect.initramfs import Image


def entry(name: str, data: bytes = b"") -> bytes:
    """One newc entry."""
    text = name.encode() + b"\0"
    fields = (1, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(text), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + text
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def archive(*entries: bytes) -> bytes:
    content = b"".join(entries) + entry("TRAILER!!!")
    return content + bytes(-len(content) % 512)


NOISE = random.Random(1).randbytes(300_001)
EARLY = archive(entry("kernel/x86/microcode/AuthenticAMD.bin", NOISE[:100_001]))
MODULES = (
    entry("usr/lib/modules/1/kernel/drivers/ata/ahci.ko", NOISE),
    entry("lib/modules/1/virtio_blk.ko.xz", b"x" * 10),
)


def listed(path: Path, content: bytes) -> Image:
    path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", initramfs.PROGRAM, str(path), str(path) + "-none"],
        capture_output=True,
        check=True,
    )
    assert done.stderr == b""
    (image,) = initramfs.parse(done.stdout).values()
    return image


@pytest.mark.parametrize("tool", ["", "gzip", "xz", "zstd", "lz4", "bzip2"])
def test_modules_behind_an_early_archive(tmp_path: Path, tool: str) -> None:
    if tool and shutil.which(tool) is None:
        pytest.skip(f"not installed: {tool}")
    main = archive(*MODULES, entry("conf/initramfs.conf", b"# MODULES=x\nMODULES=most\n"))
    options = {"lz4": ["-l"], "xz": ["--check=crc32"]}.get(tool, [])
    packed = (
        subprocess.run([tool, *options, "-c"], input=main, capture_output=True, check=True).stdout if tool else main
    )
    image = listed(tmp_path / "initrd", EARLY + packed)
    assert (image.error, image.modules) == ("", ("ahci", "virtio_blk"))
    assert (image.kind, image.host_only) == ("initramfs-tools", False)


@pytest.mark.parametrize(
    ("name", "content", "kind", "host_only"),
    [
        ("conf/initramfs.conf", b"MODULES=dep\n", "initramfs-tools", True),
        ("usr/lib/dracut/build-parameter.txt", b"--no-hostonly '-f'", "dracut", False),
        ("usr/lib/dracut/hostonly-kernel-modules.txt", b"", "dracut", True),
        ("usr/lib/dracut/dracut-059", b"", "dracut", None),
        ("buildconfig", b"HOOKS=(base udev autodetect modconf)\n", "mkinitcpio", True),
        ("buildconfig", b"HOOKS=(base udev modconf)\n", "mkinitcpio", False),
        ("bin/sh", b"", "", None),
    ],
)
def test_how_it_was_made(tmp_path: Path, name: str, content: bytes, kind: str, host_only: bool | None) -> None:
    image = listed(tmp_path / "initrd", gzip.compress(archive(entry(name, content))))
    assert (image.kind, image.host_only) == (kind, host_only)


def test_a_file_in_conf_d_wins(tmp_path: Path) -> None:
    image = listed(
        tmp_path / "initrd",
        archive(entry("conf/conf.d/local", b"MODULES=dep\n"), entry("conf/initramfs.conf", b"MODULES=most\n")),
    )
    assert image.host_only is True


@pytest.mark.parametrize(
    "content",
    [
        b"hello world, I am no archive",
        EARLY + gzip.compress(archive(*MODULES))[:-60_000],
        archive(*MODULES)[:200_000],
        entry("a" * 5000),
        b"070701" + b"zzzzzzzz" * 13,
    ],
)
def test_a_damaged_image_is_an_error_of_that_image(tmp_path: Path, content: bytes) -> None:
    assert listed(tmp_path / "initrd", content).error


def test_a_listing_that_was_cut_off_says_so() -> None:
    (image,) = initramfs.parse(b"F\t/boot/initrd\nM\tahci\n").values()
    assert image.error

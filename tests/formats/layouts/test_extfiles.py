"""Files out of file systems that mke2fs made, held against what went in."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.errors import ImageError
from formats.images.raw import RawFile
from formats.layouts.extfiles import ExtFiles
from formats.memory import MemoryDisk
from tests.requirement import needs

MIB = 1 << 20

pytestmark = needs("mke2fs", "debugfs")

KINDS = {
    "ext4": ["-t", "ext4"],
    "ext4-small-blocks": ["-t", "ext4", "-b", "1024"],
    "ext4-no-64bit": ["-t", "ext4", "-O", "^64bit,^metadata_csum"],
    "ext3": ["-t", "ext3", "-b", "1024"],
    "ext2": ["-t", "ext2", "-b", "1024", "-I", "128"],
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    (tree / "etc").mkdir()
    (tree / "etc/fstab").write_text("/dev/sda1 / ext4\n")
    (tree / "boot").mkdir()
    (tree / "boot/vmlinuz-6").write_bytes(os.urandom(3 * MIB + 77))  # double indirect with 1-KiB blocks
    (tree / "vmlinuz").symlink_to("boot/vmlinuz-6")
    (tree / "far").symlink_to("/etc/../far2")
    (tree / "far2").symlink_to("x" * 20 + "/../" * 20 + "etc/fstab")
    (tree / "around").symlink_to("around")
    (tree / "empty").touch()
    with (tree / "holes").open("wb") as file:
        file.seek(2 * MIB)
        file.write(b"end")
    many = tree / "many"
    many.mkdir()
    for number in range(900):  # a directory with an index
        (many / f"name-{number:04}").write_text(str(number))
    return tree


@pytest.fixture(scope="module", params=KINDS)
def files(request: pytest.FixtureRequest, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtFiles:
    image = tmp_path_factory.mktemp("image") / "fs.raw"
    with image.open("wb") as file:
        file.truncate(48 * MIB)
    run = ["mke2fs", "-q", "-F", *KINDS[request.param], "-L", "root", "-d", str(tree), str(image)]
    subprocess.run(run, check=True, capture_output=True)
    source = RawFile(image)
    request.addfinalizer(source.close)
    return ExtFiles(source)


def test_files_come_out_as_they_went_in(files: ExtFiles, tree: Path) -> None:
    for name in ("etc/fstab", "boot/vmlinuz-6", "empty", "holes", "many/name-0899"):
        assert files.read(f"/{name}", 4 * MIB) == (tree / name).read_bytes(), name
    assert files.label == "root" and len(files.uuid) == 36


def test_links_are_followed(files: ExtFiles, tree: Path) -> None:
    assert files.read("/vmlinuz", 4 * MIB) == (tree / "boot/vmlinuz-6").read_bytes()
    assert files.read("/far", MIB) is None  # as in Linux: one folder of the way is missing
    assert files.read("/around", MIB) is None


def test_directories_are_listed_whole(files: ExtFiles) -> None:
    assert files.names("/many") == [f"name-{number:04}" for number in range(900)]
    assert files.names("/boot") == ["vmlinuz-6"]
    assert files.names("/etc/fstab") == [] == files.names("/nowhere")
    assert files.read("/boot", MIB) is None and files.read("/etc/nothing", MIB) is None


def test_a_file_that_is_too_large_is_refused(files: ExtFiles) -> None:
    with pytest.raises(ImageError, match="larger than 100 bytes"):
        files.read("/boot/vmlinuz-6", 100)


@pytest.mark.parametrize("features", ["inline_data", "encrypt", "meta_bg,^resize_inode"])
def test_a_feature_that_is_not_read_is_said(features: str, tmp_path: Path) -> None:
    image = tmp_path / "fs.raw"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", features, str(image)], check=True)
    source = RawFile(image)
    try:
        with pytest.raises(ImageError, match="not read here"):
            ExtFiles(source)
    finally:
        source.close()


@pytest.fixture(scope="module")
def small(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = tmp_path_factory.mktemp("small") / "fs.raw"
    with image.open("wb") as file:
        file.truncate(2 * MIB)
    run = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-d", str(tree / "etc"), str(image)]
    subprocess.run(run, check=True, capture_output=True)
    return image


@settings(max_examples=200)
@given(flips=st.lists(st.tuples(st.integers(0, 512 * 1024 - 1), st.integers(0, 255)), min_size=1, max_size=40))
def test_damage_is_an_error_or_a_file_and_nothing_else(small: Path, flips: list[tuple[int, int]]) -> None:
    damaged = bytearray(small.read_bytes())
    for position, value in flips:
        damaged[position] = value
    try:
        found = ExtFiles(MemoryDisk(len(damaged), bytes(damaged)))
        found.names("/")
        found.read("/fstab", MIB)
    except ImageError:
        pass

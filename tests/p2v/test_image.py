"""`p2v image`: images made by qemu-img and by other products, looked at, converted and compared."""

from __future__ import annotations

import bz2
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from formats.images import FORMATS
from p2v.cli import run
from tests.requirement import needs

pytestmark = needs("qemu-img", "qemu-nbd")

MIB = 1 << 20
GIVEN = Path(__file__).parents[3] / "shared/data/images"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """9 MiB: data, zeroes that are written, holes."""
    path = tmp_path / "disk.raw"
    generator = random.Random(1)
    with path.open("wb") as file:
        file.truncate(9 * MIB)
        for start, length in ((0, 70_000), (3 * MIB, MIB), (9 * MIB - 512, 512)):
            file.seek(start)
            file.write(generator.randbytes(length))
        file.seek(5 * MIB)
        file.write(bytes(MIB))
    return path


def p2v(capsys: pytest.CaptureFixture[str], *words: str | Path, expect: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    code = run(["image", *map(str, words), "--json"])
    out = capsys.readouterr()
    assert code == expect, out.err
    document: dict[str, Any] = json.loads(out.out)
    assert document["exit_code"] == expect
    return document


KINDS = [(name, layout.name, "") for name, chosen in FORMATS.items() for layout in chosen.subformats]
KINDS += [("qcow2", "", "zlib"), ("qcow2", "", "zstd")]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_there_and_back(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: tuple[str, str, str]
) -> None:
    name, subformat, compress = kind
    image = tmp_path / f"there{FORMATS[name].suffix}"
    words = ["--subformat", subformat] if subformat else []
    done = p2v(capsys, "convert", raw, image, "--to", name, *words, "--compress", compress)["data"]
    assert done["plan"]["format"] == name
    assert done["converted"]["files"][0] == str(image)
    found = p2v(capsys, "info", image)["data"]["image"]
    assert (found["format"], found["size"]) == (name, done["plan"]["new_size"])
    p2v(capsys, "check", image)
    p2v(capsys, "compare", raw, image, expect=3 if done["plan"]["new_size"] != 9 * MIB else 0)
    back = tmp_path / "back.raw"
    p2v(capsys, "convert", image, back)
    assert back.read_bytes()[: 9 * MIB] == raw.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if ".part" in path.name] == []
    data = p2v(capsys, "map", image)["data"]
    assert sum(extent["length"] for extent in data["extents"]) == found["size"]
    runs = [extent["length"] for extent in data["extents"] if extent["kind"] == "data"]
    assert sum(runs) == data["data"]
    assert data["data"] < 6 * MIB or found["block_size"] >= 8 * MIB


def test_differences_are_named(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.qcow2"
    p2v(capsys, "convert", raw, other)
    content = bytearray(raw.read_bytes())
    content[5 * MIB + 5] = 1
    content[70_000] ^= 1
    raw.write_bytes(content)
    ranges = p2v(capsys, "compare", raw, other, expect=4)["data"]["ranges"]
    assert ranges == [{"start": 69632, "length": 4096}, {"start": 5 * MIB, "length": 4096}]
    raw.write_bytes(content + bytes(MIB))
    assert len(p2v(capsys, "compare", other, raw, expect=4)["data"]["ranges"]) == 2
    raw.write_bytes(content + bytes(MIB) + b"!")
    assert p2v(capsys, "compare", other, raw, expect=4)["data"]["ranges"][-1]["start"] >= 9 * MIB


def test_a_longer_one_is_the_same_disk_with_a_notice(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(raw.read_bytes() + bytes(2 * MIB))
    (notice,) = p2v(capsys, "compare", raw, other, expect=3)["notices"]
    assert notice["code"] == "size-differs"


def test_nothing_that_is_there_is_replaced_unless_asked(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "there.qcow2"
    target.write_text("precious")
    p2v(capsys, "convert", raw, target, expect=2)
    p2v(capsys, "convert", raw, raw, "--force", expect=2)
    p2v(capsys, "convert", raw, tmp_path / "no.suffix", expect=2)
    p2v(capsys, "convert", raw, tmp_path / "nowhere" / "x.qcow2", expect=2)
    p2v(capsys, "convert", raw, target, "--force", "--compress", "lzma", expect=2)
    assert target.read_text() == "precious"
    assert p2v(capsys, "convert", raw, tmp_path / "new.qcow2", "--dry-run")["data"]["plan"]["new_size"] == 9 * MIB
    assert not (tmp_path / "new.qcow2").exists()
    p2v(capsys, "convert", raw, target, "--force")
    assert target.read_bytes().startswith(b"QFI\xfb")


def test_too_large_a_disk_is_refused_before_a_byte_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "large.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", source, "3T"], check=True)
    (error,) = p2v(capsys, "convert", source, tmp_path / "large.vhd", expect=21)["errors"]
    assert "VHDX" in error["advice"]
    assert not (tmp_path / "large.vhd").exists()


def test_damage_has_its_exit_code(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "there.qcow2"
    p2v(capsys, "convert", raw, image)
    with image.open("r+b") as file:
        file.seek(0x30000)  # the first L2 table: a cluster far behind the end
        file.write(b"\x80\0\xff\xff\xff\xff\0\0" * 4)
    p2v(capsys, "check", image, expect=20)


def test_an_image_that_reaches_elsewhere_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "child.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", image, "1M"], check=True
    )
    assert p2v(capsys, "info", image)["data"]["image"]["backing"] == "/etc/shadow"
    for command in ("map", "check", "compare", "convert"):
        more = {"compare": [image], "convert": [tmp_path / "out.raw"]}.get(command, [])
        p2v(capsys, command, image, *more, expect=22)


PRODUCTS = {
    "virtualpc-dynamic.vhd": "vhd",
    "d2v-zerofilled.vhd": "vhd",
    "grub_mbr.raw": "raw",
    "iotest-dynamic-1G.vhdx": "vhdx",
    "iotest-version3.vmdk": "vmdk",
    "parallels-v1": "parallels",
}
DRIVERS = {"vhd": "vpc"}


@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_images_of_other_products(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    packed = GIVEN / f"{name}.bz2"
    if not packed.exists():
        pytest.skip("the images of other products are not here")
    image = tmp_path / name
    image.write_bytes(bz2.decompress(packed.read_bytes()))
    kind = PRODUCTS[name]
    found = p2v(capsys, "info", image)["data"]["image"]
    assert found["format"] == kind
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    p2v(capsys, "convert", image, ours)
    subprocess.run(["qemu-img", "convert", "-f", DRIVERS.get(kind, kind), "-O", "qcow2", image, theirs], check=True)
    p2v(capsys, "compare", ours, theirs)

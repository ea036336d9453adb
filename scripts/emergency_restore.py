#!/usr/bin/env python3
"""Restore a disk from a repository without the toolkit: this file, Python, `zstandard` and `cryptography`, and backup/FORMAT.md.

    emergency_restore.py REPOSITORY                        list the points
    emergency_restore.py REPOSITORY POINT DISK FILE        write a disk of a point (its id or beginning; number of the disk) to a new file

The password or the paper key is taken from P2V_PASSWORD, else asked for. It needs no index: it walks through the packs. A chunk
that cannot be had
becomes zeroes and is listed; the exit code is 1 then.
"""

import base64
import getpass
import hashlib
import json
import os
import struct
import sys
from pathlib import Path

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

SPAN, FAN, CHUNK, PAGE, POINT = 16 << 20, 256, 1, 2, 16

# -- BLAKE3 of at most 64 bytes, which is all that keys need ------------------------------------------------------------

IV = struct.unpack("<8I", bytes.fromhex("67e6096a85ae67bb72f36e3c3af54fa57f520e518c68059babd9831f19cde05b"))
SHUFFLE = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
COLUMNS = (
    (0, 4, 8, 12),
    (1, 5, 9, 13),
    (2, 6, 10, 14),
    (3, 7, 11, 15),
    (0, 5, 10, 15),
    (1, 6, 11, 12),
    (2, 7, 8, 13),
    (3, 4, 9, 14),
)


def blake3(data: bytes, key: tuple = IV, flags: int = 0) -> bytes:
    """BLAKE3 of one block; flags: 16 keyed, 32 context of a derivation, 64 its key material."""
    assert len(data) <= 64
    block = list(struct.unpack("<16I", data.ljust(64, b"\0")))
    v = [*key, *IV[:4], 0, 0, len(data), flags | 1 | 2 | 8]  # first chunk, last chunk, root
    for _ in range(7):
        for n, (a, b, c, d) in enumerate(COLUMNS):
            for word, (r1, r2) in zip(block[2 * n : 2 * n + 2], ((16, 12), (8, 7)), strict=True):
                v[a] = (v[a] + v[b] + word) & 0xFFFFFFFF
                v[d] = rotate(v[d] ^ v[a], r1)
                v[c] = (v[c] + v[d]) & 0xFFFFFFFF
                v[b] = rotate(v[b] ^ v[c], r2)
        block = [block[n] for n in SHUFFLE]
    return struct.pack("<8I", *(v[n] ^ v[n + 8] for n in range(8)))


def rotate(word: int, by: int) -> int:
    return (word >> by | word << 32 - by) & 0xFFFFFFFF


def words(key: bytes) -> tuple:
    return struct.unpack("<8I", key)


# -- keys -----------------------------------------------------------------------------------------------------------------


def master_key(repository: Path, password: str) -> bytes:
    """Unwrap the master key, or read it from the paper key."""
    if password.upper().startswith("P2V1-"):
        text = password[5:].upper().replace("-", "").replace(" ", "")
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
        if len(raw) == 36 and blake3(raw[:32])[:4] == raw[32:]:
            return raw[:32]
        sys.exit("the paper key is mistyped")
    identity = json.loads((repository / "config").read_bytes())["id"]
    for path in sorted((repository / "keys").iterdir()):
        key = json.loads(path.read_bytes())
        kdf = key["kdf"]
        derive = Argon2id(
            salt=base64.b64decode(kdf["salt"]), length=32, iterations=kdf["iterations"], lanes=kdf["lanes"], memory_cost=kdf["memory_kib"]
        )  # fmt: skip
        try:
            wrapping = AESGCM(derive.derive(password.encode()))
            return wrapping.decrypt(base64.b64decode(key["nonce"]), base64.b64decode(key["wrapped"]), identity.encode())
        except InvalidTag:
            continue
    sys.exit("no key opens with this password")


class Repository:
    """Opens what is sealed, and knows where blobs lie."""

    def __init__(self, root: Path, password: str) -> None:
        self.root = root
        context = blake3(b"p2v-toolkit 2026 repository v1 seal", flags=32)
        self.seal = words(blake3(master_key(root, password), words(context), 64))
        self.places: dict[bytes, list[tuple[Path, int, int]]] = {}

    def cipher(self, kind: int, salt: bytes) -> AESGCM:
        return AESGCM(blake3(bytes((kind,)) + salt, self.seal, 16))

    def points(self) -> list[tuple[str, dict]]:
        found = []
        for path in (self.root / "points").iterdir():
            data = path.read_bytes()
            try:
                plain = self.cipher(POINT, data[12:44]).decrypt(data[44:56], data[56:], data[:44])
                found.append((path.name, json.loads(zstandard.ZstdDecompressor().decompress(plain))))
            except (InvalidTag, ValueError, zstandard.ZstdError):
                print(f"the point {path.name} is damaged", file=sys.stderr)
        return sorted(found, key=lambda item: item[1]["time"])

    def find_blobs(self) -> None:
        """Walk through all packs from header to header."""
        for path in sorted((self.root / "packs").glob("*/*")):
            with path.open("rb") as file:
                data, position = file.read(), 8
            while (position := data.find(b"P2VB", position)) >= 0 and position + 48 <= len(data):
                sealed = struct.unpack_from("<I", data, position + 12)[0]
                end = position + 48 + sealed
                if end <= len(data) and (end == len(data) or data[end : end + 4] == b"P2VB"):
                    self.places.setdefault(data[position + 16 : position + 48], []).append(
                        (path, position, 48 + sealed)
                    )
                    position = end
                else:
                    position += 1

    def blob(self, blob_id: bytes, kind: int) -> bytes:
        """The plain bytes of a blob; ``LookupError`` when no sound copy is there."""
        for path, offset, length in self.places.get(blob_id, ()):
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(length)
            try:
                plain = self.cipher(kind, blob_id).decrypt(data[48:60], data[60:], data[:48])
                size = struct.unpack_from("<I", data, 8)[0]
                return zstandard.ZstdDecompressor().decompress(plain, max_output_size=size) if data[5] & 1 else plain
            except (InvalidTag, zstandard.ZstdError):
                continue
        raise LookupError(blob_id.hex())

    def leaves(self, page: bytes, level: int, number: int = 0) -> list[tuple[int, bytes]]:
        """The spans that hold data, with the ids of their leaves."""
        if page == bytes(32):
            return []
        if not level:
            return [(number, page)]
        inner = self.blob(page, PAGE)
        children = (inner[n * 32 : n * 32 + 32] for n in range(FAN))
        return [leaf for n, child in enumerate(children) for leaf in self.leaves(child, level - 1, number * FAN + n)]

    def restore(self, disk: dict, target: Path) -> int:
        """Write a disk; returns how many places could not be restored."""
        level, holes = 0, 0
        while SPAN * FAN**level < disk["size"]:
            level += 1
        with target.open("xb") as file:
            file.truncate(disk["size"])
            for number, leaf in self.leaves(bytes.fromhex(disk["root"] or "00" * 32), level):
                page, position, at = self.blob(leaf, PAGE), number * SPAN, 0
                while at < len(page):
                    word = struct.unpack_from("<I", page, at)[0]
                    at += 4
                    if not word & 1 << 31:
                        try:
                            content = self.blob(page[at : at + 32], CHUNK)
                            file.seek(position)
                            file.write(content)
                        except LookupError:
                            holes += 1
                            print(f"lost: {word} bytes at {position}", file=sys.stderr)
                        at += 32
                    position += word & ~(1 << 31)
            os.fsync(file.fileno())
        return holes


def main() -> None:
    if len(sys.argv) not in (2, 5):
        sys.exit(__doc__)
    password = os.environ.get("P2V_PASSWORD") or getpass.getpass("password or paper key: ")
    repository = Repository(Path(sys.argv[1]), password)
    points = repository.points()
    if len(sys.argv) == 2:
        for name, point in points:
            print(name, point["time"], point["machine"]["name"])
            for number, disk in enumerate(point["disks"]):
                print(f"    disk {number}: {disk['id']}, {disk['size']} bytes")
        return
    wanted, number, target = sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    chosen = [point for name, point in points if name.startswith(wanted)]
    if len(chosen) != 1:
        sys.exit(f"{len(chosen)} points begin with {wanted}")
    repository.find_blobs()
    holes = repository.restore(chosen[0]["disks"][number], target)
    print(f"{target}: SHA-256 {hashlib.file_digest(target.open('rb'), 'sha256').hexdigest()}, {holes} places lost")
    sys.exit(1 if holes else 0)


if __name__ == "__main__":
    main()

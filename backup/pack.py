"""Blobs and packs: the only place where chunks and pages are compressed, sealed, opened and verified.

The codec works on whole blobs with C libraries that release the GIL; contexts of zstd are kept per thread, never shared.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag

from backup.errors import ObjectDamagedError
from backup.keys import CHUNK, NONCE, PAGE, TAG, Keyring

MAGIC = b"P2VPACK1"
TARGET = 16 << 20
"""Bytes at which a pack is closed."""

MAX_PACK = 128 << 20
MAX_PLAIN = 16 << 20
_BLOB = b"P2VB"
_HEAD = struct.Struct("<4sBBHII32s")
HEAD = _HEAD.size
_ZSTD = 1


class Blob(NamedTuple):
    """A blob ready for a pack: ``data`` is its header and what follows it."""

    kind: int
    id: bytes
    plain: int
    data: bytes

    @property
    def size(self) -> int:
        """Bytes in the pack, header included."""
        return len(self.data)


class Place(NamedTuple):
    """Where a blob lies. ``offset`` is that of its header, ``sealed`` the bytes behind the header."""

    pack: bytes
    offset: int
    sealed: int
    plain: int
    kind: int

    @property
    def end(self) -> int:
        """First byte behind the blob in its pack."""
        return self.offset + HEAD + self.sealed


class Codec:
    """Makes blobs of plain bytes and back; safe from several threads. ``level`` is zstd's."""

    def __init__(self, keyring: Keyring, *, level: int = 3) -> None:
        self._keyring, self._level = keyring, level
        self._local = threading.local()

    def encode(self, kind: int, blob_id: bytes, plain: memoryview | bytes) -> Blob:
        """Compress and seal; what was made is opened again and compared before it is returned (P19)."""
        local = self._local
        try:
            compress = local.compress
        except AttributeError:
            compress = local.compress = zstandard.ZstdCompressor(level=self._level, write_content_size=True).compress
        packed: bytes | memoryview = compress(plain)
        flags = _ZSTD
        if len(packed) >= len(plain):
            packed, flags = plain, 0
        nonce = os.urandom(NONCE)
        head = _HEAD.pack(_BLOB, kind, flags, 0, len(plain), NONCE + len(packed) + TAG, blob_id)
        cipher = self._keyring.cipher(kind, blob_id)
        sealed = cipher.encrypt(nonce, packed, head)
        opened = cipher.decrypt(nonce, sealed, head)
        if flags & _ZSTD:
            opened = self._decompress(opened, len(plain))
        # By the id: as sure as a comparison, and without the interpreter's lock, which `bytes == memoryview` holds for long.
        if len(opened) != len(plain) or self._keyring.id(kind, opened) != blob_id:
            raise ObjectDamagedError(
                "a chunk does not read back as it was encoded",
                advice="Check this computer's memory; nothing wrong was stored.",
            )
        return Blob(kind, blob_id, len(plain), head + nonce + sealed)

    def decode(self, blob_id: bytes, kind: int, data: memoryview | bytes, subject: str = "") -> bytes:
        """The plain bytes of a stored blob; ``ObjectDamagedError`` unless they are exactly those of ``blob_id``."""
        head = bytes(data[:HEAD])
        if len(head) < HEAD:
            raise _damaged(blob_id, subject, "cut short")
        magic, found_kind, flags, _, plain, sealed, found = _HEAD.unpack(head)
        if magic != _BLOB or found != blob_id or found_kind != kind or not 0 < plain <= MAX_PLAIN:
            raise _damaged(blob_id, subject, "its header is another's")
        if sealed != len(data) - HEAD or sealed < NONCE + TAG:
            raise _damaged(blob_id, subject, "its length is wrong")
        try:
            content = self._keyring.cipher(kind, blob_id).decrypt(data[HEAD : HEAD + NONCE], data[HEAD + NONCE :], head)
        except InvalidTag:
            raise _damaged(blob_id, subject, "its seal is broken") from None
        if flags & _ZSTD:
            content = self._decompress(content, plain)
        if len(content) != plain or self._keyring.id(kind, content) != blob_id:
            raise _damaged(blob_id, subject, "its content is another's")
        return content

    def _decompress(self, packed: bytes, plain: int) -> bytes:
        local = self._local
        try:
            decompress = local.decompress
        except AttributeError:
            decompress = local.decompress = zstandard.ZstdDecompressor().decompress
        try:
            if zstandard.frame_content_size(packed) != plain:
                raise ObjectDamagedError("a chunk states a length that is not its own")
            return bytes(decompress(packed))
        except zstandard.ZstdError as error:
            raise ObjectDamagedError(f"a chunk does not decompress: {error}") from None


def _damaged(blob_id: bytes, subject: str, reason: str) -> ObjectDamagedError:
    where = f" in {subject}" if subject else ""
    return ObjectDamagedError(f"the blob {blob_id.hex()[:16]}{where} is damaged: {reason}", subject=subject)


class Packer:
    """Collects blobs of one kind and hands full packs to ``publish``; safe from several threads.

    ``publish(name, parts, places)`` is called by the thread that filled the pack, without a lock held: the others go on with the next.
    """

    def __init__(
        self, publish: Callable[[str, list[bytes], list[tuple[bytes, Place]]], None], *, target: int = TARGET
    ) -> None:
        self._publish, self._target = publish, target
        self._lock = threading.Lock()
        self._blobs: list[Blob] = []
        self._size = len(MAGIC)

    def add(self, blobs: list[Blob]) -> None:
        """Add neighbours: they stay together, in order."""
        while blobs:
            with self._lock:
                taken = 0
                while taken < len(blobs) and self._size < self._target:
                    self._size += blobs[taken].size
                    taken += 1
                self._blobs += blobs[:taken]
                blobs = blobs[taken:]
                full = self._take() if self._size >= self._target else []
            if full:
                self._seal(full)

    def flush(self) -> None:
        """Publish what has been collected."""
        with self._lock:
            rest = self._take()
        if rest:
            self._seal(rest)

    def _take(self) -> list[Blob]:
        blobs, self._blobs, self._size = self._blobs, [], len(MAGIC)
        return blobs

    def _seal(self, blobs: list[Blob]) -> None:
        parts = [MAGIC]
        hasher = blake3(MAGIC)
        for blob in blobs:
            parts.append(blob.data)
            hasher.update(blob.data)
        digest, offset, places = hasher.digest(), len(MAGIC), []
        for blob in blobs:
            places.append((blob.id, Place(digest, offset, blob.size - HEAD, blob.plain, blob.kind)))
            offset += blob.size
        self._publish(pack_name(digest), parts, places)


def pack_name(digest: bytes) -> str:
    """The name of the pack whose bytes have this hash."""
    text = digest.hex()
    return f"packs/{text[:2]}/{text}"


def pack_digest(name: str) -> bytes:
    """The hash in a pack's name; ``ValueError`` when it is no pack's name."""
    folder, short, text = name.split("/")
    digest = bytes.fromhex(text)
    if folder != "packs" or len(digest) != 32 or not text.startswith(short):
        raise ValueError(f"{name} is no name of a pack")
    return digest


def scan(digest: bytes, content: bytes | memoryview) -> Iterator[tuple[bytes, Place]]:
    """The blobs of a pack by their headers, without a key. Behind damage the next header that fits is searched: a broken length
    costs its own blob, not the rest.
    """
    data = bytes(content)
    if data[: len(MAGIC)] != MAGIC:
        return
    position = len(MAGIC)
    while (position := data.find(_BLOB, position)) >= 0 and position + HEAD <= len(data):
        _, kind, flags, pad, plain, sealed, blob_id = _HEAD.unpack_from(data, position)
        end = position + HEAD + sealed
        fits = kind in (CHUNK, PAGE) and flags in (0, _ZSTD) and not pad and 0 < plain <= MAX_PLAIN and end <= len(data)
        if fits and sealed > NONCE + TAG and (end == len(data) or data[end : end + 4] == _BLOB):
            yield blob_id, Place(digest, position, sealed, plain, kind)
            position = end
        else:
            position += 1

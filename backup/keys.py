"""Keys: the master key wrapped by passwords, what is derived from it, and the sealing of small objects."""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec
from blake3 import blake3

from backup.errors import ObjectDamagedError, WrongPasswordError
from p2v.config import Secret

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CHUNK, PAGE, POINT, RECORD, FORGOTTEN = 1, 2, 16, 17, 18
"""Kinds of what is sealed; the byte of FORMAT.md."""

NONCE, TAG = 12, 16
_CONTEXT = "p2v-toolkit 2026 repository v1 "
_PAPER = "P2V1-"
_MAX_MEMORY, _MAX_ITERATIONS, _MAX_LANES = 1 << 20, 64, 64  # of untrusted key objects: KiB, passes, lanes
_SEALED_HEAD = b"P2VSEAL1"
_MAX_PLAIN = 64 << 20


def digest_name(content: bytes) -> str:
    """The name that an object of this content has: hex of its BLAKE3."""
    return blake3(content).hexdigest()


class Keyring:
    """The master key and what is derived from it. Holds secrets: it is never logged or stored."""

    def __init__(self, master: bytes) -> None:
        if len(master) != 32:
            raise ValueError("a master key has 32 bytes")
        self._master = master
        self._ids = {CHUNK: self._derive("id chunk"), PAGE: self._derive("id page")}
        self._seal = self._derive("seal")

    def __repr__(self) -> str:
        return "Keyring(...)"

    @classmethod
    def generate(cls) -> Keyring:
        """A new master key from the system's generator."""
        return cls(os.urandom(32))

    def _derive(self, use: str) -> bytes:
        return blake3(self._master, derive_key_context=_CONTEXT + use).digest()

    def id(self, kind: int, plain: bytes | bytearray | memoryview) -> bytes:
        """The id of a chunk or page."""
        return blake3(plain, key=self._ids[kind]).digest()

    def cipher(self, kind: int, salt: bytes) -> AESGCM:
        """The cipher of one blob (``salt`` is its id) or sealed object."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(blake3(bytes((kind,)) + salt, key=self._seal).digest())

    @property
    def cut_key(self) -> bytes:
        """What decides where chunks are cut."""
        return self._derive("cut")

    @cached_property
    def _mac(self) -> bytes:
        return self._derive("mac")

    def mac(self, content: bytes) -> str:
        """Hex of the keyed hash that shows content in clear to be this repository's own."""
        return blake3(content, key=self._mac).hexdigest()

    # -- small objects ---------------------------------------------------------------------------------------------

    def seal(self, kind: int, document: bytes, binding: bytes = b"") -> bytes:
        """``document`` as a sealed object; it opens only with the same ``binding``."""
        import zstandard

        salt, nonce = os.urandom(32), os.urandom(NONCE)
        head = _SEALED_HEAD + bytes((kind, 0, 0, 0)) + salt
        plain = zstandard.ZstdCompressor(level=3).compress(document)
        sealed = head + nonce + self.cipher(kind, salt).encrypt(nonce, plain, head + binding)
        if self.unseal(kind, sealed, binding=binding) != document:
            raise ObjectDamagedError("an object does not read back as it was encoded; check this computer's memory")
        return sealed

    def unseal(self, kind: int, content: bytes, *, subject: str = "", binding: bytes = b"") -> bytes:
        """The document of a sealed object; ``ObjectDamagedError`` when it is not exactly what was sealed."""
        import zstandard
        from cryptography.exceptions import InvalidTag

        head, nonce, rest = content[:44], content[44:56], content[56:]
        if head[:8] != _SEALED_HEAD or head[8:9] != bytes((kind,)) or len(rest) < TAG:
            raise ObjectDamagedError(f"{subject or 'an object'} is not a sealed object of its kind", subject=subject)
        try:
            plain = self.cipher(kind, head[12:44]).decrypt(nonce, rest, head + binding)
        except InvalidTag:
            raise ObjectDamagedError(
                f"{subject or 'an object'} is damaged: its seal is broken", subject=subject
            ) from None
        try:
            declared = zstandard.frame_content_size(plain)
            if not 0 <= declared <= _MAX_PLAIN:
                raise ObjectDamagedError(f"{subject} states an impossible length", subject=subject)
            return zstandard.ZstdDecompressor().decompress(plain, max_output_size=declared)
        except zstandard.ZstdError:
            raise ObjectDamagedError(f"{subject} does not decompress", subject=subject) from None

    # -- paper ---------------------------------------------------------------------------------------------------------

    def paper(self) -> str:
        """The master key as text to be kept on paper: whoever has it reads everything."""
        text = base64.b32encode(self._master + blake3(self._master).digest()[:4]).decode().rstrip("=")
        return _PAPER + "-".join(text[n : n + 8] for n in range(0, len(text), 8))


def from_paper(text: str) -> Keyring | None:
    """The keyring of a paper key; None when the text is none. ``WrongPasswordError`` when it was mistyped."""
    if not text.upper().startswith(_PAPER):
        return None
    packed = text[len(_PAPER) :].upper().replace("-", "").replace(" ", "")
    try:
        raw = base64.b32decode(packed + "=" * (-len(packed) % 8))
    except binascii.Error:
        raw = b""
    # The last letter has two bits to spare: only the form that was printed is taken.
    canonical = base64.b32encode(raw).decode().rstrip("=") == packed
    if not canonical or len(raw) != 36 or blake3(raw[:32]).digest()[:4] != raw[32:]:
        raise WrongPasswordError(
            "the paper key is mistyped: its check digits do not fit",
            advice="Compare it with the paper, letter by letter.",
        )
    return Keyring(raw[:32])


# -- keys wrapped by passwords -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Kdf:
    """How a password becomes a key. ``memory_kib`` KiB, ``iterations`` passes."""

    name: str = "argon2id"
    memory_kib: int = 64 * 1024
    iterations: int = 3
    lanes: int = 4
    salt: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrappedKey:
    """A key object, as FORMAT.md has it."""

    version: int
    repository: str
    label: str
    created: str
    kdf: Kdf
    nonce: bytes
    wrapped: bytes


def wrap(
    keyring: Keyring, password: Secret, *, repository: str, label: str, created: str, kdf: Kdf | None = None
) -> bytes:
    """A key object that opens ``keyring`` with ``password``."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    chosen = replace(kdf or Kdf(), salt=os.urandom(16))
    nonce = os.urandom(NONCE)
    sealed = AESGCM(_stretched(password, chosen)).encrypt(nonce, keyring._master, repository.encode())
    key = WrappedKey(
        version=1, repository=repository, label=label, created=created, kdf=chosen, nonce=nonce, wrapped=sealed
    )
    return msgspec.json.encode(key) + b"\n"


def decode_key(content: bytes, subject: str) -> WrappedKey:
    """The record of a key object; ``ObjectDamagedError`` when it is none, or asks for more work than is sane."""
    try:
        key = msgspec.json.decode(content, type=WrappedKey)
    except (msgspec.DecodeError, RecursionError):
        raise ObjectDamagedError(f"{subject} is not a key", subject=subject) from None
    kdf = key.kdf
    sane = (
        kdf.name == "argon2id"
        and 1 <= kdf.lanes <= _MAX_LANES
        and 8 * kdf.lanes <= kdf.memory_kib <= _MAX_MEMORY
        and 1 <= kdf.iterations <= _MAX_ITERATIONS
        and len(kdf.salt) >= 8
        and len(key.nonce) == NONCE
    )
    if not sane:
        raise ObjectDamagedError(f"{subject} asks for an impossible key derivation", subject=subject)
    return key


def unwrap(key: WrappedKey, password: Secret) -> Keyring | None:
    """The keyring; None when the password is not this key's (or the key is damaged: the two cannot be told apart)."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return Keyring(AESGCM(_stretched(password, key.kdf)).decrypt(key.nonce, key.wrapped, key.repository.encode()))
    except (InvalidTag, ValueError):
        return None


def _stretched(password: Secret, kdf: Kdf) -> bytes:
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    derive = Argon2id(salt=kdf.salt, length=32, iterations=kdf.iterations, lanes=kdf.lanes, memory_cost=kdf.memory_kib)
    return derive.derive(password.reveal().encode())

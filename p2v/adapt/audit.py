"""What the stage reports, taken as untrusted input: items, changed files with their texts before and after, and the audit made of them."""

from __future__ import annotations

import base64
import binascii
import difflib
import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from p2v.errors import AdaptationError

_REPORT_MOST = 32 << 20
_MEMBERS_MOST = 4096
_TEXT_MOST = 256 << 10
_BEGIN, _END = b"P2V-BEGIN", b"P2V-END "


class Status(StrEnum):
    """How an item ended."""

    DONE = "done"
    NOTHING = "nothing"
    FAILED = "failed"


class Kind(StrEnum):
    """What happened to a file."""

    CREATED = "created"
    MODIFIED = "modified"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemResult:
    """What became of an item of the plan; ``detail`` is one line for a person."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileState:
    """A file at one moment: size in bytes, SHA-256 in hex, and its text when it is a small text file (None otherwise).

    What a tool overwrote before it could be looked at has size -1 and no hash.
    """

    size: int
    sha256: str
    text: str | None = None

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.size} bytes, sha256 {self.sha256}" if self.size >= 0 else "not kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A file of the guest that was changed; ``before`` is None for one that was created, ``after`` for one that was removed."""

    path: str
    kind: Kind
    before: FileState | None
    after: FileState | None

    def diff(self) -> str:
        """A unified diff without lines of context, for these may hold secrets that nobody changed; for no text, sizes and hashes."""
        before, after = self.before, self.after
        if any(state is not None and state.text is None for state in (before, after)):
            lines = [f"--- {self.path}", f"+++ {self.path}", f"# {self.kind}"]
            lines += [f"-{before.describe()}"] if before is not None else []
            lines += [f"+{after.describe()}"] if after is not None else []
            return "\n".join(lines) + "\n"
        old, new = ((state.text or "").splitlines() if state is not None else [] for state in (before, after))
        names = ("/dev/null" if before is None else self.path, "/dev/null" if after is None else self.path)
        return "\n".join(difflib.unified_diff(old, new, *names, n=0, lineterm="")) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The stage's report. ``error`` is empty when it came to its end."""

    items: tuple[ItemResult, ...]
    changes: tuple[Change, ...]
    error: str


def audit_text(items: Sequence[ItemResult], changes: Sequence[Change]) -> str:
    """The audit as a text that ``patch`` understands where there are texts: what was done, then every change."""
    head = [f"# {item.name}: {item.status}: {item.detail}" for item in items]
    if changes:
        head.append("# The guest keeps the originals of texts below /var/lib/p2v/originals.")
    return "\n".join(head) + "\n" + "".join(change.diff() for change in changes)


def read_report(port: bytes) -> Report | None:
    """The report in what came through the second serial port; None when there is none, or it is cut off.

    ``AdaptationError`` for one that is damaged or out of bounds: the guest is not trusted.
    """
    begin, end = port.find(_BEGIN), port.rfind(_END)
    if begin < 0 or end < begin:
        return None
    try:
        packed = base64.b64decode(re.sub(rb"\s+", b"", port[begin + len(_BEGIN) : end]), validate=True)
        stated = port[end + len(_END) : end + len(_END) + 64].decode("ascii")
        if hashlib.sha256(packed).hexdigest() != stated:
            raise ValueError("its checksum is another")
        return _report(_members(packed))
    except (ValueError, binascii.Error, zlib.error, tarfile.TarError, EOFError) as error:
        raise AdaptationError(
            f"the report of the self-adaptation boot cannot be used: {error}",
            advice="Run it again; if it happens again, keep the folder with the console log.",
        ) from error


def _members(packed: bytes) -> dict[str, bytes]:
    unpacker = zlib.decompressobj(wbits=31)
    plain = unpacker.decompress(packed, _REPORT_MOST)
    if unpacker.unconsumed_tail:
        raise ValueError(f"more than {_REPORT_MOST} bytes")
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as tar:
        for count, member in enumerate(tar):
            if count > _MEMBERS_MOST * 4:
                raise ValueError("too many files")
            stream = tar.extractfile(member) if member.isreg() else None
            if stream is not None:
                found[member.name.removeprefix("./").removeprefix("out/")] = stream.read()
    return found


def _report(members: Mapping[str, bytes]) -> Report:
    error = _line(members.get("error", b""), most=4000)
    items = []
    for line in members.get("items", b"").decode("utf-8", "replace").splitlines()[:100]:
        name, _, rest = line.partition("\t")
        status, _, detail = rest.partition("\t")
        if status not in {"done", "nothing"} or not re.fullmatch(r"[a-z-]{1,40}", name):
            raise ValueError("an item that is none")
        items.append(ItemResult(name=name, status=Status(status), detail=_line(detail.encode(), most=4000)))
    return Report(items=tuple(items), changes=tuple(_changes(members)), error=error)


def _line(data: bytes, *, most: int) -> str:
    text = " ".join(data[:most].decode("utf-8", "replace").split())
    return "".join(letter for letter in text if letter.isprintable())


def _changes(members: Mapping[str, bytes]) -> Iterator[Change]:
    lines = members.get("changes", b"").decode("utf-8", "surrogateescape").splitlines()
    if len(lines) > _MEMBERS_MOST:
        raise ValueError("too many changes")
    for line in lines:
        number, _, path = line.partition("\t")
        if not re.fullmatch(r"\d{1,6}", number) or not re.fullmatch(r"/[^\x00-\x1f\x7f]{1,4096}", path):
            raise ValueError("a change that is none")
        before, after = _state(members, "before", number), _state(members, "after", number)
        if before is None and f"before/{number}.unknown" in members:
            before = FileState(size=-1, sha256="")
        if before is not None and after is not None:
            if before == after:
                continue
            kind = Kind.MODIFIED
        elif after is not None:
            kind = Kind.CREATED
        elif before is not None:
            kind = Kind.REMOVED
        else:
            continue
        shown = path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        yield Change(path=shown, kind=kind, before=before, after=after)


def _state(members: Mapping[str, bytes], when: str, number: str) -> FileState | None:
    mark = members.get(f"{when}/{number}.sum")
    if mark is None:
        return None
    match = re.fullmatch(rb"([0-9a-f]{64})\n(\d{1,18})\n", mark)
    if match is None:
        raise ValueError("a checksum that is none")
    data = members.get(f"{when}/{number}")
    if data is not None and (len(data) > _TEXT_MOST or hashlib.sha256(data).hexdigest() != match[1].decode()):
        raise ValueError("a file that is not what its checksum says")
    return FileState(size=int(match[2]), sha256=match[1].decode(), text=_text(data))


def _text(data: bytes | None) -> str | None:
    if data is None or b"\0" in data:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None

"""What the source's initramfs images hold: module names, and whether they were made for the source's hardware alone.

``PROGRAM`` runs on the source (python3 >= 3.4, nothing but what Debian's python3-minimal has), reads the images where they lie and prints
names only. The distributions' own listers (lsinitramfs, lsinitrd) write temporary files, so they are not used. An image is a sequence of
newc cpio archives, of which the last is usually compressed (kernel: Documentation/driver-api/early-userspace/buffer-format.rst); that of
an adapted machine has one more behind it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

GLOBS = "/boot/initrd* /boot/initramfs* /boot/*/*/initrd*"
"""Where images lie, as shell globs; one that matches nothing is passed as it is and skipped."""

PROGRAM = r"""
import os, subprocess, sys
TOOLS = [(b"\x28\xb5\x2f\xfd", ["zstd", "-dcq"]), (b"\x1f\x8b", ["gzip", "-dc"]), (b"\xfd7zXZ\x00", ["xz", "-dc"]),
    (b"\x5d\x00\x00", ["xz", "--format=lzma", "-dc"]), (b"BZh", ["bzip2", "-dc"]), (b"\x02\x21\x4c\x18", ["lz4", "-dc"]),
    (b"\x04\x22\x4d\x18", ["lz4", "-dc"]), (b"\x89LZO", ["lzop", "-dc"])]
WANTED = ("conf/initramfs.conf", "conf/conf.d/", "lib/dracut/build-parameter.txt", "lib/dracut/dracut-", "lib/dracut/hostonly",
    "buildconfig", "etc/initrd-release")
out = sys.stdout
SPLICE = getattr(os, "splice", None)
SINK = os.open("/dev/null", os.O_WRONLY)
def show(kind, *rest):
    out.write("\t".join((kind,) + tuple(r.encode("utf-8", "replace").decode("ascii", "replace") for r in rest)) + "\n")
class Stream:
    def __init__(self, f, limit, pipe=False):
        self.f, self.at, self.rest, self.limit, self.pipe = f, 0, b"", limit, pipe
    def take(self, n):
        parts = []
        while n > 0:
            if not self.rest:
                self.rest = self.f.read(4096)
                if not self.rest:
                    break
            piece = self.rest[:n]
            self.rest = self.rest[n:]
            n -= len(piece)
            self.at += len(piece)
            parts.append(piece)
        if self.at > self.limit:
            raise ValueError("more than %d bytes" % self.limit)
        return b"".join(parts)
    def skip(self, n):
        step = min(n, len(self.rest))
        self.rest = self.rest[step:]
        self.at += step
        n -= step
        while n > 65536 and self.pipe and SPLICE:
            step = SPLICE(self.f.fileno(), SINK, min(n, 1 << 20))
            if not step:
                raise ValueError("cut off")
            self.at += step
            n -= step
        while n > 0:
            step = len(self.take(min(n, 1 << 18)))
            if not step:
                raise ValueError("cut off")
            n -= step
def entry(s, head):
    head += s.take(104)
    if len(head) != 110:
        raise ValueError("cut off")
    size, length = int(head[54:62], 16), int(head[94:102], 16)
    if length > 4096:
        raise ValueError("name of %d bytes" % length)
    name = s.take(length).rstrip(b"\0").decode("utf-8", "replace")
    s.skip(-(110 + length) % 4)
    if name.startswith("./"):
        name = name[2:]
    base = name.rsplit("/", 1)[-1]
    plain = name[4:] if name.startswith("usr/") else name
    if ".ko" in base[-7:]:
        show("M", base.split(".ko")[0])
        s.skip(size)
    elif size <= 65536 and plain.startswith(WANTED):
        show("C", plain, "".join("%02x" % c for c in bytearray(s.take(size))))
    else:
        s.skip(size)
    s.skip(-size % 4)
    return name != "TRAILER!!!"
def appended(f, start):
    # what was appended later: gzip behind a block of zeroes, at a multiple of 512 (the decompressor reads in blocks: f's place is unknown)
    rest, at = b"", start
    while True:
        f.seek(at)
        block = f.read(1 << 20)
        if not block:
            return
        at += len(block)
        data = rest + block
        base = at - len(data)
        found = data.find(b"\0" * 512 + b"\x1f\x8b\x08")
        while found >= 0:
            if (base + found) % 512 == 0:
                f.seek(base + found + 512)
                p = subprocess.Popen(["gzip", "-dc"], stdin=f, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                try:
                    archives(Stream(p.stdout, 1 << 32), None)
                finally:
                    p.stdout.close()
                    p.kill()
                    p.wait()
            found = data.find(b"\0" * 512 + b"\x1f\x8b\x08", found + 1)
        rest = data[-514:]
def archives(s, f):
    count = 0
    while True:
        head = s.take(4)
        if not head:
            return
        if head == b"\0\0\0\0":
            continue
        head += s.take(2)
        if head in (b"070701", b"070702"):
            while entry(s, head):
                count += 1
                if count > 200000:
                    raise ValueError("too many entries")
                head = s.take(6)
                if head not in (b"070701", b"070702"):
                    raise ValueError("no cpio header at %d" % (s.at - 6))
            s.skip(-s.at % 4)
            continue
        for magic, tool in TOOLS:
            if f is not None and head.startswith(magic):
                show("Z", tool[0])
                f.seek(s.at - len(head))
                p = subprocess.Popen(tool, stdin=f, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
                try:
                    archives(Stream(p.stdout, 1 << 32, True), None)
                finally:
                    p.stdout.close()
                    p.kill()
                    p.wait()
                appended(f, s.at)
                return
        if f is None:
            return
        raise ValueError("unknown compression " + "".join("%02x" % c for c in bytearray(head)))
for path in sys.argv[1:]:
    if not os.path.isfile(path):
        continue
    show("F", path)
    try:
        with open(path, "rb", 0) as f:
            archives(Stream(f, 1 << 32), f)
        show("E", path)
    except Exception as e:
        show("X", type(e).__name__ + ": " + str(e))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One initramfs: module names without .ko, the small files that tell how it was made, and what went wrong in reading it."""

    path: str
    modules: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    error: str = ""

    @property
    def kind(self) -> str:
        """What made it: initramfs-tools, dracut, mkinitcpio, or empty when not known."""
        names = self.files.keys()
        if any(name.startswith("conf/initramfs.conf") for name in names):
            return "initramfs-tools"
        if any(name.startswith("lib/dracut/") for name in names) or b"dracut" in self.files.get(
            "etc/initrd-release", b""
        ):
            return "dracut"
        return "mkinitcpio" if "buildconfig" in names else ""

    @property
    def host_only(self) -> bool | None:
        """Whether it was made for the source's hardware alone; None when that cannot be told."""
        if self.kind == "initramfs-tools":
            return self._initramfs_tools_host_only()
        if self.kind == "dracut":
            if any(name.startswith("lib/dracut/hostonly") for name in self.files):
                return True
            words = self.files.get("lib/dracut/build-parameter.txt", b"").split()
            return False if {b"--no-hostonly", b"-N"} & {word.strip(b"'\"") for word in words} else None
        if self.kind == "mkinitcpio":
            hooks = re.search(rb"^HOOKS=(.*)$", self.files["buildconfig"], re.MULTILINE)
            return None if hooks is None else b"autodetect" in hooks[1]
        return None

    def _initramfs_tools_host_only(self) -> bool | None:
        # files in conf.d are read after initramfs.conf and win
        order = sorted(self.files, key=lambda name: (name.startswith("conf/conf.d/"), name))
        found = [
            match[1]
            for name in order
            for match in re.finditer(rb"^\s*MODULES=\"?(\w+)", self.files[name], re.MULTILINE)
        ]
        return found[-1] in (b"dep", b"list") if found else None


def parse(output: bytes) -> dict[str, Image]:
    """What ``PROGRAM`` printed, by path. An image whose listing is cut off has an ``error``."""
    images: dict[str, Image] = {}
    path, modules, files = "", set[str](), dict[str, bytes]()

    def close(error: str) -> None:
        if path:
            images[path] = Image(path=path, modules=tuple(sorted(modules)), files=files, error=error)

    for line in output.decode("utf-8", "replace").splitlines():
        kind, _, rest = line.partition("\t")
        if kind == "F":
            close("the listing was cut off")
            path, modules, files = rest, set(), {}
        elif kind == "M":
            modules.add(rest)
        elif kind == "C":
            name, _, content = rest.partition("\t")
            files[name] = bytes.fromhex(content) if re.fullmatch(r"(?:[0-9a-f]{2})*", content) else b""
        elif kind in {"E", "X"}:
            close(rest if kind == "X" else "")
            path = ""
    close("the listing was cut off")
    return images

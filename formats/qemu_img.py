"""The one module that starts qemu-img and qemu-nbd.

What it guarantees about every start:

- the format of an image is always stated, never guessed by QEMU, and no backing file is ever followed
  (``"backing": null``): what an image names inside itself is the business of ``formats.images``;
- a path is handed over as a JSON node with an absolute file name, so that no name can be taken for an option or a protocol;
- no process outlives its use: it is ended when the caller leaves, and a watcher ends it when this process is killed outright;
- the language of messages is fixed, output is bounded, and a failure becomes an error of the tree with QEMU's own last words.

Exit codes and switches are those of qemu-img(1) and qemu-nbd(8), QEMU 7.2.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

from formats.block import Extent, Kind, merged
from formats.errors import ImageToolError, InterruptedRunError, NoSpaceError
from formats.progress import Progress, Silence

_PACKAGE = "qemu-utils"  # the Debian package of both programs
_POLL = 0.1  # seconds between looks at the stop flag
_OUTPUT_LIMIT = 64 << 20  # bytes of standard output that are kept; more is a broken program
_TAIL = 4096  # bytes of standard error that are kept
_START_SECONDS = 60.0  # for an image to be opened; metadata of a huge image is read then
_STOP_SECONDS = 300.0  # for cached writes to reach a slow disk when a server ends

# The shell becomes the program (same process id). Its background child waits on the pipe whose other end only this process
# holds: a line dismisses it, end of file means that this process is gone. A parent-death signal would be tied to the
# *thread* that started the program, and cannot be set without running code between fork and exec. The signal is repeated
# because qemu-nbd forgets one that comes before its main loop runs.
_GUARDED = """
exec 3<&0 </dev/null
( read -r _ <&3 || {
    [ "$0" = - ] || rm -rf -- "$0"
    for _ in 1 2 3 4 5; do kill -TERM $$ || exit; sleep 1; done
} ) >/dev/null 2>&1 &
exec "$@" 3<&-
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """What qemu-img says of an image: sizes in bytes; ``detail`` is its whole JSON answer."""

    format: str
    virtual_size: int
    actual_size: int
    detail: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The result of a consistency check.

    ``clean`` is true when no defect was found; for a format without a check (``supported`` false) that means nothing was looked at.
    ``corruptions`` make the image unusable, ``leaks`` only waste room. ``text`` is one line for a person.
    """

    clean: bool
    text: str
    supported: bool = True
    corruptions: int = 0
    leaks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Whether two images hold the same disk; ``offset`` of the first difference in bytes where qemu-img told it."""

    equal: bool
    text: str
    offset: int | None = None


def version() -> tuple[int, int, int]:
    """Version of the installed qemu-img."""
    answer = _run(["qemu-img", "--version"], timeout=30).output.decode(errors="replace")
    found = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", answer)
    if found is None:
        raise ImageToolError(f"qemu-img does not tell its version: {answer[:80]!r}")
    return int(found[1]), int(found[2]), int(found[3] or 0)


def create(path: Path, image_format: str, size: int, options: Mapping[str, str] | None = None) -> None:
    """Create an empty image of ``size`` virtual bytes; an existing file is overwritten.

    ``options`` are creation options of the format (``qemu-img create -f FORMAT -o help``); values may hold no comma.
    """
    argv = ["qemu-img", "create", "-q", "-f", image_format]
    if options:
        if any("," in text for pair in options.items() for text in pair):
            raise ValueError(f"a creation option holds a comma: {options}")
        argv += ["-o", ",".join(f"{name}={value}" for name, value in options.items())]
    _checked([*argv, "--", str(_absolute(path)), str(size)], path, timeout=600)


def info(path: Path, image_format: str) -> ImageInfo:
    """Ask qemu-img about one image; its backing file is not opened."""
    detail = _json(_checked(["qemu-img", "info", "--output=json", node(path, image_format)], path, timeout=60).output)
    virtual, actual = detail.get("virtual-size"), detail.get("actual-size")
    if not isinstance(virtual, int):
        raise ImageToolError(f"qemu-img does not tell the size of {path}", subject=str(path))
    return ImageInfo(
        format=str(detail.get("format", image_format)),
        virtual_size=virtual,
        actual_size=actual if isinstance(actual, int) else 0,
        detail=detail,
    )


def check(
    path: Path,
    image_format: str,
    *,
    repair: str = "",
    stop: threading.Event | None = None,
    timeout: float | None = None,
) -> CheckReport:
    """Check an image's own structures, with ``repair`` ``leaks`` or ``all`` mending them.

    A corrupt image is a report, not an error; ``ImageToolError`` when the check itself could not be made.
    """
    argv = ["qemu-img", "check", "--output=json", *(["-r", repair] if repair else []), node(path, image_format)]
    result = _run(argv, timeout=timeout, stop=stop)
    if result.code == 63:
        text = f"format {image_format} has no structures to check"
        return CheckReport(clean=True, text=text, supported=False)
    if result.code not in (0, 2, 3):
        raise _failure("qemu-img check", result, path)
    answer = _json(result.output)
    corruptions, leaks, errors = (_count(answer, name) for name in ("corruptions", "leaks", "check-errors"))
    clean = result.code == 0 and corruptions == leaks == errors == 0
    text = "no errors were found" if clean else f"{corruptions} corruptions, {leaks} leaked clusters, {errors} errors"
    return CheckReport(clean=clean, text=text, corruptions=corruptions + errors, leaks=leaks)


def written(overlay: Path) -> list[Extent]:
    """What a qcow2 overlay holds itself, as ascending DATA and ZERO extents; the disk below it is not looked at."""
    result = _checked(["qemu-img", "map", "--output=json", node(overlay, "qcow2")], overlay, timeout=600)
    found = []
    try:
        for entry in json.loads(result.output):
            if entry["present"] or entry["data"]:
                kind = Kind.ZERO if entry["zero"] and not entry["data"] else Kind.DATA
                found.append(Extent(int(entry["start"]), int(entry["length"]), kind))
    except (ValueError, KeyError, TypeError) as error:
        raise ImageToolError("qemu-img map printed what cannot be understood", subject=str(overlay)) from error
    return list(merged(found))


def compare(
    first: Path | str,
    first_format: str,
    second: Path | str,
    second_format: str,
    *,
    progress: Progress | None = None,
    total: int | None = None,
    stop: threading.Event | None = None,
) -> Comparison:
    """Compare what two images read as; each is a path or an NBD URI.

    Disks of different size are equal when the longer one's rest reads as zeroes. ``progress`` advances up to ``total`` bytes.
    """
    operands = [node(first, first_format), node(second, second_format)]
    with _percent(progress, "compare", total) as listener:
        result = _run(["qemu-img", "compare", "-p", *operands], stop=stop, listen=listener)
    if result.code not in (0, 1):
        raise _failure("qemu-img compare", result, first)
    text = result.output.decode(errors="replace").replace("\r", "\n").strip().rsplit("\n", 1)[-1].strip()
    found = re.search(r"offset (\d+)", text)
    return Comparison(equal=result.code == 0, text=text, offset=int(found[1]) if found else None)


def convert(
    source: Path | str,
    source_format: str,
    target: Path | str,
    target_format: str,
    *,
    options: Mapping[str, str] | None = None,
    compress: bool = False,
    any_order: bool = False,
    existing: bool = False,
    progress: Progress | None = None,
    total: int | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Copy a whole disk from one image (path or NBD URI) into another.

    ``existing`` writes into a target that is there already and reads as zeroes; ``any_order`` lets qemu-img write out of order.
    ``progress`` advances up to ``total`` bytes. On any failure the target's content is undefined.
    """
    argv = ["qemu-img", "convert", "-p", *(["-c"] if compress else []), *(["-W"] if any_order else [])]
    if existing:
        argv += ["-n", "--target-is-zero", "--target-image-opts"]
        destination = _image_options(target, target_format)
    else:
        argv += ["-O", target_format]
        destination = target if isinstance(target, str) else str(_absolute(target))
    if options:
        argv += ["-o", ",".join(f"{name}={value}" for name, value in options.items())]
    with _percent(progress, "convert", total) as listener:
        result = _run([*argv, node(source, source_format), destination], stop=stop, listen=listener)
    if result.code != 0:
        raise _failure("qemu-img convert", result, target)


class Server:
    """A running qemu-nbd that serves one image on a private Unix socket; a context manager.

    ``options`` are run-time options of the format's driver. ``backing`` is the NBD URI of the disk below a qcow2 overlay; without it
    nothing lies below. ``clients`` bounds simultaneous connections. The socket lies in a directory of its own with mode 0700.
    """

    def __init__(
        self,
        image: Path,
        image_format: str,
        *,
        writable: bool = False,
        clients: int = 16,
        cache: str = "writeback",
        options: Mapping[str, object] | None = None,
        backing: str = "",
    ) -> None:
        self.image = image
        self._folder = Path(tempfile.mkdtemp(prefix="p2v-nbd-", dir=_socket_home()))
        self._socket = self._folder / "s"
        argv = ["qemu-nbd", "--persistent", f"--shared={clients}", f"--socket={self._socket}", f"--cache={cache}"]
        argv += ["--discard=unmap"] if writable else ["--read-only"]
        argv.append(node(image, image_format, options=options, backing=backing))
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        self._closed = False
        try:
            self._process = _Guarded(argv, output=subprocess.DEVNULL, errors=self._errors, remove=self._folder)
            self._wait_ready()
        except BaseException:
            self._end()
            raise

    @property
    def uri(self) -> str:
        """The NBD URI of the image."""
        return f"nbd+unix:///?socket={quote(str(self._socket))}"

    @property
    def pid(self) -> int:
        """Process id of qemu-nbd."""
        return self._process.popen.pid

    def last_words(self) -> str:
        """The end of what qemu-nbd wrote to standard error so far; often empty."""
        return _tail(self._errors)

    def close(self) -> None:
        """End the server after its cached writes are down; ``ImageToolError`` when it had failed. Idempotent."""
        if self._closed:
            return
        code, words = self._end()
        if code not in (0, None):
            text = f"qemu-nbd ended with code {code}: {words or 'no message'}"
            raise ImageToolError(text, subject=str(self.image))

    def _end(self) -> tuple[int | None, str]:
        self._closed = True
        process = getattr(self, "_process", None)
        code = process.end(_STOP_SECONDS) if process is not None else None
        words = _tail(self._errors)
        self._errors.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        return code, words

    def _wait_ready(self) -> None:
        deadline, pause = time.monotonic() + _START_SECONDS, 0.002
        while True:
            if (code := self._process.popen.poll()) is not None:
                raise _failure("qemu-nbd", _Result(code, b"", self.last_words()), self.image)
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                probe.settimeout(1)
                probe.connect(str(self._socket))
                if probe.recv(8) == b"NBDMAGIC":  # sent by the main loop: from here on it also obeys signals
                    return
            if time.monotonic() > deadline:
                text = f"qemu-nbd did not open {self.image} within {_START_SECONDS:.0f} s"
                raise ImageToolError(text, subject=str(self.image))
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ImageToolError) if error is not None else contextlib.nullcontext():
            self.close()


@contextlib.contextmanager
def serve(image: Path, image_format: str, *, writable: bool = False) -> Iterator[str]:
    """Serve an image over NBD while the context is open; yields its URI. See ``Server`` for the guarantees."""
    with Server(image, image_format, writable=writable) as server:
        yield server.uri


def node(
    image: Path | str,
    image_format: str,
    *,
    options: Mapping[str, object] | None = None,
    backing: str = "",
) -> str:
    """The ``json:`` name of an image for QEMU: its format stated, its backing file cut off or replaced by the NBD URI ``backing``; an
    NBD URI as ``image`` stays as it is.
    """
    if isinstance(image, str):
        if not image.startswith(("nbd://", "nbd+unix://")):
            raise ValueError(f"neither a path nor an NBD URI: {image!r}")
        return image
    tree: dict[str, object] = {"driver": image_format, "file": _file_node(image), **(options or {})}
    if image_format in ("qcow2", "vmdk", "qed", "qcow"):
        tree["backing"] = {"driver": "raw", "file": _nbd_node(backing)} if backing else None
    return "json:" + json.dumps(tree, ensure_ascii=False)


def _file_node(image: Path) -> dict[str, object]:
    path = _absolute(image)
    is_device = path.exists() and stat.S_ISBLK(path.stat().st_mode)
    return {"driver": "host_device" if is_device else "file", "filename": str(path)}


def _nbd_node(uri: str) -> dict[str, object]:
    export, path = _unix_address(uri)
    return {"driver": "nbd", "server": {"type": "unix", "path": path}, "export": export}


def _unix_address(uri: str) -> tuple[str, str]:
    """Export and socket path of an NBD URI."""
    from urllib.parse import unquote

    found = re.fullmatch(r"nbd\+unix:///([^?]*)\?socket=(.+)", uri)
    if found is None:
        raise ValueError(f"not an NBD URI of a Unix socket: {uri!r}")
    return unquote(found[1]), unquote(found[2])


def _image_options(target: Path | str, target_format: str) -> str:
    # qemu-img takes no JSON node where it is told to expect image options; a comma is doubled there.
    if isinstance(target, str):
        export, path = _unix_address(target)
        text = f"driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={path.replace(',', ',,')}"
        return text + (f",file.export={export.replace(',', ',,')}" if export else "")
    file = _file_node(target)
    name = str(file["filename"]).replace(",", ",,")
    return f"driver={target_format},file.driver={file['driver']},file.filename={name}"


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow symbolic links


def _socket_home() -> str | None:
    # The path of a Unix socket has at most 107 bytes (unix(7)).
    return None if len(os.fsencode(tempfile.gettempdir())) < 80 else "/tmp"  # noqa: S108


class _Guarded:
    """A child process that ends when this process does, however this process ends."""

    def __init__(
        self, argv: list[str], *, output: int | IO[bytes], errors: int | IO[bytes], remove: Path | None = None
    ) -> None:
        if shutil.which(argv[0]) is None:
            advice = f"install the Debian package {_PACKAGE}: apt-get install {_PACKAGE}"
            raise ImageToolError(f"the program {argv[0]} is not installed", advice=advice)
        # P2V_ variables may hold secrets.
        # start_new_session: Ctrl-C at a terminal reaches this process alone, which then ends its children in order.
        self.popen = subprocess.Popen(
            ["/bin/sh", "-c", _GUARDED, str(remove or "-"), *argv],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
            env={name: text for name, text in os.environ.items() if not name.startswith("P2V_")} | {"LC_ALL": "C"},
            start_new_session=True,
        )

    def end(self, patience: float) -> int:
        """Ask the program to end, wait, kill it after ``patience`` seconds; returns its exit code. Idempotent."""
        deadline = time.monotonic() + patience
        while self.popen.poll() is None:
            late = time.monotonic() > deadline
            self.popen.kill() if late else self.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(1)
        code = self.popen.wait()
        if self.popen.stdin is not None and not self.popen.stdin.closed:
            with contextlib.suppress(OSError):
                self.popen.stdin.write(b"\n")  # dismisses the watcher before its process id can mean another process
                self.popen.stdin.close()
        return code


@dataclass(frozen=True, slots=True)
class _Result:
    code: int
    output: bytes
    errors: str


def _run(
    argv: list[str],
    *,
    timeout: float | None = None,
    stop: threading.Event | None = None,
    listen: Callable[[bytes], None] | None = None,
) -> _Result:
    """Run to the end; ``stop`` kills it and raises ``InterruptedRunError``, ``timeout`` seconds kill it and raise."""
    process = _Guarded(argv, output=subprocess.PIPE, errors=subprocess.PIPE)
    popen = process.popen
    assert popen.stdout is not None and popen.stderr is not None  # noqa: S101 - both are pipes
    deadline = None if timeout is None else time.monotonic() + timeout
    output, errors = bytearray(), bytearray()
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(popen.stdout, selectors.EVENT_READ, output)
            selector.register(popen.stderr, selectors.EVENT_READ, errors)
            while selector.get_map():
                for key, _ in selector.select(_POLL):
                    chunk = os.read(key.fd, 1 << 16)
                    key.data.extend(chunk)
                    if not chunk:
                        selector.unregister(key.fileobj)
                    elif key.data is output and listen is not None:
                        listen(chunk)
                del errors[:-_TAIL]
                _enforce(argv, len(output), deadline, stop)
        popen.wait(None if deadline is None else max(deadline - time.monotonic(), 1))
    except subprocess.TimeoutExpired as error:
        raise ImageToolError(f"{argv[0]} closed its output but did not end") from error
    finally:
        code = process.end(5)
        popen.stdout.close()
        popen.stderr.close()
    return _Result(code, bytes(output), errors.decode(errors="replace").strip())


def _enforce(argv: list[str], size: int, deadline: float | None, stop: threading.Event | None) -> None:
    name = " ".join(argv[:2])
    if stop is not None and stop.is_set():
        raise InterruptedRunError(f"{name} was stopped")
    if deadline is not None and time.monotonic() > deadline:
        raise ImageToolError(
            f"{name} did not end in time", advice="look for a stuck file system or device below the image"
        )
    if size > _OUTPUT_LIMIT:
        raise ImageToolError(f"{name} wrote more than {_OUTPUT_LIMIT} bytes of output")


def _checked(argv: list[str], subject: Path, *, timeout: float) -> _Result:
    result = _run(argv, timeout=timeout)
    if result.code != 0:
        raise _failure(" ".join(argv[:2]), result, subject)
    return result


def _failure(name: str, result: _Result, subject: Path | str) -> NoSpaceError | ImageToolError:
    """The error for a program that failed, with its last words."""
    words = re.sub(r"'?json:\{.*\}'?", f"'{subject}'", result.errors)
    words = re.sub(r"^qemu-(?:img|nbd): ", "", words, flags=re.MULTILINE).strip().replace("\n", "; ")
    if "No space left on device" in words or "Disk quota exceeded" in words or ("writ" in words and _is_full(subject)):
        return NoSpaceError(f"no space is left for {subject}", advice="free space there or name another place")
    advice = ""
    if "lock" in words:
        advice = "another program has the image open; end it first"
    elif "Permission denied" in words:
        advice = "give the user that runs this command access to the file"
    return ImageToolError(
        f"{name} failed ({result.code}): {words or 'no message'}", advice=advice, subject=str(subject)
    )


def _is_full(subject: Path | str) -> bool:
    """Whether the file system that holds ``subject`` has no room left: not every driver of QEMU passes on why a write failed."""
    try:
        state = os.statvfs(subject if Path(subject).exists() else Path(subject).parent)
    except OSError:
        return False
    return state.f_bavail * state.f_frsize < 1 << 16


def _tail(file: IO[bytes]) -> str:
    if file.closed:
        return ""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    return file.read(_TAIL).decode(errors="replace").strip()


def _json(output: bytes) -> dict[str, object]:
    try:
        answer = json.loads(output)
    except ValueError as error:
        raise ImageToolError(f"qemu-img answered no JSON: {output[:80]!r}") from error
    if not isinstance(answer, dict):
        raise ImageToolError("qemu-img answered JSON of an unknown shape")
    return answer


def _count(answer: Mapping[str, object], name: str) -> int:
    value = answer.get(name, 0)
    return value if isinstance(value, int) else 0


@contextlib.contextmanager
def _percent(progress: Progress | None, label: str, total: int | None) -> Iterator[Callable[[bytes], None]]:
    """Turn ``    (12.34/100%)\\r`` on standard output into bytes of ``total``."""
    bar = progress or Silence()
    bar.start(label, total)
    pending, done = b"", 0

    def listen(chunk: bytes) -> None:
        nonlocal pending, done
        found = re.findall(rb"\((\d+(?:\.\d+)?)/100%\)", pending + chunk)
        pending = (pending + chunk)[-32:].rsplit(b"\r", 1)[-1]
        if found and total:
            now = min(total, int(total * float(found[-1]) / 100))
            if now > done:
                bar.advance(now - done)
                done = now

    try:
        yield listen
    finally:
        bar.finish()


__all__ = [
    "CheckReport",
    "Comparison",
    "ImageInfo",
    "Server",
    "check",
    "compare",
    "convert",
    "create",
    "info",
    "node",
    "serve",
    "version",
]

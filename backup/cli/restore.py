"""Commands that bring back what is stored."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from backup.cli.base import CONNECTION, OUTPUT, PLACE, Place, app
from formats.errors import Notice, UsageError
from p2v.cli import Connection, Output, perform
from p2v.console import Console, human_size

if TYPE_CHECKING:
    from backup.restore import PointOrigin


@app.command
def restore(
    point: str,
    /,
    *,
    to: str = "",
    destination: Annotated[Path | None, Parameter(name="--output", alias="-o")] = None,
    disk_format: Annotated[str, Parameter(name="--disk-format")] = "",
    name: str = "",
    boot_check: Annotated[str, Parameter(name="--boot-check")] = "none",
    as_clone: Annotated[bool, Parameter(name="--as-clone")] = False,
    disk: int | None = None,
    device: str = "",
    in_place: Annotated[bool, Parameter(name="--in-place")] = False,
    salvage: bool = False,
    place: Place = PLACE,
    connection: Connection = CONNECTION,
    output: Output = OUTPUT,
) -> int:
    """Bring a machine back as a VM for a platform (--to, -o), or one disk to a device or file (--disk, --device).

    Parameters
    ----------
    point
        its id or a unique beginning, `latest`, or MACHINE@latest.
    to
        target platform; see `p2v platforms`.
    destination
        folder for disks and definition; made if it is not there.
    disk_format
        disk format, instead of the platform's usual one.
    name
        name of the virtual machine, instead of the machine's own.
    boot_check
        `boots`: see it boot from the repository before the copy. `none`: do not.
    as_clone
        the machine is to run beside its original: another name, other MAC addresses and hardware UUID. What both still share is said.
    disk
        number of the disk to restore, the boot disk being 0.
    device
        block device to write over, or new file; ssh://USER@HOST/dev/X is a device of another computer (a rescue system with SSH and
        Python is enough there), which is read back afterwards. A device in use is refused.
    in_place
        the device, or raw image, holds another state of this disk: read it, and write only what differs.
    salvage
        go on past damage: what cannot be read becomes zeroes and is listed.
    """

    def action(console: Console) -> None:
        from backup.clone import shared_identity
        from backup.place import open_repository
        from backup.restore import PointOrigin, disk_number, no_holes

        if (to == "") == (device == "") or (device == "") != (disk is None) or (to != "") != (destination is not None):
            raise UsageError("say where to", advice="Either --to PLATFORM -o FOLDER, or --disk N --device DEV.")
        if as_clone and not to:
            raise UsageError("--as-clone goes with --to PLATFORM: a disk alone has no identity that could be changed")
        if in_place and (not device or "://" in device or salvage):
            raise UsageError("--in-place goes with --disk N and a local --device DEV, and not with --salvage")
        with open_repository(place.repo, notice=console.notice) as repository:
            found = repository.find_point(point)
            holes = no_holes(found) if salvage else None
            origin = PointOrigin(repository, found, holes=holes, as_clone=as_clone)
            console.data["point"] = found.name
            if destination is not None:
                from p2v.convert import Conversion, Request

                request = Request(
                    platform=to, destination=destination, disk_format=disk_format, name=name, boot_check=boot_check,
                    adapt=False, restore=True,
                )  # fmt: skip
                Conversion(origin, request, console).run()
                for notice in shared_identity(found.machine) if as_clone else ():
                    console.notice(notice)
            elif disk is not None:
                disk_id = disk_number(found, disk)
                if "://" in device:
                    _to_host(console, origin, disk_id, device, connection)
                else:
                    _disk(console, origin, disk_id, Path(device), in_place=in_place)
            for disk_id, lost in (holes or {}).items():
                for hole in sorted(lost):
                    message = f"{hole.length} bytes at {hole.start} could not be restored; zeroes are in their place"
                    console.notice(Notice(code="hole", message=message, subject=disk_id))

    return perform("restore", output, action)


def _disk(console: Console, origin: PointOrigin, disk_id: str, device: Path, *, in_place: bool) -> None:
    """One disk of the point to a device or file."""
    from backup.restore import restore_disk, revert_disk

    with origin.capture() as capture, console.stage(f"restore {disk_id}") as stage:
        progress = console.progress("restore")
        if in_place:
            (stored,) = (disk for disk in capture.point.disks if disk.id == disk_id)
            done, kept = revert_disk(capture.repository, stored, device, progress)
            stage.detail = f"{human_size(kept)} of {human_size(done.size)} were there already, at {device}"
        else:
            done, kept = restore_disk(capture.disks[disk_id].source, device, progress), 0
            stage.detail = f"{human_size(done.read)} of {human_size(done.size)} written to {device}"
    console.data["restored"] = {"size": done.size, "read": done.read, "written": done.written, "kept": kept}


def _to_host(console: Console, origin: PointOrigin, disk_id: str, device: str, connection: Connection) -> None:
    """One disk of the point to a device of another host."""
    from backup.restore import restore_to_host
    from p2v.device import parse_device
    from p2v.origin import ssh_target
    from p2v.session import Session

    host, path = parse_device(device)
    target = ssh_target(host, connection.identity, connection.known_hosts)
    with origin.capture() as capture, Session.connect(target) as session, console.stage(f"restore {disk_id}") as stage:
        source = capture.disks[disk_id].source
        done = restore_to_host(source, session, path, console.progress("restore"), console.progress("verify"))
        stage.detail = (
            f"{human_size(done.read)} of {human_size(done.size)} written to {session.host}:{path} and read back"
        )
    console.data["restored"] = {"size": done.size, "read": done.read, "written": done.written, "kept": 0}


@app.command
def serve(
    point: str,
    /,
    *,
    socket: Path | None = None,
    port: int | None = None,
    writable: bool = False,
    overlays: Path | None = None,
    place: Place = PLACE,
    output: Output = OUTPUT,
) -> int:
    """Serve the disks of a point over NBD until interrupted: a machine can start from the repository at once.

    Parameters
    ----------
    point
        its id or a unique beginning, `latest`, or MACHINE@latest.
    socket
        path of the Unix socket, instead of one in a private folder.
    port
        TCP port on the loopback address; 0: any. Open to every user of the computer.
    writable
        take writes into memory; they are gone at the end, and the point does not change.
    overlays
        folder for qcow2 images over the disks, which keep what a machine writes: start it from them. They go on when the same point is
        served with the same folder again.
    """

    def action(console: Console) -> None:
        from backup.place import open_repository
        from backup.reader import StoredCapture
        from backup.restore import kept_overlays, serving

        if overlays is not None:
            if socket is not None or port is not None or writable:
                raise UsageError(
                    "--overlays has its own socket, and the disks below are read only", advice="Name it alone."
                )
            if "," in str(overlays):
                raise UsageError("--overlays takes a folder without a comma in its name")
            overlays.mkdir(parents=True, exist_ok=True)
        sock = overlays.resolve() / "nbd.sock" if overlays is not None else socket
        with (
            open_repository(place.repo, notice=console.notice) as repository,
            StoredCapture(repository, repository.find_point(point)) as capture,
            serving(capture, socket=sock, port=port, writable=writable) as (server, uris),
        ):
            kept = kept_overlays(capture.point, overlays, uris) if overlays is not None else []
            console.data |= {"uris": uris, "overlays": [str(path) for path in kept]}
            for number, uri in enumerate(uris):
                console.say(f"disk {number}  {kept[number] if kept else uri}")
            console.stdout.flush()
            ended = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, lambda *_: ended.set())
            ended.wait()
            if server.error is not None:
                raise server.error

    return perform("serve", output, action)

"""A test machine that lives beside its disks at rest: what was learnt of it, and its disks under overlays that an adaptation fills."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from formats.machine import Machine
from p2v.adapt import Adaptation, GuestKernel, adapt, fetch_kernel, plan_adaptation
from p2v.collect.ssh import SshOrigin
from p2v.emulator import Drive, create_overlay
from p2v.session import SshTarget
from tests.machines.physical import PhysicalMachine


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveSource:
    """What was learnt of the live machine, and its disks as they were built: nobody writes to them."""

    machine: Machine
    kernel: GuestKernel
    disks: tuple[Path, ...]

    def drives(self, folder: Path) -> list[Drive]:
        """The disks with kept overlays below ``folder``: new ones, or those that are there."""
        return [self._drive(disk, folder / f"{disk.stem}.overlay") for disk in self.disks]

    @staticmethod
    def _drive(disk: Path, overlay: Path) -> Drive:
        if not overlay.exists():
            create_overlay(overlay, disk.stat().st_size)
        return Drive(path=disk, format="raw", overlay=overlay)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedSource:
    """A source after its adaptation, which lies in ``folder``."""

    source: LiveSource
    done: Adaptation
    folder: Path
    heard: tuple[str, ...]

    def drives(self, folder: Path) -> list[Drive]:
        """The adapted disks, with copies of their overlays below ``folder``."""
        for drive in self.source.drives(self.folder):
            assert drive.overlay is not None
            shutil.copyfile(drive.overlay, folder / drive.overlay.name)
        return self.source.drives(folder)


def live_source(physical: PhysicalMachine, folder: Path) -> LiveSource:
    """Inspect a running machine and fetch its kernel into ``folder``."""
    target = SshTarget(
        host="127.0.0.1",
        user="root",
        port=physical.ssh_port,
        identity=physical.identity,
        known_hosts=physical.known_hosts,
    )
    with SshOrigin(target) as origin:
        machine = origin.inspect()
        kernel = fetch_kernel(origin.session, machine, folder)
    return LiveSource(machine=machine, kernel=kernel, disks=(physical.machine.disk, *physical.machine.further_disks))


def adapted_source(source: LiveSource, folder: Path) -> AdaptedSource:
    """Adapt a source for any hardware."""
    heard: list[str] = []
    plan = plan_adaptation(source.machine)
    done = adapt(plan, source.machine, source.kernel, source.drives(folder), folder, listen=heard.append)
    return AdaptedSource(source=source, done=done, folder=folder, heard=tuple(heard))

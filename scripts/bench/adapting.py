"""What it costs to make a disk boot on other hardware and to see it boot, beside what virt-v2v takes to convert it unseen.

Both start from the same disk image of a test machine and run in turn, without KVM for either (virt-v2v's appliance by
``LIBGUESTFS_BACKEND_SETTINGS=force_tcg`` where /dev/kvm is of no use). Ours is the whole ``p2v convert``, of which adaptation and
boot check are shown apart; what virt-v2v made is then booted by ``p2v boot``, as it does not look itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.machines.builder import build
from tests.machines.recipe import RECIPES

_P2V = Path(sys.executable).with_name("p2v")
_VERDICT = ("fetch kernel", "adapt", "boot check")


def main() -> None:
    """Run both in turn and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--machine", choices=sorted(RECIPES), default="bios-lvm")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: the temporary folder")
    options = parser.parse_args()
    if shutil.which("virt-v2v") is None:
        raise SystemExit("virt-v2v is missing: apt-get install virt-v2v libguestfs-tools linux-image-cloud-amd64")
    disk = build(RECIPES[options.machine]).disk
    print(f"{options.machine}: {disk.stat().st_size >> 20} MiB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    theirs, mine = [], []
    for number in range(options.runs):
        with tempfile.TemporaryDirectory(prefix="p2v-bench-", dir=options.folder) as work:
            seconds = by_virt_v2v(disk, Path(work, "theirs"))
            boots = booted(Path(work, "theirs"))
            theirs.append(seconds)
            print(f"run {number + 1}: virt-v2v {seconds:.1f} s, its result: {boots}")
            stages, verdict = ours(disk, Path(work, "ours"))
            mine.append(sum(stages.get(name, 0.0) for name in _VERDICT))
            shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items())
            print(f"run {number + 1}: ours {mine[-1]:.1f} s to the verdict {verdict} ({shown})")
    ratio = statistics.median(mine) / statistics.median(theirs)
    print(f"{'met   ' if ratio <= 0.5 else 'MISSED'} verdict against conversion: {ratio:.2f} (target 0.5)")


def by_virt_v2v(disk: Path, folder: Path) -> float:
    """Seconds that virt-v2v takes to convert the disk."""
    folder.mkdir()
    environment = {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
    command = ["virt-v2v", "-i", "disk", str(disk), "-o", "local", "-os", str(folder), "-of", "qcow2", "-on", "theirs"]
    started = time.monotonic()
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"virt-v2v failed: {done.stdout[-2000:]}")
    return time.monotonic() - started


def booted(folder: Path) -> str:
    """The verdict on what virt-v2v wrote."""
    (image,) = folder.glob("theirs-sda*")
    data = _p2v("boot", str(image), "--from", "qcow2")["data"]
    return f"{data['verdict']['level']}/{data['verdict']['result']}"


def ours(disk: Path, folder: Path) -> tuple[dict[str, float], str]:
    """Seconds of each stage of our conversion, and its verdict."""
    data = _p2v("convert", str(disk), "--to", "libvirt", "-o", str(folder))["data"]
    stages = {stage["name"]: float(stage["seconds"]) for stage in data["stages"]}
    return stages, f"{data['verdict']['level']}/{data['verdict']['result']}"


def _p2v(*words: str) -> dict[str, Any]:
    done = subprocess.run([_P2V, *words, "--json", "-q"], stdout=subprocess.PIPE, check=False)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


if __name__ == "__main__":
    main()

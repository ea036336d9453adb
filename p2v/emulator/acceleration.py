"""Whether KVM really runs a guest here, proven by use.

That /dev/kvm can be opened says little: there are hosts whose KVM interprets guest code instruction by instruction, so that firmware
runs and a kernel's unpacker never ends. The proof is a boot sector that does in small what a kernel does early: rounds in real
mode, in protected mode without paging, in long mode with stores, then a locked 16-byte exchange and an SSE operation. It must
end within `PROOF_SECONDS`; interpreted code is slower by a factor of hundreds, TCG needs about a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from enum import StrEnum
from pathlib import Path

from p2v.emulator.process import Program, guarded

PROOF_SECONDS = 6.0
"""Seconds in which the proof must have ended; on working hardware virtualization it needs a third of one."""

# The code, at 0x7c00; each mode says its letter on port 0xe9 when it is entered, K at the end.
#   R  real mode, 2^20 rounds of dec/jnz; then page tables at 0x1000 (PML4), 0x2000, 0x3000: the first 2 MiB, identical
#   P  protected mode, paging off, 2^24 rounds
#   L  long mode, 2^26 rounds of mov [0x8000], rcx / dec / jnz; lock cmpxchg16b [0x8000]; movups xmm0, [0x8000]; paddq xmm0, xmm0
#   K  then hlt for ever
_PROOF = bytes.fromhex(
    "fa31c08ed88ec08ed0bc007cb052e6e966b900001000664975fc66bf00100000b9000c6631c0fc66f3abc70600100320c70600200330c70600308300"
    "0f0116e87c0f20c00c010f22c0ea4e7c080066b810008ed88ec08ed0b050e6e9b9000000014975fd0f20e00d200600000f22e0b8001000000f22d8b9"
    "800000c00f320d000100000f300f20c083e0fb0d020000800f22c0ea9a7c00001800b04ce6e9b900000004bf0080000048890fffc975f9f0480fc70f"
    "0f1007660fd4c0b04be6e9f4ebfd660f1f4400000000000000000000ffff0000009acf00ffff00000092cf00ffff0000009aaf001f00c87c0000"
)


class Accelerator(StrEnum):
    """What runs the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


def proven_accelerator(program: Program) -> Accelerator:
    """KVM if it was seen to work on this boot of the host with this QEMU, otherwise TCG.

    The answer is kept in the user's cache folder, keyed by boot id, QEMU's version and whether the device may be used.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Accelerator.TCG
    key = f"{_boot_id()} {program.path} {program.version_text}"
    cache = _cache_folder() / "acceleration.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(cache.read_text())
        if known["key"] == key:
            return Accelerator(known["accelerator"])
    answer = Accelerator.KVM if runs_code(program, Accelerator.KVM) else Accelerator.TCG
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        new = cache.with_name(f"{cache.name}.{os.getpid()}")
        new.write_text(json.dumps({"key": key, "accelerator": answer}))
        new.replace(cache)
    return answer


def runs_code(program: Program, accelerator: Accelerator, seconds: float = PROOF_SECONDS) -> bool:
    """Run the proof under this accelerator; False when it did not end in time."""
    with tempfile.TemporaryDirectory(prefix="p2v-proof-") as folder:
        sector = Path(folder, "proof.img")
        sector.write_bytes(_PROOF.ljust(510, b"\0") + b"\x55\xaa")
        log = Path(folder, "proof.log")
        argv = [
            *(str(program.path), "-no-user-config", "-nodefaults", "-display", "none", "-accel", accelerator.value),
            *("-cpu", "max", "-m", "64", "-drive", f"if=ide,format=raw,snapshot=on,file={sector}"),
            *("-chardev", f"file,id=proof,path={log}", "-device", "isa-debugcon,iobase=0xe9,chardev=proof"),
        ]
        process = guarded(argv, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and process.poll() is None:
                if log.exists() and b"K" in log.read_bytes():
                    return True
                time.sleep(0.02)
            return False
        finally:
            process.kill()
            process.wait()


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home.startswith("/") else Path.home() / ".cache") / "p2v-toolkit"

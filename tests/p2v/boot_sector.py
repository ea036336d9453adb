"""Boot sectors made of a few instructions, so that a test's machine does in a second what it is told: print, wait, end in some way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

Step = tuple[str, str] | tuple[str, int]

# cli; xor ax,ax; mov ds,ax; mov es,ax; mov ss,ax; mov sp,0x7c00; cld; sti
_SETUP = bytes.fromhex("fa 31c0 8ed8 8ec0 8ed0 bc007c fc fb")
_ORIGIN = 0x7C00

ENDINGS = {
    "idle": bytes.fromhex("f4 ebfd"),  # hlt; jmp: a system that waits for interrupts
    "halt": bytes.fromhex("fa f4 ebfc"),  # cli; hlt; jmp: a loader that gave up
    "spin": bytes.fromhex("ebfe"),  # jmp self
    "triple-fault": bytes.fromhex("fa 0f011e0c7e 0f0b"),  # cli; lidt [0x7e0c] (zeroes); ud2
    "reset": bytes.fromhex("b0fe e664 ebfe"),  # out 0x64, 0xfe: the keyboard controller pulls the reset line
    # out 0x604, 0x2000: sleep state 5 of the PIIX4's ACPI
    "power-off": bytes.fromhex("ba0406 b80020 ef ebfe"),
}


def boot_sector(*steps: Step, ending: str = "idle") -> bytes:
    """A sector that does `steps` in order and ends as `ENDINGS` says.

    ("screen", text) and ("serial", text) print with a line end where the text has "\\n"; ("wait", ticks) waits ticks of 55 ms.
    """
    code, texts, fixups = bytearray(_SETUP), bytearray(), []
    for step in steps:
        if isinstance(step[1], int):
            code += b"\xb9" + step[1].to_bytes(2, "little") + bytes.fromhex("f4 e2fd")  # mov cx,n; hlt; loop
            continue
        kind, text = step[0], step[1]
        fixups.append((len(code) + 1, len(texts)))
        texts += text.replace("\n", "\r\n").encode("cp437") + b"\0"
        if kind == "screen":
            # mov si,text; next: lodsb; test al,al; jz end; mov ah,0xe; mov bx,7; int 0x10; jmp next
            code += bytes.fromhex("be0000 ac 84c0 7409 b40e bb0700 cd10 ebf2")
        else:
            # mov si,text; next: lodsb; test al,al; jz end; mov dx,0x3f8; out dx,al; jmp next
            code += bytes.fromhex("be0000 ac 84c0 7406 baf803 ee ebf5")
    code += ENDINGS[ending]
    for place, offset in fixups:
        code[place : place + 2] = (_ORIGIN + len(code) + offset).to_bytes(2, "little")
    sector = bytes(code + texts)
    if len(sector) > 510:
        raise ValueError(f"the steps need {len(sector)} bytes, a boot sector has 510")
    return sector.ljust(510, b"\0") + b"\x55\xaa"


def boot_disk(path: Path, steps: Sequence[Step], ending: str = "idle") -> Path:
    """A raw disk of 1 MiB with this boot sector."""
    path.write_bytes(boot_sector(*steps, ending=ending).ljust(1 << 20, b"\0"))
    return path

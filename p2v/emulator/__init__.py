"""The one way to start QEMU: accelerator proven, command line from records, QMP, console, screen, and nothing left behind."""

from p2v.emulator.acceleration import Accelerator, proven_accelerator
from p2v.emulator.hardware import Chipset, Controller, DirectKernel, Drive, Hardware, Network, NicModel
from p2v.emulator.machine import Emulator, Picture, create_overlay
from p2v.emulator.monitor import Event
from p2v.emulator.process import find_program, guarded
from p2v.emulator.screen import png_of

__all__ = [
    "Accelerator",
    "Chipset",
    "Controller",
    "DirectKernel",
    "Drive",
    "Emulator",
    "Event",
    "Hardware",
    "Network",
    "NicModel",
    "Picture",
    "create_overlay",
    "find_program",
    "guarded",
    "png_of",
    "proven_accelerator",
]

"""Disk image formats: what qemu-img cannot do, or does badly, is done here."""

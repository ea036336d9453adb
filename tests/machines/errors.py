"""What goes wrong with a test machine."""

from __future__ import annotations


class MachineError(Exception):
    """A test machine could not be built, booted or reached; the text holds the end of its console where there is one."""

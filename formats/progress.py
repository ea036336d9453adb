"""How long work reports itself, without knowing a terminal."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one step. Called from several threads; must be cheap and must not raise."""

    def start(self, label: str, total: int | None) -> None:
        """A step begins: ``total`` bytes, or None when the amount is not known."""
        ...

    def advance(self, amount: int) -> None:
        """``amount`` more bytes are done."""
        ...

    def finish(self) -> None:
        """The step is over, well or not."""
        ...


class Silence:
    """The progress that tells nobody."""

    def start(self, label: str, total: int | None) -> None:
        """Ignore."""

    def advance(self, amount: int) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""

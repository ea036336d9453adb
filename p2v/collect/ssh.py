"""A live Linux host, reached over SSH, as an origin."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from formats.capture import Mark
from formats.errors import Notice
from formats.machine import Machine
from p2v.collect import commands, inventory
from p2v.collect.inventory import Inspection
from p2v.session import Session, SshTarget


class SshOrigin:
    """A live Linux host; a context manager. Connects on first use; root, directly or by sudo, is needed for all that it does.

    ``notice`` receives what an inspection could not learn. Raises the ``HostError`` family.
    """

    def __init__(self, target: SshTarget, *, notice: Callable[[Notice], None] | None = None) -> None:
        self._target = target
        self._notice = notice or (lambda _: None)
        self._session: Session | None = None
        self._lock = threading.Lock()
        self.inspection: Inspection | None = None

    @property
    def session(self) -> Session:
        """The connection, made on first use."""
        with self._lock:
            if self._session is None:
                self._session = Session.connect(self._target)
            return self._session

    def inspect(self) -> Machine:
        """The machine's record; writes nothing on the source. The commands' results are in ``inspection``."""
        self.inspection = inventory.inspection(commands.collect(self.session))
        for notice in self.inspection.notices:
            self._notice(notice)
        return self.inspection.machine

    def retire(self, marks: Sequence[Mark]) -> None:
        """Nothing is kept on a plain host: it has no change tracking (C7)."""

    def close(self) -> None:
        """Close the connection; idempotent."""
        with self._lock:
            if self._session is not None:
                self._session.close()
                self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

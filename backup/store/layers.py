"""Stores around stores: one behaviour each, composed by wrapping."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from backup.errors import StoreError
from backup.store.base import Store, Stored
from formats.errors import UsageError

_T = TypeVar("_T")


class _Layer:
    """What every layer does unless it says otherwise: pass on."""

    def __init__(self, below: Store) -> None:
        self.below = below

    def load(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of an object."""
        return self.below.load(name, offset, length)

    def store(self, name: str, data: Iterable[bytes | memoryview]) -> None:
        """Keep an object."""
        self.below.store(name, data)

    def delete(self, name: str) -> None:
        """Remove an object."""
        self.below.delete(name)

    def list(self, prefix: str) -> Iterator[Stored]:
        """The objects below ``prefix``."""
        return self.below.list(prefix)

    def close(self) -> None:
        """Close the store below."""
        self.below.close()


class ReadOnly(_Layer):
    """Refuses to write and delete."""

    def store(self, name: str, data: Iterable[bytes | memoryview]) -> None:  # noqa: ARG002
        """Refuse."""
        raise UsageError(f"the repository is opened for reading only; {name} cannot be written")

    def delete(self, name: str) -> None:
        """Refuse."""
        raise UsageError(f"the repository is opened for reading only; {name} cannot be deleted")


class Retrying(_Layer):
    """Tries again after a ``StoreError``, ``attempts`` times in all, waiting 1, 2, 4... times ``pause`` seconds in between.

    A ``store`` whose answer was lost may find its name taken by itself: that counts as done if the object has the same bytes.
    """

    def __init__(self, below: Store, *, sleep: Callable[[float], None], attempts: int = 4, pause: float = 1.0) -> None:
        super().__init__(below)
        self._sleep, self._attempts, self._pause = sleep, attempts, pause

    def load(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of an object."""
        return self._again(lambda: self.below.load(name, offset, length))

    def store(self, name: str, data: Iterable[bytes | memoryview]) -> None:
        """Keep an object."""
        from backup.store.base import NameTakenError

        parts = list(data)
        failed = False

        def once() -> None:
            nonlocal failed
            try:
                self.below.store(name, parts)
            except NameTakenError:
                if not failed or self.below.load(name) != b"".join(parts):
                    raise
            except StoreError:
                failed = True
                raise

        self._again(once)

    def delete(self, name: str) -> None:
        """Remove an object."""
        self._again(lambda: self.below.delete(name))

    def list(self, prefix: str) -> Iterator[Stored]:
        """The objects below ``prefix``, all at once: half a listing cannot be gone on with."""
        return iter(self._again(lambda: list(self.below.list(prefix))))

    def _again(self, call: Callable[[], _T]) -> _T:
        for attempt in range(self._attempts - 1):
            try:
                return call()
            except StoreError:
                self._sleep(self._pause * 2**attempt)
        return call()


class Faulty(_Layer):
    """Calls ``fault(operation, name, when)`` before ("before") and after ("after") each operation; what that raises is raised.
    For tests and drills.

    Operations: load, store, delete, list. ``count`` is how many mutations (store, delete) began.
    """

    def __init__(self, below: Store, fault: Callable[[str, str, str], None]) -> None:
        super().__init__(below)
        self._fault = fault
        self._lock = threading.Lock()
        self.count = 0

    def load(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of an object."""
        self._fault("load", name, "before")
        data = super().load(name, offset, length)
        self._fault("load", name, "after")
        return data

    def store(self, name: str, data: Iterable[bytes | memoryview]) -> None:
        """Keep an object."""
        with self._lock:
            self.count += 1
        self._fault("store", name, "before")
        super().store(name, data)
        self._fault("store", name, "after")

    def delete(self, name: str) -> None:
        """Remove an object."""
        with self._lock:
            self.count += 1
        self._fault("delete", name, "before")
        super().delete(name)
        self._fault("delete", name, "after")

    def list(self, prefix: str) -> Iterator[Stored]:
        """The objects below ``prefix``."""
        self._fault("list", prefix, "before")
        yield from super().list(prefix)
        self._fault("list", prefix, "after")

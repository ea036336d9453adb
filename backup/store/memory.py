"""A store in memory: for tests, and for repositories that live as long as a process."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from backup.errors import ObjectDamagedError, ObjectMissingError
from backup.store.base import NameTakenError, Stored, check_name, check_prefix


class MemoryStore:
    """Objects in a dictionary. ``objects`` may be looked at and damaged by tests."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def load(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of an object."""
        check_name(name)
        with self._lock:
            content = self.objects.get(name)
        if content is None:
            raise ObjectMissingError(f"the object {name} is missing", subject=name)
        end = len(content) if length is None else offset + length
        if not 0 <= offset <= end <= len(content):
            raise ObjectDamagedError(f"{name} has {len(content)} bytes, {end} are expected", subject=name)
        return content[offset:end]

    def store(self, name: str, data: Iterable[bytes | memoryview]) -> None:
        """Keep an object."""
        check_name(name)
        content = b"".join(data)
        with self._lock:
            if name in self.objects:
                raise NameTakenError(f"the object {name} is there already", subject=name)
            self.objects[name] = content

    def delete(self, name: str) -> None:
        """Forget an object."""
        check_name(name)
        with self._lock:
            self.objects.pop(name, None)

    def list(self, prefix: str) -> Iterator[Stored]:
        """The objects below ``prefix``."""
        check_prefix(prefix)
        with self._lock:
            found = [Stored(name, len(content)) for name, content in self.objects.items() if name.startswith(prefix)]
        return iter(found)

    def close(self) -> None:
        """Nothing: the objects stay."""

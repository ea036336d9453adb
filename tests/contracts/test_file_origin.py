"""The origin contract on machines in files: a bare image, and one behind qemu-nbd."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from p2v.collect.files import FileOrigin
from tests.contracts.block_source import sample, write_sparse
from tests.contracts.origin import OriginContract
from tests.requirement import needs


class TestRawImage(OriginContract):
    @pytest.fixture
    def origin(self, tmp_path: Path) -> FileOrigin:
        return FileOrigin(write_sparse(tmp_path / "disk.raw", sample()))

    @pytest.fixture
    def later(self, tmp_path: Path, origin: FileOrigin) -> FileOrigin:
        return FileOrigin(tmp_path / "disk.raw")


@needs("qemu-img", "qemu-nbd")
class TestQcow2Image(OriginContract):
    @pytest.fixture
    def origin(self, tmp_path: Path) -> FileOrigin:
        raw = write_sparse(tmp_path / "disk.raw", sample())
        path = tmp_path / "disk.qcow2"
        subprocess.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", str(raw), str(path)], check=True)
        return FileOrigin(path)

"""Real images for the tests of hpo.train, and torch held to one thread."""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: threads wait for each other longer than such small networks take. A test of two sets two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def real_data(name: str) -> Path:
    """Return a file or folder of $HPO_DATA; skip the test where it does not exist."""
    root = os.environ.get("HPO_DATA")
    if not root:
        pytest.skip("HPO_DATA is not set: no real data sets")
    path = Path(root) / name
    if not path.exists():
        pytest.skip(f"HPO_DATA has no {name}")
    return path


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    return real_data("mnist")


@pytest.fixture(scope="session")
def cifar10_root() -> Path:
    """Unpack CIFAR-10 as a folder of images, once and outside the tree; the rename hides an unpacking that is torn."""
    archive = real_data("cifar10-images.tar.xz")
    unpacked = Path(tempfile.gettempdir()) / "hpo-test-data" / "cifar10"
    if not unpacked.is_dir():
        unpacked.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=unpacked.parent) as temporary, tarfile.open(archive) as images:
            images.extractall(Path(temporary) / "cifar10", filter="data")
            try:
                (Path(temporary) / "cifar10").rename(unpacked)
            except OSError:  # another test run was first
                assert unpacked.is_dir()
    return unpacked

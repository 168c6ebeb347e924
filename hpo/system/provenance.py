"""Where a result came from: host, process, git revision of the caller's tree, and the versions that trained it."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("hpo", "optuna", "torch", "torchvision", "numpy")


@cache
def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def git_revision() -> str | None:
    """The commit of the working directory's tree, with `-dirty` where tracked files differ; None outside git.

    A worker that has a copy of that folder alone is told it in HPO_GIT_REVISION.
    """
    if told := os.environ.get("HPO_GIT_REVISION"):
        return told
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def trial_metadata(*, device: str, host: str, seed: int) -> dict[str, Any]:
    """What is recorded with every trial."""
    return {
        "seed": seed,
        "device": device,
        "host": host,
        "pid": os.getpid(),
        "git_revision": git_revision(),
        "versions": versions(),
    }

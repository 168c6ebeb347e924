"""Provenance of a result: host, process, CPU threads, git revision of the caller's tree, and the versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hpo._version import __version__

PACKAGES = ("optuna", "torch", "torchvision", "numpy")


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    versions_by_name = {"python": platform.python_version(), "hpo": __version__}
    for package in PACKAGES:
        try:
            versions_by_name[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions_by_name


@cache
def git_revision() -> str | None:
    """Return the commit of the working directory's tree, with `-dirty` where tracked files differ; None outside git.

    A worker that has only a copy of that folder gets the revision in HPO_GIT_REVISION.
    """
    if given := os.environ.get("HPO_GIT_REVISION"):
        return given
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def num_threads() -> int | None:
    """Return on how many CPU threads torch computes in this process, which its last digits depend on.

    None where nobody has loaded torch.
    """
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else None


def trial_metadata(*, device: str, host: str, seed: int) -> dict[str, Any]:
    """Return what every trial records of how it was run."""
    return {
        "seed": seed,
        "device": device,
        "host": host,
        "pid": os.getpid(),
        "threads": num_threads(),
        "git_revision": git_revision(),
        "versions": versions(),
    }

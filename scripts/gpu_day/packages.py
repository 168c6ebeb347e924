"""Fill a folder with what `hpo run` needs beyond torch, to carry to a machine that installs nothing.

    python -m scripts.gpu_day.packages DIR                         # for a machine with this Python and system
    python -m scripts.gpu_day.packages DIR --python-version 3.12   # and any other option of pip's

The folder is what `python -m scripts.gpu_day --packages DIR` takes. torch itself is never put there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Needs of hpo that a study can be trained without: those of the dashboard, of the report, and torch.
LEFT_OUT = frozenset({"bcrypt", "optuna-dashboard", "plotly", "torch", "torchvision", "waitress"})
MODULES = {"nvidia-ml-py": "pynvml", "scikit-learn": "sklearn"}  # whose names are not those of their packages


def requirements_needed() -> list[str]:
    """Return the requirements of pyproject.toml that a study needs beyond torch."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return [requirement for requirement in requirements if name_of(requirement) not in LEFT_OUT]


def modules_needed() -> list[str]:
    """Return the modules of those requirements."""
    names = map(name_of, requirements_needed())
    return [MODULES.get(name, name.replace("-", "_")) for name in names]


def name_of(requirement: str) -> str:
    """Return the package's name in a requirement."""
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None, requirement
    return match[0]


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit((__doc__ or "").strip())
    folder, *options = sys.argv[1:]
    command = [sys.executable, "-m", "pip", "install", "--target", folder, "--only-binary", ":all:"]
    command += ["--constraint", str(ROOT / "constraints.txt"), *options, *requirements_needed()]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()

"""Measure how long the command line takes to start: `hpo --help`, and the imports that commands need.

    python -m scripts.bench.start [--repeats N]

Prints the median and the range in seconds, each in a process of its own. On an idle machine `hpo --help` takes a fifth
of a second; half a second is what a user notices.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "hpo --help": ["-m", "hpo", "--help"],
    "import hpo.cli.app": ["-c", "import hpo.cli.app"],
    "import hpo.store.studies": ["-c", "import hpo.store.studies"],
    "import torch": ["-c", "import torch"],
}


def seconds(arguments: list[str]) -> float:
    """Return how long Python takes for these arguments, from the start of its process to the end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    return time.perf_counter() - began


def main() -> None:
    """Measure each command and print one row for it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="processes of each command (default 5)")
    repeats = parser.parse_args().repeats
    print(f"seconds of a process, n = {repeats}")
    for name, arguments in COMMANDS.items():
        measured = [seconds(arguments) for _ in range(repeats)]
        print(f"{name:<26} {statistics.median(measured):5.2f} ({min(measured):.2f} to {max(measured):.2f})")


if __name__ == "__main__":
    main()

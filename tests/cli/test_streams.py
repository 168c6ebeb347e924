"""A command outlives whoever read its output, and says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from hpo.cli.streams import outlive_readers
outlive_readers()
print("first", flush=True)
sys.stdin.readline()
for _ in range(3):
    print("more", flush=True)
open("went on", "w").close()
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_nobody_reads_any_more_is_dropped(unbuffered: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={"PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate("go\n", timeout=500)
    assert (process.returncode, errors) == (0, "hpo: the output was closed; continuing without it\n")
    assert (tmp_path / "went on").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_on_a_full_disk_ends_a_command_with_a_sentence(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "hpo", "--version"]
        result = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "hpo: the output cannot be written: No space left on device\n")

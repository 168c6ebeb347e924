"""What the tests rely on of the tools that run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.xdist_group("alone")
def test_tests_of_a_group_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """A pytest-xdist that does not know the group would start a server in each process, without a word."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("the tests run in one process")
    assert request.node.nodeid.endswith("@alone")


def test_a_folder_that_is_named_twice_has_its_fixtures_both_times(tmp_path: Path) -> None:
    """A pytest that forgets them would run tests without what their folder sets up, in some orders of the files."""
    (tmp_path / "folder").mkdir()
    fixture = "import pytest\n@pytest.fixture\ndef of_the_folder(): pass\n"
    (tmp_path / "folder/conftest.py").write_text(fixture)
    files = ["folder/test_first.py", "test_between.py", "folder/test_last.py"]
    for file in files:
        needed = "of_the_folder" if "/" in file else ""
        (tmp_path / file).write_text(f"def test_it({needed}): pass\n")
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir=.", "-p", "no:cacheprovider", *files]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr

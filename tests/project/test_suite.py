"""What the tests rely on of the tools that run them."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("alone")
def test_tests_of_a_group_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """A pytest-xdist that does not know the group would start a server in each process, without a word."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("the tests run in one process")
    assert request.node.nodeid.endswith("@alone")

"""The command's first moments, before it has loaded anything that could take a Ctrl-C."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

import pytest

from hpo.__main__ import start


class Interrupting(MetaPathFinder):
    """Raise KeyboardInterrupt where the command's modules are looked for, as Ctrl-C there does."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "hpo.cli.app":
            raise KeyboardInterrupt


def test_an_interrupt_while_the_command_loads_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hpo.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit, match=r"^hpo: interrupted$"):
        start()

"""A range test in a process of its own, pinned to a GPU, whose memory it gives back when it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING

from hpo.errors import StudyStopped, UserError
from hpo.system.devices import Device, torch_device, worker_environment
from hpo.system.readable import prepare_output
from hpo.system.safe_path import SAFE_PATH
from hpo.train.config import DataConfig, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.imports import ImportAllowlist, open_allowlists

if TYPE_CHECKING:
    from hpo.train.lr_ramp import RangeTest

MESSAGE_PREFIX = "hpo range test: "  # begins each line that is a message: a user's module may print, too


def range_test_in_subprocess(
    config: TrialConfig, device: Device, *, threads: int, progress: Callable[[int, int], None]
) -> RangeTest:
    """Run a range test in a process of its own on this device.

    Raises:
        UserError: As `run_range_test` does.
        StudyStopped: The process died of anything else.
    """
    from hpo.train.lr_ramp import RangeTest

    task = {
        "config": asdict(config),
        "device": torch_device(device),
        "path": sys.path,
        "allowed": [asdict(allowlist) for allowlist in open_allowlists()],
    }
    with subprocess.Popen(
        [sys.executable, *SAFE_PATH, "-m", "hpo.lr_range.subprocess"],
        env={**os.environ, **worker_environment(device, threads=threads)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(task))
            process.stdin.close()
            for line in process.stdout:
                message = json.loads(line.removeprefix(MESSAGE_PREFIX)) if line.startswith(MESSAGE_PREFIX) else {}
                if "done" in message:
                    progress(message["done"], message["of"])
                elif "error" in message:
                    raise UserError(message["error"])
                elif "found" in message:
                    return RangeTest(**message["found"])
        finally:
            process.kill()
    raise StudyStopped(f"the range test's process on {device.name} died with exit code {process.returncode}")


def run_task() -> None:
    """Run the range test that standard input describes, and send progress and result to standard output."""
    task = json.loads(sys.stdin.read())
    sys.path[:] = task["path"]
    from hpo.train.lr_ramp import run_range_test

    sections = task["config"]
    config = TrialConfig(
        model=ModelConfig(**sections["model"]),
        data=DataConfig(**sections["data"]),
        training=TrainingConfig(**sections["training"]),
        seed=sections["seed"],
    )
    try:
        with ExitStack() as allowing:
            for allowlist in task["allowed"]:
                allowing.enter_context(ImportAllowlist.from_dict(allowlist).importable())
            test = run_range_test(
                config, device=task["device"], progress=lambda done, of: _send({"done": done, "of": of})
            )
    except UserError as error:
        _send({"error": str(error)})
    else:
        _send({"found": asdict(test)})


def _send(message: dict[str, object]) -> None:
    print(f"\n{MESSAGE_PREFIX}{json.dumps(message)}", flush=True)


if __name__ == "__main__":
    prepare_output(encoding="utf-8")
    run_task()

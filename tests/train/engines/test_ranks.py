"""A trial on several devices is the trial on one, up to rounding; it resumes exactly, and no rank is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from hpo.errors import UserError
from hpo.train.checkpoint import Checkpoint
from hpo.train.config import ModelConfig, TrialConfig
from hpo.train.engines.lane_state import Rank
from hpo.train.engines.plain import PlainEngine
from hpo.train.engines.protocol import Stopped
from hpo.train.engines.ranks import DistributedEngine, RankFailed
from tests.train.engines.trials import BATCH_NORM, DROPOUT, EPS, assert_close, assert_equal, train, trial


@pytest.fixture
def engine() -> Iterator[DistributedEngine]:
    """Return an engine of two ranks that share the CPU."""
    engine = DistributedEngine(device="cpu", num_ranks=2)
    yield engine
    engine.close()


def other_pids(engine: DistributedEngine) -> list[int]:
    return [other._process.pid for other in engine._others]


def train_resumed(engine: DistributedEngine, config: TrialConfig) -> tuple[Checkpoint, Checkpoint]:
    """Return the trial after its last epoch, and the same resumed after its first one, in new processes."""
    lane = engine.admit(config)
    engine.run_epoch()
    before = engine.checkpoint(lane)
    engine.run_epoch()
    whole = engine.checkpoint(lane)
    engine.evict(lane)
    engine.close()
    lane = engine.admit(config, before)
    engine.run_epoch()
    resumed = engine.checkpoint(lane)
    engine.evict(lane)
    return whole, resumed


@pytest.mark.parametrize(
    ("num_ranks", "start", "end", "slices"),
    [(2, 0, 7, [(0, 3), (3, 7)]), (3, 4, 10, [(4, 6), (6, 8), (8, 10)]), (2, 5, 8, [(5, 8), (5, 8)])],
)
def test_the_slices_of_a_batch_have_the_weights_of_their_images(
    num_ranks: int, start: int, end: int, slices: list[tuple[int, int]]
) -> None:
    found = [Rank(number, num_ranks).slice_of(start, end) for number in range(num_ranks)]
    assert [(part.start, part.stop) for part, _, _ in found] == slices
    values = torch.arange(10.0) ** 2
    mean = sum(values[part].mean() * weight for part, weight, _ in found) / num_ranks
    assert float(mean) == pytest.approx(float(values[start:end].mean()))
    assert sum(part.stop - part.start for part, _, is_counted in found if is_counted) == end - start


@pytest.mark.slow
def test_a_trial_of_two_ranks_is_that_of_one(engine: DistributedEngine) -> None:
    """The last batch of the second has three images, which both ranks compute."""
    parts: dict[str, Any] = {"batch_size": 16, "gradient_accumulation": 3, "data": {"train_samples": 147}}
    for config in (
        trial(optimizer="adam", eps=EPS, gradient_clip=0.5, schedule="one_cycle", ema=0.9),
        trial(optimizer="sgd", momentum=0.9, mixup=0.4, **parts),
    ):
        assert_close(train(engine, config), train(PlainEngine(device="cpu"), config))


@pytest.mark.slow
@pytest.mark.parametrize("model", [DROPOUT, BATCH_NORM], ids=["dropout", "batch norm"])
def test_a_trial_of_two_ranks_resumes_exactly(model: ModelConfig, engine: DistributedEngine) -> None:
    config = trial(model=model, optimizer="adam", activation_checkpointing=True, freeze=("0",), freeze_epochs=1)
    whole, resumed = train_resumed(engine, config)
    assert_equal(resumed, whole)


def test_a_rank_that_is_killed_ends_the_attempt_and_the_next_one_has_new_ranks(engine: DistributedEngine) -> None:
    config = trial()
    lane = engine.admit(config)
    engine.run_epoch()
    before = engine.checkpoint(lane)
    [pid] = other_pids(engine)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RankFailed, match="rank 1 of 2 has ended, with code -9"):
        engine.run_epoch()
    engine.evict(lane)
    lane = engine.admit(config, before)
    assert other_pids(engine) != [pid]
    engine.run_epoch()
    assert_close(engine.checkpoint(lane), train(PlainEngine(device="cpu"), config))


def test_a_rank_that_cannot_begin_is_said(monkeypatch: pytest.MonkeyPatch, engine: DistributedEngine) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RankFailed, match="rank 1 of 2 has ended, with code 1"):
        engine.admit(trial())
    assert (engine.free_lanes, engine._others) == (1, [])


@pytest.mark.slow
def test_what_fails_in_a_rank_or_stops_the_epoch_leaves_no_process() -> None:
    is_stopping = False
    engine = DistributedEngine(device="cpu", num_ranks=2, should_stop=lambda: is_stopping)
    with pytest.raises(UserError, match=r"training\.optimizer must be one of"):
        engine.admit(trial(optimizer="adm"))
    assert (engine.free_lanes, engine._others) == (1, [])
    lane = engine.admit(trial())
    [process] = [other._process for other in engine._others]
    is_stopping = True
    with pytest.raises(Stopped):
        engine.run_epoch()
    assert process.poll() is not None
    engine.evict(lane)


ORPHANED = """
import os
from hpo.train.engines.ranks import DistributedEngine
from tests.train.engines.trials import trial
engine = DistributedEngine(device="cpu", num_ranks=2)
engine.admit(trial())
print(engine._others[0]._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_a_rank_ends_with_rank_0() -> None:
    killed = subprocess.run([sys.executable, "-c", ORPHANED], stdout=subprocess.PIPE, check=False, text=True)
    assert killed.returncode == -signal.SIGKILL
    with suppress(psutil.NoSuchProcess):
        other = psutil.Process(int(killed.stdout))
        while other.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)


# A child of the dead rank holds its connections, so that gloo does not notice.
FORKING = """
import os, signal, time
from torch import distributed
from torch.nn import functional

def loss(outputs, labels):
    if distributed.get_rank() == 1:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    return functional.cross_entropy(outputs, labels, reduction="none")
"""
WAITING = """
import logging, os
from hpo.train.engines import ranks
from hpo.train.imports import ImportAllowlist
from tests.train.engines.trials import trial
logging.basicConfig()
ranks.WAIT_S = 1.0
with ImportAllowlist(names=("forking:loss",), path=(os.environ["FOLDER"],)).importable():
    engine = ranks.DistributedEngine(device="cpu", num_ranks=2)
    engine.admit(trial(loss="forking:loss"))
    engine.run_epoch()
"""


@pytest.mark.slow
def test_a_worker_ends_where_torch_would_wait_for_a_dead_rank(tmp_path: Path) -> None:
    (tmp_path / "forking.py").write_text(FORKING)
    log = tmp_path / "log"
    with log.open("w") as stream:
        ended = subprocess.run(
            [sys.executable, "-c", WAITING], stderr=stream, env={**os.environ, "FOLDER": str(tmp_path)}, check=False
        )
    assert ended.returncode == 1
    assert "rank 1 of 2 has ended, with code -9; torch would wait for it forever" in log.read_text()

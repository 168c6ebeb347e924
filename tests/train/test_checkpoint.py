"""A resumed trial equals the uninterrupted one bit for bit, and no kill, full disk or torn file breaks its folder."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import pickle
import random
import secrets
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo.config.sections import STUDY_NEUTRAL_KEYS
from hpo.errors import UserError
from hpo.train.checkpoint import (
    ABANDONED_TEMPORARY_S,
    MAGIC,
    Checkpoint,
    CheckpointFolder,
    config_digest,
    list_folders,
)
from hpo.train.config import (
    TRIAL_NEUTRAL_KEYS,
    DataConfig,
    EpochResult,
    ModelConfig,
    TrainingConfig,
    TrialConfig,
)
from hpo.train.engines.plain import PlainEngine
from hpo.train.engines.protocol import Engine
from hpo.train.optim import OPTIMIZERS
from hpo.train.schedules import SCHEDULES
from tests.train.data.datasets_under_test import EVERY_AUGMENTATION

EPOCHS = 3
IDENTITY: dict[str, str | int] = {"study": "4f1c", "trial": 7}


def trial(*, model: ModelConfig | None = None, data: dict[str, Any] | None = None, **training: Any) -> TrialConfig:
    return TrialConfig(
        model=model or ModelConfig(options={"width": 0.05}),
        data=DataConfig(**{"train_samples": 200} | (data or {})),
        training=TrainingConfig(**{"lr": 1e-2, "epochs": EPOCHS, "batch_size": 64} | training),
        seed=3,
    )


def assert_same(one: Any, other: Any, *, where: str = "") -> None:
    """Bit for bit: types, strides and digits."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride()), where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], where=f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (item, its) in enumerate(zip(one, other, strict=True)):
            assert_same(item, its, where=f"{where}[{index}]")
    else:
        assert one == other, where


def timeless(checkpoint: Checkpoint) -> list[EpochResult]:
    return [replace(result, seconds=0.0) for result in checkpoint.results]


def assert_same_trial(one: Checkpoint, other: Checkpoint) -> None:
    assert_same(timeless(one), timeless(other))
    assert_same(one.state, other.state)
    assert (one.config_digest, one.epoch) == (other.config_digest, other.epoch)


def train_on(engine: Engine, config: TrialConfig, checkpoint: Checkpoint | None = None) -> Checkpoint:
    """Return the trial after its last epoch, started or resumed."""
    lane = engine.admit(config, checkpoint)
    for epoch in range(checkpoint.epoch if checkpoint else 0, config.training.epochs):
        [result] = engine.run_epoch()
        assert result.epoch == epoch + 1
    last = engine.checkpoint(lane)
    engine.evict(lane)
    return last


def train_and_save(config: TrialConfig, folder: Path) -> Checkpoint:
    """Train without interruption; leave a folder for each epoch as an interruption after it would find it."""
    engine: Engine = PlainEngine(device="cpu")
    lane = engine.admit(config)
    for epoch in range(1, EPOCHS + 1):
        engine.run_epoch()
        CheckpointFolder(f"{folder}/{epoch}", identity=IDENTITY).save(engine.checkpoint(lane))
    return engine.checkpoint(lane)


def read(folder: Path, config: TrialConfig, *, epoch: int) -> Checkpoint:
    checkpoint, passed_over = CheckpointFolder(f"{folder}/{epoch}", identity=IDENTITY).load(config)
    assert passed_over == []
    assert checkpoint is not None
    assert checkpoint.epoch == epoch
    return checkpoint


# Exact


MOMENTUM = {"sgd": 0.9, "rmsprop": 0.9}
WITH_OPTIMIZER = [
    pytest.param({"optimizer": name, "momentum": MOMENTUM.get(name, 0.0), "weight_decay": 1e-3}, id=name)
    for name in OPTIMIZERS
]
WITH_OPTIMIZER += [
    pytest.param({"optimizer": "own_recipe:Averaged"}, id="own"),
    pytest.param({"optimizer": "rmsprop", "optimizer_options": {"centered": True}}, id="options"),
]
WITH_LOSS = [
    pytest.param({"loss": "bce", "class_weights": "balanced", "metric": "auroc"}, id="bce"),
    pytest.param({"loss": "focal", "metric": "macro_f1"}, id="focal"),
    pytest.param({"loss": "own_recipe:squared", "metric": "own_recipe:spread"}, id="own loss"),
]
# An optimizer that trains one set of weights and evaluates another, as those without a schedule do, with a number of
# its own in its group; and a schedule.
OWN_RECIPE = """
import torch

class Averaged(torch.optim.SGD):
    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.param_groups[0] |= {"steps": 0, "is_training": False}

    @torch.no_grad()
    def swap(self, is_training):
        group = self.param_groups[0]
        if group["steps"] and group["is_training"] != is_training:
            for parameter in group["params"]:
                other = self.state[parameter]["other"]
                self.state[parameter]["other"] = parameter.clone()
                parameter.copy_(other)
        group["is_training"] = is_training

    def train(self):
        self.swap(True)

    def eval(self):
        self.swap(False)

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        assert group["is_training"]
        super().step()
        group["steps"] += 1
        for parameter in group["params"]:
            self.state[parameter].setdefault("other", torch.zeros_like(parameter)).lerp_(parameter, 1 / group["steps"])

def halving(progress):
    return 0.5 ** (4 * progress)

def squared(outputs, labels):
    return (outputs - torch.nn.functional.one_hot(labels, outputs.shape[1])).square().sum(1)

def spread(outputs, labels):
    return outputs.std()
"""
OF_SCHEDULE: dict[str, dict[str, Any]] = {
    "step": {"step_epochs": 1},
    "multistep": {"milestones": (1, 2)},
    "cosine": {"warmup_epochs": 1.5},
    "cosine_restarts": {"restarts": 2},
    "plateau": {"plateau_epochs": 0, "gamma": 0.5, "lr": 1e-9},  # so low that the validation loss never falls
}
WITH_SCHEDULE = [
    pytest.param({"optimizer": "sgd", "momentum": 0.9, "schedule": name} | OF_SCHEDULE.get(name, {}), id=name)
    for name in [*SCHEDULES, "own_recipe:halving"]
]


WITH_RECIPE = [
    pytest.param(settings, id="-".join(settings))
    for settings in (
        {"data": {"augment": EVERY_AUGMENTATION, "train_samples": 20}},
        {"mixup": 0.4},
        {"cutmix": 1.0},
        {"mixup": 0.2, "cutmix": 1.0, "ema": 0.9, "optimizer": "sgd", "momentum": 0.9},
        {"gradient_accumulation": 3, "batch_size": 16, "activation_checkpointing": True},
    )
]


@pytest.mark.parametrize("settings", [*WITH_OPTIMIZER, *WITH_SCHEDULE, *WITH_LOSS, *WITH_RECIPE])
def test_a_trial_interrupted_after_any_epoch_ends_as_if_it_had_not_been(
    settings: Any, own_code: Path, tmp_path: Path
) -> None:
    (own_code / "own_recipe.py").write_text(OWN_RECIPE)
    config = trial(**settings)
    whole = train_and_save(config, tmp_path)
    assert (len({result.lr for result in whole.results}) > 1) == (config.training.schedule != "constant")
    for epoch in range(1, EPOCHS):
        before = read(tmp_path, config, epoch=epoch)
        with pytest.raises(AssertionError):
            assert_same(before.state, whole.state)  # or the rest of this test would say nothing
        assert_same_trial(train_on(PlainEngine(device="cpu"), config, before), whole)


NOISY = """
import random
import numpy
from torch import nn

class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls, self.first = 0, random.random() + numpy.random.rand()
    def forward(self, images):
        if not self.training:
            return images
        self.calls += 1
        return images * (1 + 0.1 * random.random()) + 0.1 * float(numpy.random.standard_normal()) + 0.01 * self.calls
    def get_extra_state(self):
        return {"calls": self.calls, "first": self.first}
    _version = 2
    def _load_from_state_dict(self, state, prefix, local_metadata, *rest):
        assert local_metadata["version"] == 2, "modules read the states of their older selves by this"
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)
    def set_extra_state(self, state):
        self.calls, first = state["calls"], state["first"]
        assert first == self.first, "the network was drawn otherwise"

def network(*, channels, num_classes):
    return nn.Sequential(
        nn.Conv2d(channels, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.2), Noise(),
        nn.Conv2d(12, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), nn.Dropout2d(0.2),
        nn.Conv2d(8, 6, 1, bias=False), nn.Flatten(), nn.Linear(6 * 8 * 8, num_classes),
    )
"""


@pytest.fixture
def noisy(own_code: Path) -> TrialConfig:
    """All that a network may keep or draw: batch norm, dropout, `random`, numpy, a state of its own, augmentation."""
    (own_code / "own_noisy.py").write_text(NOISY)
    model = ModelConfig(name="own_noisy:network")
    return trial(model=model, data={"flip": True, "crop": 2}, optimizer="adam", schedule="one_cycle", gradient_clip=1.0)


def test_whatever_a_network_keeps_or_draws_is_gone_on_with(noisy: TrialConfig, tmp_path: Path) -> None:
    whole = train_and_save(noisy, tmp_path)
    strides = {value.stride() for value in whole.state["model"].values() if isinstance(value, Tensor)}
    assert (27, 1, 9, 3) not in strides  # contiguous
    assert (108, 1, 36, 12) in strides  # channels_last, as trained
    assert whole.state["model"]["4._extra_state"]["calls"] == EPOCHS * math.ceil(200 / 64)
    for epoch in range(1, EPOCHS):
        before = read(tmp_path, noisy, epoch=epoch)
        torch.rand(5), random.random()
        assert_same_trial(train_on(PlainEngine(device="cpu"), noisy, before), whole)


GO_ON = """
import pickle, sys
from pathlib import Path
import torch
from hpo.train.checkpoint import CheckpointFolder
from hpo.train.engines.plain import PlainEngine
from hpo.train.imports import ImportAllowlist
torch.set_num_threads(int(sys.argv[2]))
config, identity = pickle.loads(Path("trial.pickle").read_bytes())
folder = CheckpointFolder(sys.argv[1], identity=identity)
checkpoint, _ = folder.load(config)
engine = PlainEngine(device="cpu")
with ImportAllowlist(names=("own_noisy:network",), path=(".",)).importable():
    lane = engine.admit(config, checkpoint)
for _ in range(checkpoint.epoch, config.training.epochs):
    engine.run_epoch()
folder.save(engine.checkpoint(lane))
"""


@pytest.mark.slow
def test_another_process_goes_on_exactly(noisy: TrialConfig, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    whole = train_and_save(noisy, tmp_path)
    (tmp_path / "trial.pickle").write_bytes(pickle.dumps((noisy, IDENTITY)))
    command = [sys.executable, "-c", GO_ON, str(tmp_path / "2"), str(torch.get_num_threads())]
    subprocess.run(command, cwd=tmp_path, check=True)
    resumed, _ = CheckpointFolder(f"{tmp_path}/2", identity=IDENTITY).load(noisy)
    assert resumed is not None
    assert resumed.results[2].seconds != whole.results[2].seconds  # trained there, not read
    assert_same_trial(resumed, whole)


# What is kept, and for whom


CONFIG = trial()
RESULT = EpochResult(
    lane=0,
    epoch=0,
    train_loss=2.0,
    train_accuracy=0.1,
    val_loss=math.nan,
    val_accuracy=0.1,
    test_accuracy=None,
    lr=0.1,
    seconds=1.5,
    diverged="non-finite loss",
)


def fake(epoch: int, *, config: TrialConfig = CONFIG, num_weights: int = 100) -> Checkpoint:
    return Checkpoint(
        config_digest=config_digest(config),
        epoch=epoch,
        state={"weights": torch.full((num_weights,), float(epoch))},
        results=[replace(RESULT, epoch=number) for number in range(1, epoch + 1)],
    )


def path_of(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:06d}.ckpt"


def epochs_in(folder: Path) -> list[int]:
    """Return the epochs of the files in a folder; every file has to be a checkpoint."""
    return sorted(int(path.name.removeprefix("epoch-").removesuffix(".ckpt")) for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a trial's folder that does not exist yet."""
    return tmp_path / "studies" / "4f1c" / "0007"


@pytest.fixture
def checkpoints(folder: Path) -> CheckpointFolder:
    return CheckpointFolder(str(folder), identity=IDENTITY)


def test_where_nothing_was_saved_there_is_nothing(checkpoints: CheckpointFolder) -> None:
    assert checkpoints.load(CONFIG) == (None, [])
    checkpoints.remove()


def test_what_was_saved_is_loaded(checkpoints: CheckpointFolder) -> None:
    saved = fake(2)
    checkpoints.save(saved)
    loaded, passed_over = checkpoints.load(CONFIG)
    assert loaded is not None
    assert passed_over == []
    assert_same(loaded.state, saved.state)
    assert repr(loaded.results) == repr(saved.results)  # nan is not equal to itself


def test_the_newest_two_are_kept(checkpoints: CheckpointFolder, folder: Path) -> None:
    for epoch in range(1, 12):
        checkpoints.save(fake(epoch))
        assert epochs_in(folder) == [epoch - 1, epoch][-epoch:]


def test_remove_removes_the_folder_and_no_other(checkpoints: CheckpointFolder, folder: Path) -> None:
    neighbour = CheckpointFolder(f"{folder}0", identity={"study": "4f1c", "trial": 70})
    for one in (checkpoints, neighbour):
        one.save(fake(1))
    (folder / f".epoch-000002.ckpt.{'0' * 16}.tmp").touch()
    assert sorted(list_folders(str(folder.parent))) == ["0007", "00070"]
    checkpoints.remove()
    assert not folder.exists()
    assert neighbour.load(CONFIG)[0] is not None
    assert list_folders(str(folder.parent)) == ["00070"]
    assert list_folders(f"{folder}/absent") == []


def test_remove_leaves_what_is_not_ours(checkpoints: CheckpointFolder, folder: Path) -> None:
    (folder / "epoch-000001.ckpt.d").mkdir(parents=True)
    (folder / "thesis.txt").touch()
    checkpoints.save(fake(1))
    checkpoints.remove()
    assert sorted(path.name for path in folder.iterdir()) == ["epoch-000001.ckpt.d", "thesis.txt"]


def test_a_file_url_is_a_folder_of_this_machine(checkpoints: CheckpointFolder, folder: Path) -> None:
    CheckpointFolder(f"file://{folder}", identity=IDENTITY).save(fake(1))
    loaded, _ = checkpoints.load(CONFIG)
    assert loaded is not None


def test_a_writer_that_lost_its_claim_breaks_nothing(checkpoints: CheckpointFolder, folder: Path) -> None:
    stale = CheckpointFolder(str(folder), identity=IDENTITY)
    for epoch in (5, 6, 7):
        checkpoints.save(fake(epoch))
    for epoch in (4, 5, 6):
        stale.save(fake(epoch))
        assert {6, 7} <= set(epochs_in(folder))
    checkpoints.save(fake(8))
    assert epochs_in(folder) == [7, 8]


def test_a_trial_that_begins_again_below_torn_files_keeps_its_own(checkpoints: CheckpointFolder, folder: Path) -> None:
    for epoch in (8, 9):
        checkpoints.save(fake(epoch))
        path_of(folder, epoch).write_bytes(b"")
    assert checkpoints.load(CONFIG)[0] is None
    for epoch in range(1, 10):
        checkpoints.save(fake(epoch))
        loaded, _ = checkpoints.load(CONFIG)
        assert loaded is not None
        assert loaded.epoch == epoch
    assert epochs_in(folder) == [8, 9]


def test_only_temporary_files_without_a_writer_are_removed(checkpoints: CheckpointFolder, folder: Path) -> None:
    folder.mkdir(parents=True)
    names = (f".epoch-000002.ckpt.{'a' * 16}.tmp", f".epoch-000002.ckpt.{'b' * 16}.tmp", ".notes.tmp")
    abandoned, fresh, notes = (folder / name for name in names)
    for path, age_s in (
        (abandoned, ABANDONED_TEMPORARY_S + 60),
        (fresh, ABANDONED_TEMPORARY_S - 60),
        (notes, 10 * ABANDONED_TEMPORARY_S),
    ):
        path.touch()
        os.utime(path, (time.time() - age_s,) * 2)
    checkpoints.save(fake(1))
    assert [path.exists() for path in (abandoned, fresh, notes)] == [False, True, True]


def test_the_digest_is_of_what_changes_a_result() -> None:
    digest = config_digest(CONFIG)
    for other in (
        replace(CONFIG, seed=4),
        replace(CONFIG, model=ModelConfig(options={"width": 0.06})),
        replace(CONFIG, data=replace(CONFIG.data, flip=True)),
        replace(CONFIG, training=replace(CONFIG.training, lr=2e-2)),
        replace(CONFIG, training=replace(CONFIG.training, epochs=5)),
    ):
        assert config_digest(other) != digest
    neutral = replace(CONFIG, data=replace(CONFIG.data, root="/elsewhere", placement="stream"))
    assert config_digest(replace(neutral, training=replace(CONFIG.training, checkpoint_epochs=3))) == digest
    assert {key for key in STUDY_NEUTRAL_KEYS if key.startswith(("model.", "data.", "training."))} == TRIAL_NEUTRAL_KEYS


def test_a_setting_that_earlier_checkpoints_lack_counts_where_it_is_not_its_default() -> None:
    """The digest was recorded when [training] had no `tf32`; a new one would make every earlier checkpoint useless."""
    config = TrialConfig(
        model=ModelConfig(options={"width": 0.05}),
        data=DataConfig(train_samples=200, validation_fraction=0.1),  # as every study had it then
        training=TrainingConfig(lr=1e-2, precision="fp32"),
        seed=3,
    )
    digest = "547baef90b906ade0d62fb7bfb592a4fe3ed70f9aa9db20129a5166c727a1a41"
    assert config_digest(config) == digest
    assert config_digest(replace(config, data=replace(config.data, resize="squash"))) == digest
    assert config_digest(replace(config, training=replace(config.training, tf32=True))) != digest
    for changed in ({"resize": "crop"}, {"groups": "a"}, {"bits": 12}, {"augment": ["AugMix"]}):
        assert config_digest(replace(config, data=replace(config.data, **changed))) != digest


# Torn, damaged, foreign


HEADER_BYTES = len(MAGIC) + 4 + 32 + 8


def cut(length: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, length % path.stat().st_size)


def flip(position: int, *, bit: int = 0) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 1 << bit
        path.write_bytes(data)

    return damage


DAMAGES = [
    *[(f"cut to {length}", cut(length), "it is torn, ") for length in (0, 1, len(MAGIC), HEADER_BYTES - 1)],
    *[(f"cut to {length}", cut(length), "it is torn, with ") for length in (HEADER_BYTES, 100, 1500, -1)],
    ("lengthened", lambda path: path.write_bytes(path.read_bytes() + b"\0"), "it is torn, with "),
    ("another program's", lambda path: path.write_bytes(b"PK\3\4" * 1000), "it is not a checkpoint of hpo's"),
    ("magic", flip(3), "it is not a checkpoint of hpo's"),
    ("version", flip(len(MAGIC) + 3, bit=1), "it has format version 3, and this hpo reads version 1"),
    ("digest", flip(len(MAGIC) + 4 + 20), "it is damaged: its checksum differs"),
    ("length", flip(HEADER_BYTES - 1), "it is torn, with "),
    *[(f"bit at {at}", flip(at, bit=5), "it is damaged: its checksum differs") for at in (HEADER_BYTES, 500, -1, -300)],
    (
        "another trial's",
        lambda path: save_elsewhere(path, identity={"study": "4f1c", "trial": 8}),
        "it belongs to another trial (study 4f1c, trial 8)",
    ),
    (
        "another configuration's",
        lambda path: save_elsewhere(path, checkpoint=fake(3, config=replace(CONFIG, seed=4))),
        "it belongs to another configuration of the trial",
    ),
    ("another epoch's", lambda path: shutil.copy(path_of(path.parent, 2), path), "it is of epoch 2"),
]


def save_elsewhere(
    path: Path, *, identity: dict[str, str | int] = IDENTITY, checkpoint: Checkpoint | None = None
) -> None:
    """Put a checkpoint in the place of another one."""
    checkpoint = checkpoint or fake(3)
    elsewhere = path.parent.with_name("elsewhere")
    CheckpointFolder(str(elsewhere), identity=identity).save(checkpoint)
    shutil.copy(path_of(elsewhere, checkpoint.epoch), path)


@pytest.mark.parametrize(("damage", "reason"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_what_is_not_whole_or_not_ours_is_passed_over_in_words(
    damage: Callable[[Path], None], reason: str, checkpoints: CheckpointFolder, folder: Path
) -> None:
    for epoch in (2, 3):
        checkpoints.save(fake(epoch))
    newest = path_of(folder, 3)
    damage(newest)
    loaded, [sentence] = checkpoints.load(CONFIG)
    assert loaded is not None
    assert loaded.epoch == 2
    assert_same(loaded.state, fake(2).state)
    assert sentence.startswith(f"the checkpoint {newest} was skipped: {reason}")
    path_of(folder, 2).write_bytes(b"")
    nothing, sentences = checkpoints.load(CONFIG)
    assert nothing is None
    assert len(sentences) == 2


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
def test_what_is_no_regular_file_is_passed_over_and_not_waited_for(
    checkpoints: CheckpointFolder, folder: Path, kind: str
) -> None:
    checkpoints.save(fake(1))
    if kind == "a pipe":
        os.mkfifo(path_of(folder, 2))
    elif kind == "a device":
        path_of(folder, 2).symlink_to("/dev/zero")
    else:
        path_of(folder, 2).mkdir()
    checkpoint, (sentence,) = checkpoints.load(CONFIG)
    assert checkpoint is not None
    assert checkpoint.epoch == 1
    assert sentence.endswith("was skipped: it could not be read: it is no regular file")


@pytest.mark.parametrize("disguised", [False, True])
def test_nothing_is_executed_that_a_file_holds(disguised: bool, checkpoints: CheckpointFolder, folder: Path) -> None:
    checkpoints.save(fake(1))
    marker = folder.parent / "executed"
    payload = pickle.dumps({"identity": IDENTITY, "state": Malicious(marker)}, protocol=2)
    header = struct.pack(f">{len(MAGIC)}sI32sQ", MAGIC, 1, hashlib.sha256(payload).digest(), len(payload))
    path_of(folder, 2).write_bytes((header if disguised else b"") + payload)
    loaded, [sentence] = checkpoints.load(CONFIG)
    assert loaded is not None
    assert loaded.epoch == 1
    assert ("its content is not that of a checkpoint" if disguised else "it is not a checkpoint of hpo's") in sentence
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists()  # or the file was harmless


def test_a_folder_that_cannot_be_read_is_an_error_and_not_empty(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoints = CheckpointFolder(f"{tmp_path}/file/0007", identity=IDENTITY)
    with pytest.raises(OSError, match="Not a directory"):
        checkpoints.load(CONFIG)
    with pytest.raises(OSError, match="Not a directory"):
        checkpoints.save(fake(1))


# Killed, out of space


WRITER = """
import os, sys
import torch
from hpo.train.checkpoint import Checkpoint, CheckpointFolder
from hpo.train.config import EpochResult

torch.set_num_threads(1)
result = EpochResult(lane=0, epoch=0, train_loss=2.0, train_accuracy=0.1, val_loss=2.0, val_accuracy=0.1,
                     test_accuracy=None, lr=0.1, seconds=1.5)
folder = CheckpointFolder(sys.argv[1], identity={"study": "4f1c", "trial": 7})

def write(first, last):
    os.write(1, b"%d\\n" % os.getpid())
    for epoch in range(first, last + 1):
        state = {"weights": torch.full((1_000_000,), float(epoch))}
        folder.save(Checkpoint(config_digest=sys.argv[2], epoch=epoch, state=state, results=[result] * epoch))
        os.write(1, b"%d\\n" % epoch)

for line in sys.stdin:  # torch is imported once, and each writer forked from here
    num_writers, first, last = map(int, line.split())
    for _ in range(num_writers):
        if os.fork() == 0:
            write(first, last)
            os._exit(0)
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(num_writers)]
    os.write(1, b"ended %s\\n" % str(codes).encode())
"""


@pytest.fixture
def writers(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WRITER, str(folder), config_digest(CONFIG)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def start(writers: subprocess.Popen[str], *, num_writers: int = 1, first: int, last: int) -> None:
    assert writers.stdin is not None
    writers.stdin.write(f"{num_writers} {first} {last}\n")
    writers.stdin.flush()


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_newest_checkpoint_or_the_one_before(
    writers: subprocess.Popen[str], checkpoints: CheckpointFolder, folder: Path
) -> None:
    assert writers.stdout is not None
    moments = random.Random(0)
    first = 1
    for _ in range(20):
        start(writers, first=first, last=10**6)
        pid = int(writers.stdout.readline())
        saved = int(writers.stdout.readline())
        time.sleep(moments.uniform(0, 0.06))
        os.kill(pid, 9)
        while not (line := writers.stdout.readline()).startswith("ended"):
            saved = int(line)
        assert line == "ended [-9]\n"
        loaded, passed_over = checkpoints.load(CONFIG)
        assert passed_over == []
        assert loaded is not None
        assert loaded.epoch in (saved, saved + 1)  # killed between the rename and the word of it
        assert_same(loaded.state, fake(loaded.epoch, num_weights=1_000_000).state)
        first = loaded.epoch + 1
    torn = list(folder.glob(".*.tmp"))
    assert torn, "no kill hit a writer while it wrote"
    for path in torn:
        os.utime(path, (0, 0))
    checkpoints.save(fake(first))
    assert epochs_in(folder) == [first - 1, first]


def test_two_writers_at_once_leave_what_one_would_have(
    writers: subprocess.Popen[str], checkpoints: CheckpointFolder, folder: Path
) -> None:
    assert writers.stdout is not None
    start(writers, num_writers=2, first=1, last=25)
    while not (line := writers.stdout.readline()).startswith("ended"):
        pass
    assert line == "ended [0, 0]\n"
    assert epochs_in(folder) == [24, 25]
    loaded, passed_over = checkpoints.load(CONFIG)
    assert passed_over == []
    assert loaded is not None
    assert loaded.epoch == 25


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = tmp_path / "small_disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "hpo-test", str(mounted)]
    try:
        failed = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if failed.returncode:
        pytest.skip(f"a small disk cannot be mounted: {failed.stderr.strip()}")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def test_a_full_disk_leaves_the_old_checkpoints_and_nothing_else(small_disk: Path) -> None:
    checkpoints = CheckpointFolder(str(small_disk / "0007"), identity=IDENTITY)
    for epoch in (1, 2):
        checkpoints.save(fake(epoch, num_weights=100_000))  # 400 kB
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as raised:
            checkpoints.save(fake(3, num_weights=100_000))
        assert raised.value.errno == errno.ENOSPC
        assert epochs_in(small_disk / "0007") == [1, 2]
    loaded, passed_over = checkpoints.load(CONFIG)
    assert passed_over == []
    assert loaded is not None
    assert_same(loaded.state, fake(2, num_weights=100_000).state)
    path_of(small_disk / "0007", 1).unlink()
    checkpoints.save(fake(3, num_weights=100_000))
    assert epochs_in(small_disk / "0007") == [2, 3]


# Object stores


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the URL of an empty bucket on an S3 server, which the environment names as it does for users."""
    server_class = pytest.importorskip("moto.server").ThreadedMotoServer
    s3fs = pytest.importorskip("s3fs")
    server = server_class(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"checkpoints-{secrets.token_hex(4)}"  # moto remembers buckets beyond a server's end
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_an_object_store_is_like_a_folder(bucket: str) -> None:
    s3fs = pytest.importorskip("s3fs")
    one, other, pattern = (CheckpointFolder(f"{bucket}/4f1c/{name}", identity=IDENTITY) for name in ("1", "12", "1*"))
    assert one.load(CONFIG) == (None, [])
    one.remove()
    another = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)

    def objects() -> list[str]:
        return [path.partition("/4f1c/")[2] for path in another.find(bucket)]

    for epoch in (1, 2, 3):
        for checkpoints in (one, other, pattern):
            checkpoints.save(fake(epoch))
    loaded, passed_over = one.load(CONFIG)
    assert loaded is not None
    assert passed_over == []
    assert_same(loaded.state, fake(3).state)
    assert objects() == [f"{name}/epoch-00000{epoch}.ckpt" for name in ("1*", "1", "12") for epoch in (2, 3)]

    # A listing that was remembered would not show what another process has written.
    another.pipe_file(f"{one.url}/epoch-000004.ckpt", another.cat_file(f"{one.url}/epoch-000003.ckpt")[:-1])
    loaded, [sentence] = one.load(CONFIG)
    assert loaded is not None
    assert loaded.epoch == 3
    assert sentence.startswith(f"the checkpoint {one.url}/epoch-000004.ckpt was skipped: it is torn, with ")

    assert sorted(list_folders(f"{bucket}/4f1c/")) == ["1", "1*", "12"]
    pattern.remove()
    one.remove()
    assert one.load(CONFIG) == (None, [])
    assert objects() == ["12/epoch-000002.ckpt", "12/epoch-000003.ckpt"]


def test_an_object_store_that_cannot_be_written_is_an_os_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")

    absent = CheckpointFolder(f"{bucket}-of-nobody/1", identity=IDENTITY)
    assert absent.load(CONFIG) == (None, [])
    with pytest.raises(OSError, match="bucket does not exist"):
        absent.save(fake(1))
    s3fs.S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    nobody = CheckpointFolder(f"{bucket}/1", identity=IDENTITY)
    with pytest.raises(OSError, match="NoCredentialsError"):
        nobody.save(fake(1))
    with pytest.raises(OSError, match="NoCredentialsError"):
        nobody.load(CONFIG)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"checkpoints.url needs hpo\[gs\] to be installed.*got 'gs://bucket/x'"):
        CheckpointFolder("gs://bucket/x", identity=IDENTITY)


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(UserError, match=r"checkpoints.url must be a folder or a URL .*got 'st://bucket/x'"):
        CheckpointFolder("st://bucket/x", identity=IDENTITY)


@pytest.mark.parametrize("secret", ["key:hidden@bucket/x", "key:hid/hidden@bucket/x", "bucket/x?token=hidden"])
def test_a_url_with_a_secret_is_refused_without_showing_it(secret: str) -> None:
    with pytest.raises(UserError, match=r"checkpoints.url must hold no password") as raised:
        CheckpointFolder(f"s3://{secret}", identity=IDENTITY)
    assert "hid" not in str(raised.value)

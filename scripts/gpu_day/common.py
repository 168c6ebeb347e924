"""What sections share: their figures, the device, trials on learnable noise, rates, and children of their own.

Shapes: N images of 32x32 with 3 channels.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hpo.train.config import DataConfig, EpochResult, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.data.datasets import DATASETS, OpenedDataset
from hpo.train.data.images import ArrayImages
from hpo.train.data.loading import DatasetCache, SplitDataset
from hpo.train.engines.plain import PlainEngine, build_lane
from hpo.train.engines.protocol import Engine
from hpo.train.engines.stack import TrialStack
from hpo.train.imports import ImportAllowlist
from scripts.gpu_day.figures import Figures
from scripts.gpu_day.noise import noise_images
from scripts.gpu_day.packages import ROOT

NETWORKS = "scripts.gpu_day.networks"  # the module of networks that are not built in
CPU = torch.device("cpu")
TINY_WIDTH = 0.05  # of the article's network in a tiny day
LR_OF = {"sgd": 0.05, "rmsprop": 3e-4, "adagrad": 3e-3, "adadelta": 1.0}  # where 1e-3 moves too little or far
MIN_CHUNK_S = 0.4  # of a measured rate, which is the median of NUM_CHUNKS
NUM_CHUNKS = 3

# Trials may name these networks until this process ends.
_allowed = ExitStack()
_allowed.enter_context(ImportAllowlist(modules=(NETWORKS,)).importable())
atexit.register(_allowed.close)


@dataclass(frozen=True, kw_only=True)
class Section:
    """What a section is given: where its figures go, and how much it should do."""

    figures: Figures
    is_tiny: bool
    folder: Path
    packages: Path | None
    started_at: float  # when its process was asked for, in seconds since the epoch
    limit_s: float

    def left_s(self) -> float:
        """Return the seconds until this section is killed."""
        return self.started_at + self.limit_s - time.time()

    def say(self, key: str, value: Any) -> None:
        """Put a figure on disk; see `Figures`."""
        self.figures.say(key, value)

    def trying(self, key: str) -> AbstractContextManager[None]:
        """Say what a block raises as a figure; see `Figures`."""
        return self.figures.trying(key)

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that is to find hpo, and the packages that were carried."""
        places = [ROOT, *([self.packages] if self.packages else []), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(str(place) for place in places if place)}

    def pick(self, full: Any, tiny: Any) -> Any:
        """Return what the size of the day asks for."""
        return tiny if self.is_tiny else full

    def needs_gpu(self, key: str) -> bool:
        """Return whether there is a GPU; where there is none, say that this was not measured."""
        if not on_gpu():
            self.say(key, "nothing to do on a CPU")
        return on_gpu()


def run_section(section: Section) -> None:
    """Run one section in this process; what is wrong outside its `trying` blocks is raised."""
    if section.is_tiny:
        torch.set_num_threads(1)  # more threads wait for each other where the cores have other work
    importlib.import_module(f"scripts.gpu_day.sections.{section.figures.section}").run(section)


# The device


def on_gpu() -> bool:
    """Return whether there is a CUDA device."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device that is measured: the first GPU, or the CPU."""
    return torch.device("cuda:0" if on_gpu() else "cpu")


def wait() -> None:
    """Wait for the GPU's kernels."""
    if on_gpu():
        torch.cuda.synchronize()


def new_stream() -> torch.cuda.Stream:
    """Return a stream on the current device."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    return stream


def free_memory() -> None:
    """Give what no tensor uses back to the GPU; engines and their lanes refer to each other."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


@contextmanager
def must_not_wait() -> Iterator[None]:
    """Let torch raise where one of its operations waits for the GPU; on a CPU nothing does."""
    if not on_gpu():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """Let cuDNN take only kernels that give the same digits each time."""
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = False


# Trials


def noise_trial(
    num_images: int,
    *,
    num_classes: int = 100,
    num_val: int | None = None,
    model: str = "article_cnn",
    width: float | None = None,
    augment: bool = False,
    **training: Any,
) -> TrialConfig:
    """Return a trial on learnable noise: each class has an image of its own, seen through noise, so that losses fall.

    Args:
        num_images: Images to train on.
        num_classes: Number of classes.
        num_val: Images to validate on. None: one of each class.
        model: The network: article_cnn, or the name of one in networks.py.
        width: Of the network, relative to its own.
        augment: Whether images are mirrored and cropped.
        training: What differs from Adam at 1e-3 with batches of 128.
    """
    num_val = num_val or num_classes
    name = f"noise-{num_images}-{num_val}-{num_classes}"
    DATASETS[name] = lambda config: learnable_noise(num_images + num_val, num_classes)
    settings = {"lr": 1e-3, "batch_size": 128, "optimizer": "adam", **training}
    return TrialConfig(
        model=ModelConfig(
            name=model if model == "article_cnn" else f"{NETWORKS}:{model}",
            options={} if width is None else {"width": width},
        ),
        data=DataConfig(
            name=name,
            validation_fraction=num_val / (num_images + num_val),
            placement="device",
            flip=augment,
            crop=2 if augment else 0,
        ),
        training=TrainingConfig(**settings),
        seed=0,
    )


def article_trial(section: Section, num_images: int, *, num_val: int | None = None, **training: Any) -> TrialConfig:
    """Return a trial of the article's network with batches of 128, on 100 classes; in a tiny day all is small."""
    if section.is_tiny:
        return noise_trial(40, num_val=num_val and 20, num_classes=4, width=TINY_WIDTH, batch_size=20, **training)
    return noise_trial(num_images, num_val=num_val, **training)


def small_trial(
    section: Section,
    *,
    model: str = "two_convolutions",
    optimizer: str = "adam",
    num_images: int = 1000,
    **training: Any,
) -> TrialConfig:
    """Return a trial of a small network with batches of 50, on 10 classes, in fp32 without TF32, to compare results.

    `two_convolutions` and `dropout` are well-conditioned: rounding stays as small as it is. Deep networks without batch
    norm, as the article's, amplify it in what Adam makes of gradients near 0.
    """
    widths = {"article_cnn": section.pick(0.25, TINY_WIDTH), "residual": section.pick(0.125, 0.02)}
    settings = {"lr": LR_OF.get(optimizer, 1e-3), "batch_size": section.pick(50, 15), "precision": "fp32", **training}
    return noise_trial(
        section.pick(num_images, 30),
        num_classes=section.pick(10, 3),
        model=model,
        width=widths.get(model),
        augment=True,
        optimizer=optimizer,
        **settings,
    )


def learnable_noise(num_images: int, num_classes: int) -> OpenedDataset:
    """Return the images of `noise_images` as a dataset without test images."""
    train = ArrayImages(*noise_images(num_images, num_classes))
    return OpenedDataset(train=train, open_test=None, num_classes=num_classes)


def with_training(config: TrialConfig, *, seed: int | None = None, **training: Any) -> TrialConfig:
    """Return the trial with other settings of its training, or another seed."""
    seed = config.seed if seed is None else seed
    return replace(config, seed=seed, training=replace(config.training, **training))


def load(config: TrialConfig, where: torch.device | None = None) -> SplitDataset:
    """Return the trial's dataset, on the device or elsewhere."""
    return DatasetCache(device=where or device()).get(config.data)


def plain_engine(where: torch.device | None = None, *, dataset_cache: DatasetCache | None = None) -> PlainEngine:
    """Return a plain engine on the device, or elsewhere."""
    return PlainEngine(device=str(where or device()), dataset_cache=dataset_cache)


@dataclass(frozen=True)
class Trained:
    """A trial's results, epoch by epoch, and its weights at the end: all parameters and buffers, float64 (P,)."""

    results: Sequence[EpochResult]
    weights_P: Tensor


def train(engine: Engine, config: TrialConfig, *, epochs: int) -> Trained:
    """Train a trial's first epochs, alone in an engine."""
    lane = engine.admit(config)
    results = [engine.run_epoch()[0] for _ in range(epochs)]
    weights_P = flat_weights(engine.checkpoint(lane).state["model"])
    engine.evict(lane)
    return Trained(results, weights_P)


def flat_weights(state: Mapping[str, Tensor]) -> Tensor:
    """Return the floating-point tensors of a network's state, one after the other, on the CPU."""
    return torch.cat([tensor.flatten().double().cpu() for tensor in state.values() if tensor.is_floating_point()])


def difference(config: TrialConfig, one: Trained, other: Trained) -> dict[str, float]:
    """Return how far two trainings of a trial are from each other.

    `weights` is the distance of the final weights, relative to that from the initial ones to the first. `losses` is the
    largest difference of a training or validation loss, relative to the first.
    """
    pairs = [
        pair
        for result, of_other in zip(one.results, other.results, strict=True)
        for pair in ((result.train_loss, of_other.train_loss), (result.val_loss, of_other.val_loss))
    ]
    initial_P = flat_weights(build_lane(config, data=load(config, CPU), device=CPU).model.state_dict())
    moved = (one.weights_P - initial_P).norm()
    return {
        "losses": max(abs(loss - of_other) / abs(loss) for loss, of_other in pairs),
        "weights": float((one.weights_P - other.weights_P).norm() / moved),
    }


# Rates


def rate(step: Callable[[], object], *, num_images: int, section: Section) -> dict[str, float]:
    """Return the images a second of a step: the median of chunks, each waited for at its end alone."""
    chunk_s = section.pick(MIN_CHUNK_S, 0.0)
    step()
    wait()
    start_s = time.perf_counter()
    for _ in range(section.pick(3, 1)):
        step()
    wait()
    per_step_s = (time.perf_counter() - start_s) / section.pick(3, 1)
    num_steps = max(1, int(chunk_s / max(per_step_s, 1e-6)))
    return timed_chunks(lambda: [step() for _ in range(num_steps)], num_images=num_images * num_steps, section=section)


def timed_chunks(
    chunk: Callable[[], object],
    *,
    num_images: int,
    section: Section,
) -> dict[str, float]:
    """Return the images a second of a chunk of work, waited for at its end, and the host's own time in it."""
    rates, host_s = [], []
    for _ in range(section.pick(NUM_CHUNKS, 1)):
        wait()
        start_s = time.perf_counter()
        chunk()
        host_s.append(time.perf_counter() - start_s)
        wait()
        rates.append(num_images / (time.perf_counter() - start_s))
    return {
        "images_per_s": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
        "n": len(rates),
        "host_us_per_image": 1e6 * statistics.median(host_s) / num_images,
    }


def plain_steps(config: TrialConfig, data: SplitDataset) -> Callable[[], None]:
    """Return a function that trains the plain engine on the next batch, in one epoch after another."""
    engine, lane = plain_engine(), build_lane(config, data=data, device=device())
    size = config.training.batch_size

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from data.train.batches(size, seed=config.seed, epoch=0)

    following = batches()
    lane.model.train()

    def step() -> None:
        engine.step(lane, *next(following))

    return step


def stack_steps(config: TrialConfig, data: SplitDataset, count: int, *, convolution: str) -> Callable[[], object]:
    """Return a function that trains a stack of so many trials on the same batches again and again."""
    stack = TrialStack(config, data=data, device=device(), convolution=convolution)
    for seed in range(count):
        stack.admit(with_training(config, seed=seed))
    images_KBCHW, labels_KB = next(stack.batches())
    factors = stack.factors(1)[0]
    return lambda: stack.step(images_KBCHW, labels_KB, factors)


# Children


def in_child(
    function: Callable[..., Any], *arguments: Any, timeout_s: float, environment: Mapping[str, str] | None = None
) -> Any:
    """Return what a function of a module returns in a fresh process, which has these variables from its start.

    Raises RuntimeError with the child's own words where it raises or dies, and TimeoutError.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments), daemon=True)
    with mock.patch.dict(os.environ, environment or {}):  # libraries read their variables when they are loaded
        process.start()
    sender.close()
    try:
        if not receiver.poll(timeout_s):
            raise TimeoutError(f"no answer of {function.__name__} within {timeout_s:g} s")
        error, value = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process of {function.__name__} died, exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if error is not None:
        raise RuntimeError(error)
    return value


def _answer(sender: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        sender.send((None, function(*arguments)))
    except Exception as error:
        sender.send((f"{type(error).__name__}: {error}", None))

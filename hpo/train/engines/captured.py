"""Captured lanes: each trial has its own network and its own CUDA graphs, which are replayed on a stream of its own.

A training step of a small network is a hundred kernels, and launching them takes the host longer than the device needs
to run them. A CUDA graph launches all of them at once, so that many trials keep one device busy side by side. Whatever
changes from step to step is read on the device, through counters that the step itself advances: a replay needs nothing
from the host. The next trial of the same kind is copied into the lane's tensors, and nothing is captured again.
On a CPU the same functions run uncaptured, so that tests hold them to the plain engine.
Shapes: S steps of an epoch, N training images, B batch, H W C image.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from hpo.errors import UserError
from hpo.train.config import EpochResult, TrialConfig, derive_seed
from hpo.train.data.batches import BatchLoader, flip_and_crop
from hpo.train.data.labels import has_several
from hpo.train.data.loading import SplitDataset
from hpo.train.data.sources import DeviceSource, batch_bounds
from hpo.train.engines.captured_optimizers import NotCapturable, build_capturable_optimizer
from hpo.train.engines.lane_state import (
    Evaluated,
    LaneState,
    check_test_set,
    evaluation_batch_size,
    evaluation_sums,
    initial_model,
    mixed_precision,
    numerics,
    optimizer_state_dict,
    take_snapshot,
    train_step,
    why_plain,
)
from hpo.train.engines.plain import PlainLaneState
from hpo.train.engines.side_effects import SideEffects, has_torchscript, own_state
from hpo.train.engines.vmap_ops import LaneGenerators
from hpo.train.failures import is_out_of_memory
from hpo.train.imports import describe_error
from hpo.train.losses import LOSSES, build_loss
from hpo.train.metrics import needs_outputs
from hpo.train.optim import optimizer_keys, why_no_rule
from hpo.train.parameter_groups import has_groups
from hpo.train.snapshot import Snapshot

NUM_WARM_UPS = 3  # runs before a capture, in which libraries choose kernels and allocate workspaces


def capture_key(config: TrialConfig) -> str:
    """Return a key that is the same for trials that the same graphs can train: what is a constant in them agrees."""
    training = config.training
    keys = {
        "batch_size",
        "optimizer",
        "label_smoothing",
        "loss",
        "class_weights",
        "focal_gamma",
        "gradient_clip",
        "precision",
        "tf32",
        "compile",
    }
    keys |= {"report_test_accuracy", "optimizer_options", *optimizer_keys(training.optimizer)}
    constants = [
        config.model,
        config.data,
        has_groups(training),
        why_plain(training),
        *((key, getattr(training, key)) for key in sorted(keys)),
    ]
    return json.dumps([repr(constant) for constant in constants])


class CapturedLane:
    """The tensors of one trial, and the graphs that train and evaluate it: of one kind, one trial after another."""

    def __init__(
        self, config: TrialConfig, *, data: SplitDataset, device: torch.device, like: CapturedLane | None = None
    ) -> None:
        """Make a lane for trials like `config`, and capture its graphs.

        Args:
            config: Any trial of the kind.
            data: The dataset of the trials, on the device.
            device: Where they are trained.
            like: A lane of the same kind, whose network is copied, because drawing one takes the host long.

        Raises:
            NotCapturable: Trials of this kind cannot be captured.
            UserError: They cannot be trained as they are configured.
        """
        check_test_set(config, data=data)
        self.key = capture_key(config)
        self.trial: LaneState | None = None
        self.config = config  # any trial of the kind
        self._data, self._device = data, device
        self._loss = build_loss(config.training, data=data)
        self._images_NHWC = _images_on_device(data.train)
        self._model = like.copy_network() if like else initial_model(config, data=data, device=device)
        self._parameters = list(self._model.parameters())
        self._amp_dtype = mixed_precision(config.training, device=device)
        _check_capturable(config, self._model, amp_dtype=self._amp_dtype)
        bounds = batch_bounds(len(data.train), config.training.batch_size)
        self._sizes = [end - start for start, end in bounds]
        self._positions_of = {size: torch.arange(size, device=device) for size in set(self._sizes)}
        self._optimizer = build_capturable_optimizer(
            self._parameters, config.training, num_steps=len(bounds), device=device
        )
        num_images, is_augmented = len(data.train), data.train.flip or data.train.crop > 0
        self._order_N = torch.arange(num_images, device=device)
        self._flips_N = torch.zeros(num_images, dtype=torch.bool, device=device) if is_augmented else None
        self._offsets_N2 = torch.zeros((num_images, 2), dtype=torch.int64, device=device)
        self._step_1, self._start_1 = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self._losses_S = torch.zeros(len(bounds), device=device)
        self._hits = torch.zeros((), dtype=torch.int64, device=device)
        self._splits = {"val": data.val}
        if config.training.report_test_accuracy:
            assert data.test is not None
            self._splits["test"] = data.test
        self._sums_2 = {split: torch.zeros(2, device=device) for split in self._splits}
        self._next_step = 0
        self._runner = _GraphRunner(device) if device.type == "cuda" else _EagerRunner(device)
        self._prepare()

    @property
    def num_steps(self) -> int:
        """Return the number of steps of an epoch."""
        return len(self._sizes)

    @property
    def is_at_end(self) -> bool:
        """Return whether all steps of the epoch have been issued."""
        return self._next_step == self.num_steps

    @torch.no_grad()
    def load(self, plain: PlainLaneState) -> None:
        """Take a trial of the lane's kind as the plain engine would train it next; `plain` stays as it is."""
        assert capture_key(plain.config) == self.key, "another kind of trial"
        self._runner.join()
        given = dict(_tensors_of(plain.model))
        for name, tensor in _tensors_of(self._model):
            tensor.copy_(given[name])
        self._optimizer.load(plain.optimizer)
        self._next_step = self.num_steps
        self.trial = LaneState(
            config=plain.config,
            data=self._data,
            network=lambda: self._model,
            multipliers=plain.multipliers,
            first_loss=plain.first_loss,
            results=list(plain.results),
        )

    @torch.no_grad()
    def begin_epoch(self) -> None:
        """Draw the epoch in progress, and put it on the device."""
        trial = self.trial
        assert trial is not None, "there is no trial in this lane"
        self._runner.join()
        order_1N, augment = self._data.train.shuffled([(trial.config.seed, trial.epoch)])
        self._order_N.copy_(order_1N[0])
        if augment is not None and self._flips_N is not None:
            self._flips_N.copy_(augment[0][0])
            self._offsets_N2.copy_(augment[1][0])
        self._optimizer.begin_epoch(trial, num_steps=self.num_steps)
        self._reset_counters()
        self._runner.begin(seed=derive_seed(trial.config.seed, "epoch", trial.epoch))

    def step(self) -> int:
        """Issue the next step of the epoch, without waiting for the device; return the number of its images."""
        size = self._sizes[self._next_step]
        self._next_step += 1
        self._runner.run(size, partial(self._train_step, size))
        return size

    def evaluate(self) -> None:
        """Issue the evaluation after the epoch's last step, without waiting for the device."""
        for split in self._splits:
            self._runner.run(split, partial(self._evaluate, split))

    def finish_epoch(self, *, lane: int, seconds: float) -> EpochResult:
        """Wait for the epoch, record it and return its result, under this number of the lane."""
        assert self.trial is not None, "there is no trial in this lane"
        self._runner.join()
        sums = {split: (self._sums_2[split] / len(loader)).tolist() for split, loader in self._splits.items()}
        return self.trial.finish_epoch(
            self._losses_S.cpu(),
            lane=lane,
            hits=int(self._hits),
            val=Evaluated(loss=sums["val"][0], accuracy=sums["val"][1]),
            test_accuracy=sums["test"][1] if "test" in sums else None,
            seconds=seconds,
        )

    def snapshot(self) -> Snapshot:
        """Return the trial after its last epoch; see `Engine`."""
        assert self.trial is not None, "there is no trial in this lane"
        optimizer = optimizer_state_dict(self.trial, self._model, self._optimizer.moments, device=self._device)
        return take_snapshot(self.trial, model=self._model.state_dict(), optimizer=optimizer)

    def copy_network(self) -> nn.Module:
        """Return a copy of the lane's network, drawn anew where a user's class cannot be copied."""
        self._runner.join()
        try:
            return copy.deepcopy(self._model)
        except Exception:  # whatever copying a user's object raises
            return initial_model(self.config, data=self._data, device=self._device)

    def close(self) -> None:
        """Free the lane's memory once the device has done what was issued; the lane is of no use afterwards."""
        self._runner.close()

    # What is captured

    def _train_step(self, size: int) -> None:
        """Train on the next batch, of this size, and advance the counters."""
        self._model.train()
        positions_B = self._start_1 + self._positions_of[size]
        indices_B = self._order_N.index_select(0, positions_B)
        images_BHWC = self._images_NHWC.index_select(0, indices_B)
        if self._flips_N is not None:
            images_BHWC = flip_and_crop(
                images_BHWC,
                flips_B=self._flips_N.index_select(0, positions_B),
                offsets_B2=self._offsets_N2.index_select(0, positions_B),
                padding=self._data.train.crop,
            )
        self._optimizer.select_step(self._step_1)
        loss, hits = train_step(
            self._model,
            self._optimizer,
            self._data.train.normalise(images_BHWC),
            self._data.train.labels_N.index_select(0, indices_B),
            parameters=self._parameters,
            loss_function=self._loss,
            amp_dtype=self._amp_dtype,
        )
        self._losses_S.index_copy_(0, self._step_1, loss[None])
        self._hits += hits
        self._step_1 += 1
        self._start_1 += size

    def _evaluate(self, split: str) -> None:
        loader = self._splits[split]
        batches = _batches_in_order(loader, evaluation_batch_size(self.config, data=self._data))
        sums_2 = evaluation_sums(
            self._model, batches, loss_function=self._loss, device=self._device, amp_dtype=self._amp_dtype
        )
        self._sums_2[split].copy_(sums_2)

    def _prepare(self) -> None:
        """Capture the graphs, and look for what they would lose. Learning rates are 0 until a trial is loaded."""
        self._model.train()
        watch = SideEffects(self._model, device=self._device)
        functions: dict[int | str, Callable[[], None]] = {
            size: partial(self._train_step, size) for size in self._positions_of
        }
        functions |= {split: partial(self._evaluate, split) for split in self._splits}
        with numerics(tf32=self.config.training.tf32):
            self._runner.capture(functions, before_each=self._reset_counters)
        self._model.train()
        if (found := watch.found()) is not None:
            raise NotCapturable(found)
        self._next_step = self.num_steps  # no epoch has begun

    def _reset_counters(self) -> None:
        self._next_step = 0
        for counter in (self._step_1, self._start_1, self._hits):
            counter.zero_()


class _EagerRunner:
    """Runs a lane's functions at once, as they are; random numbers are the lane's own."""

    def __init__(self, device: torch.device) -> None:
        self._generators = LaneGenerators(device)

    def capture(self, functions: Mapping[int | str, Callable[[], None]], *, before_each: Callable[[], None]) -> None:
        """Run each function once, as what a graph would lose shows then."""
        self.begin(seed=0)
        for name, function in functions.items():
            before_each()
            self.run(name, function)

    def begin(self, *, seed: int) -> None:
        self._generators.seed([seed])

    def run(self, name: int | str, function: Callable[[], None]) -> None:
        with self._generators.of(0):
            function()

    def join(self) -> None:
        pass

    def close(self) -> None:
        pass


class _GraphRunner:
    """Replays a lane's functions as CUDA graphs, on the lane's stream and with the lane's random numbers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._generator = torch.Generator(device)
        self._graphs: dict[int | str, torch.cuda.CUDAGraph] = {}

    def capture(self, functions: Mapping[int | str, Callable[[], None]], *, before_each: Callable[[], None]) -> None:
        """Warm each function up and capture it; raise NotCapturable where that cannot be.

        All of it runs on the stream that the graphs are replayed on: cuBLAS keeps a workspace for each stream, which
        graphs that were captured on one stream and run at the same time would share (pytorch issue 193402).
        """
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # These graphs run one after the other, so they may share their memory.
        pool = torch.cuda.graph_pool_handle()
        try:
            # The stream is made the current one here, too: a capture that fails leaves its own in place.
            with torch.cuda.stream(self._stream), self._drawing_from_own_generator():
                for function in functions.values():
                    for _ in range(NUM_WARM_UPS - 1):
                        before_each()
                        function()
                    before_each()
                    with _refusing_to_wait():
                        function()
                torch.cuda.synchronize(self._device)
                for name, function in functions.items():
                    before_each()
                    graph = torch.cuda.CUDAGraph()
                    # thread_local: other threads of a worker write checkpoints meanwhile.
                    with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                        function()
                    self._graphs[name] = graph
        except Exception as error:  # whatever waits for the device, or depends on what is there
            # What the lane's stream still runs writes to the lane's tensors, whose memory others are given next. This
            # raises where the error has made the process unusable.
            torch.cuda.synchronize(self._device)
            if isinstance(error, (NotCapturable, UserError)) or is_out_of_memory(error):
                raise
            raise NotCapturable(f"{describe_error(error)}".split("\n")[0][:200]) from error
        self.join()

    def begin(self, *, seed: int) -> None:
        """Have the random numbers of an epoch, and all that was put on the device, ready for the graphs."""
        self._generator.manual_seed(seed)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def run(self, name: int | str, function: Callable[[], None]) -> None:
        """Replay the function of this name."""
        with torch.cuda.stream(self._stream):
            self._graphs[name].replay()

    def join(self) -> None:
        """Have what the current stream does next come after what the lane's stream has been given."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def close(self) -> None:
        """Drop all graphs together, once they have run: they share their memory."""
        self._stream.synchronize()
        self._graphs.clear()

    @contextmanager
    def _drawing_from_own_generator(self) -> Iterator[None]:
        """Have the device's default generator draw from the lane's state, which captured graphs then refer to."""
        default = torch.cuda.default_generators[self._device.index or 0]
        before = default.graphsafe_get_state()
        default.graphsafe_set_state(self._generator.graphsafe_get_state())
        try:
            yield
        finally:
            default.graphsafe_set_state(before)


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Have whatever waits for the device raise an error.

    A capture would raise one, too, but end in a way that torch does not recover from: its allocator takes the capture
    for unfinished, and no longer frees what another stream has used, such as the buffer of each snapshot.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _check_capturable(config: TrialConfig, model: nn.Module, *, amp_dtype: torch.dtype | None) -> None:
    """Raise NotCapturable for what a graph would lose without an error."""
    if config.training.compile:
        raise NotCapturable("training.compile compiles a network by itself")
    if has_groups(config.training):
        raise NotCapturable("its parameters are not all trained alike (groups, layer_decay, no_decay or freeze)")
    if (reason := why_plain(config.training, amp_dtype)) is not None:
        raise NotCapturable(reason)
    if config.data.augment:
        raise NotCapturable("data.augment draws on the host, image by image")
    if (reason := why_no_rule(config.training)) is not None:
        raise NotCapturable(reason)
    if needs_outputs(config.training.metric):
        raise NotCapturable(f"training.metric = {config.training.metric!r} is computed from all outputs at once")
    if config.training.loss not in LOSSES:
        raise NotCapturable(f"training.loss = {config.training.loss!r} may wait for the device")
    if has_torchscript(model):
        raise NotCapturable("it has modules of TorchScript")
    if (name := own_state(model)) is not None:
        raise NotCapturable(f"{name} keeps a state of its own (get_extra_state)")
    if not all(parameter.requires_grad and parameter.is_floating_point() for parameter in model.parameters()):
        raise NotCapturable("it has parameters that are not trained")


def _images_on_device(loader: BatchLoader) -> Tensor:
    """Return all images of a split (N, H, W, C); raise NotCapturable where they are not on the device."""
    if has_several(loader.labels_N):
        raise NotCapturable("its images have several labels each")
    if not isinstance(loader.source, DeviceSource):
        raise NotCapturable("its images are not on the device")
    return loader.source.images_NHWC


def _batches_in_order(loader: BatchLoader, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a split in its fixed order, without a look at the host."""
    images_NHWC = _images_on_device(loader)
    for start, end in batch_bounds(len(loader), batch_size):
        yield loader.normalise(images_NHWC[start:end]), loader.labels_N[start:end]

"""The probe accepts what differs by rounding alone, however deep, and refuses what differs, however little."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hpo.train.config import DataConfig, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines import stack_probe, vmap_ops
from hpo.train.engines.plain import PlainEngine
from hpo.train.engines.stack import TrialStack
from hpo.train.engines.stack_probe import check_stackable
from hpo.train.engines.stacked_network import NotStackable, StackedNetwork
from hpo.train.engines.vmap_ops import CONVOLUTIONS, CustomOps, DropoutNotes, DropoutReplay, LaneGenerators
from hpo.train.models import build_model

CPU = torch.device("cpu")


def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def batch_norms(layers: int) -> nn.Module:
    body = block(3, 8, 4) + [module for _ in range(layers - 1) for module in block(8, 8)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def dropouts(layers: int) -> nn.Module:
    body = block(3, 8, 4) + [module for _ in range(layers - 1) for module in (*block(8, 8), nn.Dropout(0.2))]
    return nn.Sequential(*body, nn.Dropout2d(0.2, inplace=True), nn.Flatten(), nn.Linear(512, 10))


def article(width: float) -> nn.Module:
    return build_model(ModelConfig(options={"width": width}), channels=3, num_classes=10, image_size=32)


def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(32, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)


def probe(
    build: Callable[[], nn.Module],
    *,
    convolution: str = "grouped",
    amp_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    one, other = (build().to(memory_format=torch.channels_last) for _ in range(2))
    network = StackedNetwork(one, device=CPU, convolution=convolution)
    check_stackable(network, other, images(), amp_dtype=amp_dtype)


# What differs by rounding


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layers", [20, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("convolution", ["grouped", pytest.param("products", marks=pytest.mark.slow)])
def test_deep_networks_with_batch_norm_are_stackable(
    layers: int, amp_dtype: torch.dtype | None, convolution: str
) -> None:
    """Their gradients differ by 0.01 of the largest (20 layers) and 0.1 (40) from rounding alone, stacked or not."""
    probe(lambda: batch_norms(layers), convolution=convolution, amp_dtype=amp_dtype)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 16))])
def test_an_activation_that_rounding_moves_across_zero_is_no_difference(seed: int) -> None:
    """In one of 16 stacks, a gradient's error was 124 times that of the plain engine, and 8e-6 of the largest."""
    probe(lambda: article(0.2), seed=seed)


class TensorFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A device whose float32 convolutions and products round their inputs to 10 bits where torch's flags allow it.

    So does every CUDA GPU since Ampere; torch allows it for convolutions, and not for products, unless it is told
    otherwise. Grouped convolutions are left alone, as by the kernels that do not use tensor cores.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_rounded = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = function.__name__.split(".")[0]
        # The number of groups is the last argument forward, and the last but one backward.
        is_convolution = (name, args[-1]) == ("convolution", 1) or (name, args[-2:-1]) == ("convolution_backward", (1,))
        is_product = name in ("mm", "addmm", "bmm", "baddbmm")
        allowed = (is_convolution and torch.backends.cudnn.allow_tf32) or (
            is_product and torch.backends.cuda.matmul.allow_tf32
        )
        if allowed:
            args = [self.rounded(arg) for arg in args]
        return function(*args, **(kwargs or {}))

    def rounded(self, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
            return tensor
        self.num_rounded += 1
        return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_the_probe_does_not_round_to_tf32(convolution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with TensorFloat32() as device:
        probe(lambda: batch_norms(6), convolution=convolution)
    assert device.num_rounded == 0
    # The control: a probe that leaves torch's flags as they are refuses these networks on such a device.
    monkeypatch.setattr(stack_probe, "numerics", lambda *, tf32: torch.random.fork_rng(devices=[]))
    monkeypatch.setattr(stack_probe, "_run_exactly", lambda *_, **__: None)
    with TensorFloat32() as device, pytest.raises(NotStackable, match="other results than alone"):
        probe(lambda: batch_norms(6), convolution=convolution)
    assert device.num_rounded > 0


# What differs


def another_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = CustomOps._drawn

    def swapped(self: CustomOps, drop: Any, lanes_K: Tensor, **how: Any) -> Tensor:
        return drawn(self, drop, lanes_K, **how).flip(0)

    monkeypatch.setattr(CustomOps, "_drawn", swapped)


def change_batch_norm(change: Callable[..., Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        def vmap(info: Any, in_dims: Any, inputs: Tensor, *rest: Any) -> tuple[Tensor, int]:
            def changed(channels: Tensor, *given: Any) -> Tensor:
                return change(rest[-1], channels, *given)

            return vmap_rule(info, in_dims, inputs, *rest[:-1], changed)

        vmap_rule = vmap_ops._BatchNorm.vmap
        monkeypatch.setattr(vmap_ops._BatchNorm, "vmap", staticmethod(vmap))

    return apply


def no_running_mean(normalise: Any, channels: Tensor, mean: Tensor, *rest: Any) -> Tensor:
    return normalise(channels, mean.clone(), *rest)  # type: ignore[no-any-return]


def shared_statistics(normalise: Any, channels: Tensor, *given: Any) -> Tensor:
    one, other = channels.chunk(2, dim=1)
    both = torch.cat([(one + other) / 2] * 2, dim=1)
    return normalise(channels + 1e-2 * both, *given)  # type: ignore[no-any-return]


def a_little_more_eps(normalise: Any, channels: Tensor, *given: Any) -> Tensor:
    return normalise(channels, *given) * (1 - 5e-6)  # type: ignore[no-any-return]


def a_tensor_that_lanes_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def vmap(info: Any, in_dims: Any, inputs: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, int]:
        return rule(info, in_dims, inputs, weight[:1].expand_as(weight), bias)

    rule = vmap_ops._Linear.vmap
    monkeypatch.setattr(vmap_ops._Linear, "vmap", staticmethod(vmap))


def a_gradient_that_is_a_thousandth_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def convolve(images: Tensor, weight: Tensor, *rest: Any, convolution: Any) -> Tensor:
        return conv2d(images, weight * 1.001 - weight.detach() * 0.001, *rest, convolution=convolution)

    conv2d = vmap_ops._conv2d
    monkeypatch.setattr(vmap_ops, "_conv2d", convolve)


FAULTS = {
    "another mask": (another_mask, dropouts),
    "no running mean": (change_batch_norm(no_running_mean), batch_norms),
    "shared statistics": (change_batch_norm(shared_statistics), batch_norms),
    "a little more eps": (change_batch_norm(a_little_more_eps), batch_norms),
    "a shared tensor": (a_tensor_that_lanes_share, batch_norms),
    "a wrong gradient": (a_gradient_that_is_a_thousandth_more, batch_norms),
}


@pytest.mark.parametrize("amp_dtype", [None, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layers", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_stack_that_does_something_else_is_refused(
    fault: str, layers: int, amp_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However deep the network is, and though 20 layers of batch norm amplify rounding to 0.01 of a gradient."""
    strike, build = FAULTS[fault]
    probe(lambda: build(layers), amp_dtype=amp_dtype)
    strike(monkeypatch)
    with pytest.raises(NotStackable, match="other results than alone"):
        probe(lambda: build(layers), amp_dtype=amp_dtype)


def test_a_stack_that_computes_in_another_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when autocast does not reach what vmap makes of an operation."""
    rule = vmap_ops._Linear.vmap
    monkeypatch.setattr(vmap_ops._Linear, "vmap", staticmethod(lambda *args: (rule(*args)[0].float(), rule(*args)[1])))
    with pytest.raises(NotStackable, match=r"another precision than alone under torch\.bfloat16"):
        probe(lambda: article(0.05), amp_dtype=torch.bfloat16)


# The masks of dropout


def test_float64_takes_the_masks_that_float32_drew() -> None:
    """However a device draws in float64: nothing is drawn."""
    generators = LaneGenerators(CPU)
    layers = [nn.Dropout(0.3), nn.Dropout2d(0.2), nn.Dropout(0.5, inplace=True), nn.Dropout(0.0)]
    for seed, inputs in itertools.product(range(3), (torch.ones(4, 6, 5, 5), images()[:, :, :8, :8] + 1)):
        torch.manual_seed(seed)
        expected = nn.Sequential(*layers)(inputs.clone())
        torch.manual_seed(seed)
        with DropoutNotes(generators) as notes:
            torch.testing.assert_close(nn.Sequential(*layers)(inputs.clone()), expected, rtol=0, atol=0)
        before = torch.get_rng_state()
        with DropoutReplay(notes.masks) as replay:
            replayed = nn.Sequential(*layers)(inputs.double())
        assert replay.is_exact
        assert torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(replayed.float(), expected)
        assert torch.equal(replayed == 0, expected == 0)


@pytest.mark.parametrize("layers", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_masks_that_differ_by_precision_are_no_difference(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose kernels draw for float64 in another order than for float32."""

    def dropout(inputs: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if inputs.dtype == torch.float64:
            torch.rand(7)
        return draw(inputs, p, training, inplace)

    draw = F.dropout
    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(vmap_ops, "DROPOUTS", (dropout, *vmap_ops.DROPOUTS[1:]))
    probe(lambda: dropouts(layers))


# Networks that cannot be run in float64


class Cast(nn.Module):
    """A module that names its precision: float64 fails behind it, or is float32 in between."""

    def __init__(self, *, goes_back: bool) -> None:
        super().__init__()
        self.goes_back = goes_back

    def forward(self, images: Tensor) -> Tensor:
        logits = (3 * images.float()).sin()
        return logits.to(images.dtype) if self.goes_back else logits


@pytest.mark.parametrize("goes_back", [False, True])
def test_networks_that_name_their_precision_are_judged_in_float32(
    goes_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(*block(3, 8, 4), Cast(goes_back=goes_back), nn.Flatten(), nn.Linear(512, 10))

    probe(build)
    a_tensor_that_lanes_share(monkeypatch)
    with pytest.raises(NotStackable, match="other results than alone"):
        probe(build)


# What goes wrong in the probe


@pytest.fixture
def broken_products(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    def breaks(error: Exception) -> None:
        def vmap(*_: Any) -> tuple[Tensor, int]:
            raise error

        monkeypatch.setattr(CONVOLUTIONS["products"], "vmap", staticmethod(vmap))

    return breaks


def test_a_method_that_fails_harms_no_other(broken_products: Callable[[Exception], None]) -> None:
    config = TrialConfig(
        model=ModelConfig(options={"width": 0.05}),
        data=DataConfig(train_samples=150),
        training=TrainingConfig(lr=1e-2, batch_size=64, epochs=1),
        seed=3,
    )
    data = DatasetCache(device=CPU).get(config.data)

    def first_losses() -> list[float]:
        stack = TrialStack(config, data=data, device=CPU, convolution="grouped")
        stack.admit(config)
        return [result.val_loss for result in stack.run_epoch()]

    expected = first_losses()
    stack = TrialStack(config, data=data, device=CPU, convolution="grouped")
    broken_products(RuntimeError("GET was unable to find an engine to execute this computation"))
    with pytest.raises(NotStackable, match="unable to find an engine"):
        TrialStack(config, data=data, device=CPU, convolution="products")
    stack.admit(config)
    assert [result.val_loss for result in stack.run_epoch()] == expected == first_losses()
    engine = PlainEngine(device="cpu")
    engine.admit(config)
    assert engine.run_epoch()[0].val_loss == pytest.approx(expected[0], rel=1e-4)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_errors_of_the_device_are_no_reason_to_train_alone(
    kind: type[Exception], broken_products: Callable[[Exception], None]
) -> None:
    broken_products(kind("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(kind):
        probe(lambda: batch_norms(2), convolution="products")


def test_generators_and_flags_are_as_before() -> None:
    one, other = dropouts(2), dropouts(2)
    network = StackedNetwork(one, device=CPU, convolution="grouped")
    before = torch.get_rng_state(), torch.backends.cudnn.allow_tf32
    check_stackable(network, other, images(), amp_dtype=None)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.backends.cudnn.allow_tf32 == before[1]

"""Many networks of one architecture run as one: their parameters stacked, the forward pass mapped over them.

torch.vmap does the mapping; some operations are ours. Dropout is drawn for each network from its own generator, as
alone. Convolutions are grouped ones or products of matrices; they, pooling and batch norm keep a fast layout,
and they and linear layers the precision of autocast, which does not reach what vmap makes of them.
Shapes: K lanes (networks), B batch, C H W picture, O output channels, L classes; F values under a kernel.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hpo.train.imports import describe

# How far a stacked network's outputs may be from its own, relative to the largest: far above rounding in float32 or
# bf16, far below what another mask of dropout or a forgotten running mean makes.
SAME_FLOAT32, SAME_BF16 = 1e-3, 5e-2

CONVOLUTIONS = ("grouped", "products")
POOLINGS = (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


class NotStackable(Exception):
    """Why networks of this kind cannot be run as one."""


class LaneGenerators:
    """A random stream for each lane: the state of the device's generator that the lane would have alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: list[Tensor] = []

    def seed(self, seeds: Sequence[int]) -> None:
        """One stream for each seed, as `torch.manual_seed(seed)` begins it."""
        with self._restored():
            self._states = []
            for seed in seeds:
                self._seed(seed)
                self._states.append(self._get())

    def __len__(self) -> int:
        return len(self._states)

    @contextmanager
    def of(self, lane: int) -> Iterator[None]:
        """torch draws from this lane's stream."""
        with self._restored():
            self._set(self._states[lane])
            yield
            self._states[lane] = self._get()

    @contextmanager
    def _restored(self) -> Iterator[None]:
        before = self._get()
        try:
            yield
        finally:
            self._set(before)

    def _seed(self, seed: int) -> None:
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def _get(self) -> Tensor:
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()

    def _set(self, state: Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)


class StackedNetwork:
    """Networks like `model`, whose parameters and buffers are given with each call, stacked."""

    def __init__(self, model: nn.Module, *, device: torch.device, convolution: str = "grouped") -> None:
        """`model` is on the device, `convolution` one of CONVOLUTIONS; call `check` before anything else.

        Raises NotStackable where such networks cannot be run as one."""
        for module in model.modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                raise NotStackable(f"{type(module).__name__} keeps a state of its own (get_extra_state)")
        if not all(parameter.requires_grad and parameter.is_floating_point() for parameter in model.parameters()):
            raise NotStackable("it has parameters that are not trained")
        self._model = model
        self.streams = LaneGenerators(device)
        self._ours = CustomOps(self.streams, convolution=_Products if convolution == "products" else _Grouped)

    def __call__(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], images: Tensor, *, training: bool
    ) -> Tensor:
        """The outputs (K, B, L) for each lane's pictures (K, B, C, H, W), or for the same ones (B, C, H, W).

        Parameters and buffers have K in front of their own shapes; in training, buffers are changed in place, and
        dropout draws from `streams`. Differentiable with regard to the parameters.
        """
        self._model.train(training)

        def one(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
            logits: Tensor = torch.func.functional_call(self._model, (params, buffers), (images,))
            return logits

        lanewise = torch.vmap(one, in_dims=(0, 0, 0 if images.dim() == 5 else None), randomness="error")
        with self._ours:
            logits_KBL: Tensor = lanewise(dict(params), dict(buffers), images)
        return logits_KBL

    def check(self, other: nn.Module, images_BCHW: Tensor, *, autocast: Callable[[], torch.autocast]) -> None:
        """Raises NotStackable where this network beside another does not do on these pictures what each does alone."""
        networks = [copy.deepcopy(network) for network in (self._model, other)]
        pictures = [images_BCHW, images_BCHW.flip(0)]
        stacked_buffers = {
            name: torch.stack([buffer, other.get_buffer(name)]) for name, buffer in self._model.named_buffers()
        }
        leaves = {
            name: torch.stack([parameter.detach(), other.get_parameter(name).detach()]).requires_grad_()
            for name, parameter in self._model.named_parameters()
        }
        with _restoring_generators(images_BCHW.device), autocast():
            alone = [
                self._alone(network, images, seed=seed)
                for seed, (network, images) in enumerate(zip(networks, pictures, strict=True))
            ]
            self.streams.seed([0, 1])
            try:
                logits_KBL = self(leaves, stacked_buffers, torch.stack(pictures), training=True)
                grads = torch.autograd.grad(logits_KBL.float().square().sum(), list(leaves.values()))
                with torch.no_grad():
                    evaluated_KBL = self(leaves, stacked_buffers, images_BCHW, training=False)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever vmap says of what it cannot map, and modules of what they get
                raise NotStackable(f"{describe(error)}".split("\n")[0][:200]) from None
            with torch.no_grad():
                evaluated = [network.eval()(images_BCHW) for network in networks]
        tolerance = SAME_FLOAT32 if alone[0][0].dtype == torch.float32 else SAME_BF16
        for lane, (network, (logits_BL, own_grads)) in enumerate(zip(networks, alone, strict=True)):
            # Measured against the largest of their sort: a bias in front of a batch norm has a gradient, and a channel
            # without an activation a running mean, that are nothing but rounding.
            buffers = [(buffer, stacked_buffers[name][lane]) for name, buffer in network.named_buffers()]
            sorts = [
                [(logits_BL, logits_KBL[lane].detach())],
                [(evaluated[lane], evaluated_KBL[lane])],
                [(own, stacked[lane]) for own, stacked in zip(own_grads, grads, strict=True)],
                [pair for pair in buffers if pair[0].numel() and pair[0].is_floating_point()],
                [pair for pair in buffers if pair[0].numel() and not pair[0].is_floating_point()],
            ]
            for pairs in filter(None, sorts):
                largest = max(float(own.abs().max()) for own, _ in pairs)
                differences = [float((stacked - own).abs().max()) for own, stacked in pairs]
                if not all(difference <= tolerance * max(largest, 1e-30) for difference in differences):  # nor NaN
                    raise NotStackable("stacked, it gives other results than alone")

    def _alone(self, network: nn.Module, images_BCHW: Tensor, *, seed: int) -> tuple[Tensor, list[Tensor]]:
        """Outputs in training and gradients of a network alone, which sees what it does beside computing them."""
        torch.manual_seed(seed)
        network.train()
        generators, attributes = _other_generators(), _attributes(network)
        with _Layouts() as layouts:
            logits_BL = network(images_BCHW)
        self._ours.layouts = layouts.seen
        if _other_generators() != generators:
            raise NotStackable("it draws from Python's or NumPy's generator")
        if _attributes(network) != attributes:
            raise NotStackable("its modules change their own attributes in training")
        grads = torch.autograd.grad(logits_BL.float().square().sum(), list(network.parameters()), allow_unused=True)
        if any(grad is None for grad in grads):
            raise NotStackable("it has parameters that its output does not depend on")
        return logits_BL.detach(), [grad for grad in grads if grad is not None]


class _Watching(TorchFunctionMode):
    """Is asked for every function of torch's that is called while it is entered."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.call(function, args, kwargs or {})

    def call(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return function(*args, **kwargs)


class _Layouts(_Watching):
    """Notes the memory format of what is given to each dropout, in whose order it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.memory_format] = []

    def call(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if function in DROPOUTS:
            inputs = args[0] if args else kwargs["input"]
            is_pictures = inputs.dim() == 4 and not inputs.is_contiguous()
            self.seen.append(torch.channels_last if is_pictures else torch.contiguous_format)
        return super().call(function, args, kwargs)


class CustomOps(_Watching):
    """Puts our operations in the place of torch's for as long as it is entered."""

    def __init__(self, streams: LaneGenerators, *, convolution: type[_Grouped] | type[_Products]) -> None:
        super().__init__()
        self.layouts: list[torch.memory_format] = []  # of the dropouts, in the order of their calls
        self._streams, self._convolution = streams, convolution
        self._num_dropouts = 0

    def __enter__(self) -> CustomOps:
        self._num_dropouts = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def call(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if function in DROPOUTS:
            return self._dropout(function, *args, **kwargs)
        if function is F.conv2d:
            return _conv2d(*args, **kwargs, convolution=self._convolution)
        if function is F.linear:
            return _linear(*args, **kwargs)
        if function is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if function in POOLINGS:
            return _pool(function, *args, **kwargs)
        return super().call(function, args, kwargs)

    def _dropout(
        self,
        function: Callable[..., Tensor],
        input: Tensor,  # as torch names it, whose callers may
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if not training:
            return function(input, p, training, inplace)
        layout = self.layouts[self._num_dropouts]
        self._num_dropouts += 1
        dropped: Tensor = _Dropout.apply(input, lambda ones: function(ones, p), layout, self._streams)
        return input.copy_(dropped) if inplace else dropped


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = _Linear.apply(input, weight, bias) if input.dim() > 1 else F.linear(input, weight, bias)
    return result


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    def normalise(
        inputs: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        return F.batch_norm(inputs, mean, var, weight, bias, training, momentum, eps)

    normalised: Tensor = _BatchNorm.apply(input, running_mean, running_var, weight, bias, normalise)
    return normalised


def _pool(function: Callable[..., Tensor], input: Tensor, *settings: Any, **named: Any) -> Tensor:
    if input.dim() != 4:
        return function(input, *settings, **named)
    result: Tensor = _Pooled.apply(input, lambda images: function(images, *settings, **named))
    return result


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    convolution: type[_Grouped] | type[_Products],
) -> Tensor:
    result: Tensor
    if input.dim() != 4:
        result = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        return result
    result = convolution.apply(input, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups)
    return result


class _Lanewise(torch.autograd.Function):
    """An operation with a rule for vmap; autograd records what the rule does.

    `forward` is what happens to what is the same for all lanes, such as pictures in validation before the first layer.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class _Dropout(_Lanewise):
    """Dropout of every lane from that lane's stream."""

    @staticmethod
    def forward(inputs: Tensor, drop: Any, layout: torch.memory_format, streams: LaneGenerators) -> Tensor:
        raise RuntimeError("dropout of what is the same for all lanes")

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, inputs: Tensor, drop: Any, layout: torch.memory_format, streams: LaneGenerators
    ) -> tuple[Tensor, int]:
        lanes_K = inputs.movedim(in_dims[0], 0)
        assert len(lanes_K) == len(streams)
        masks = []
        for lane, activations in enumerate(lanes_K.detach()):
            with streams.of(lane):
                masks.append(drop(torch.ones_like(activations, memory_format=layout)))
        return lanes_K * torch.stack(masks), 0


class _Grouped(_Lanewise):
    """A convolution of every lane's pictures with that lane's kernels, as one whose groups are the lanes.

    With their channels side by side in channels_last it is faster on a CPU than what vmap makes of it.
    """

    @staticmethod
    def forward(images: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        return F.conv2d(images, weight, bias, *settings)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, images: Tensor, weight: Tensor, bias: Tensor | None,
        stride: Any, padding: Any, dilation: Any, groups: int,
    ) -> tuple[Tensor, int]:  # fmt: skip
        weight_KOCHW, bias_KO = _of_lanes(info, in_dims[1], weight), _of_lanes(info, in_dims[2], bias)
        if in_dims[0] is not None:
            images, groups = _side_by_side(images, in_dims[0]), groups * info.batch_size
        elif groups > 1:  # the same pictures for all lanes, in groups
            images, groups = images.repeat(1, info.batch_size, 1, 1), groups * info.batch_size
        bias_O = None if bias_KO is None else bias_KO.flatten()
        result = F.conv2d(images, weight_KOCHW.flatten(0, 1), bias_O, stride, padding, dilation, groups)
        return result.view(len(result), info.batch_size, -1, *result.shape[2:]), 1


class _Products(_Grouped):
    """The same as a product of matrices for each lane, where that can be."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, images: Tensor, weight: Tensor, bias: Tensor | None,
        stride: Any, padding: Any, dilation: Any, groups: int,
    ) -> tuple[Tensor, int]:  # fmt: skip
        if groups > 1 or dilation != (1, 1) or isinstance(padding, str):
            return _Grouped.vmap(info, in_dims, images, weight, bias, stride, padding, dilation, groups)
        weight_KOCHW, bias_KO = _of_lanes(info, in_dims[1], weight), _of_lanes(info, in_dims[2], bias)
        height, width = weight_KOCHW.shape[-2:]
        is_shared = in_dims[0] is None  # the same pictures for all lanes
        pictures = images if is_shared else images.movedim(in_dims[0], 0).flatten(0, 1)
        padded = F.pad(pictures, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1)
        places = padded.unfold(1, height, stride[0]).unfold(2, width, stride[1])  # B H W C kernel's H W
        filters_KFO = weight_KOCHW.flatten(2).mT
        patches = places.reshape(1 if is_shared else info.batch_size, -1, filters_KFO.shape[1])  # K BN F
        if bias_KO is None:
            products = patches @ filters_KFO
        else:
            products = torch.baddbmm(bias_KO[:, None], patches.expand(info.batch_size, -1, -1), filters_KFO)
        result_KBHWO = products.view(info.batch_size, -1, *places.shape[1:3], filters_KFO.shape[2])
        return result_KBHWO.permute(0, 1, 4, 2, 3), 0


class _Pooled(_Lanewise):
    """A pooling of pictures, in the layout of the convolutions."""

    @staticmethod
    def forward(images: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        return pool(images)

    @staticmethod
    def vmap(info: Any, in_dims: Any, images: Tensor, pool: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
        result = pool(_side_by_side(images, in_dims[0]))
        return result.view(len(result), info.batch_size, -1, *result.shape[2:]), 1


class _Linear(_Lanewise):
    """A linear layer of every lane, as a product of matrices each; under autocast in its precision, unlike vmap's."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(inputs, weight, bias)

    @staticmethod
    def vmap(info: Any, in_dims: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        inputs, weight_KOF = _of_lanes(info, in_dims[0], inputs), _of_lanes(info, in_dims[1], weight)
        bias_KO = _of_lanes(info, in_dims[2], bias)
        rows_KNF, weight_KFO = inputs.flatten(1, -2), weight_KOF.mT
        if bias_KO is None:
            result = torch.bmm(rows_KNF, weight_KFO)
        else:
            result = torch.baddbmm(bias_KO[:, None], rows_KNF, weight_KFO)
        return result.view(*inputs.shape[:-1], -1), 0


class _BatchNorm(_Lanewise):
    """A batch norm over the lanes' channels side by side; running statistics are changed in place."""

    @staticmethod
    def forward(inputs: Tensor, *rest: Any) -> Tensor:
        *given, normalise = rest
        return normalise(inputs, *given)  # type: ignore[no-any-return]

    @staticmethod
    def vmap(info: Any, in_dims: Any, inputs: Tensor, *rest: Any) -> tuple[Tensor, int]:
        *given, normalise = rest
        stacked = [_of_lanes(info, dim, tensor) for dim, tensor in zip(in_dims[1:], given, strict=False)]
        channels = _of_lanes(info, in_dims[0], inputs).movedim(0, 1).flatten(1, 2)
        if channels.device.type == "cpu":  # where in channels_last the sums depend on the number of lanes
            channels = channels.contiguous()
        result = normalise(channels, *(None if tensor is None else tensor.flatten() for tensor in stacked))
        return result.view(len(result), info.batch_size, -1, *result.shape[2:]), 1


def _side_by_side(images: Tensor, lane_dim: int) -> Tensor:
    """(B, K C, H, W) in channels_last."""
    return images.movedim(lane_dim, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)


def _of_lanes(info: Any, lane_dim: int | None, tensor: Tensor | None) -> Any:
    """With the lanes in front, also where it is the same for all of them; None stays None."""
    if tensor is None:
        return None
    return tensor.expand(info.batch_size, *tensor.shape) if lane_dim is None else tensor.movedim(lane_dim, 0)


def _pair(value: Any) -> Any:
    """One number for both directions as two; a padding may also be a word."""
    return (value, value) if isinstance(value, int) else value if isinstance(value, str) else tuple(value)


def _attributes(network: nn.Module) -> list[bytes]:
    """The state of its modules beside parameters and buffers, as far as it can be written down."""
    states = []
    for module in network.modules():
        own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
        for key, value in own.items():
            try:
                states.append(pickle.dumps((key, value)))
            except Exception:  # whatever pickling a user's object does
                states.append(repr((key, value)).encode())
    return states


def _other_generators() -> bytes:
    """The state of the generators that are not torch's."""
    return pickle.dumps((random.getstate(), numpy.random.get_state()))


@contextmanager
def _restoring_generators(device: torch.device) -> Iterator[None]:
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])

"""Many networks of one architecture run as one: their parameters stacked, the forward pass mapped over them.

torch.vmap does the mapping; some operations are ours. Dropout is drawn for each network from its own generator, as
alone. Convolutions are grouped ones or products of matrices; they, pooling and batch norm keep a fast layout,
and they and linear layers the precision of autocast, which does not reach what vmap makes of them.
Shapes: K lanes (networks), B batch, C H W picture, O output channels, L classes; F values under a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = ("grouped", "products")
POOLINGS = (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


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


class _FunctionMode(TorchFunctionMode):
    """Is asked for every function of torch's that is called while it is entered."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.call(function, args, kwargs or {})

    def call(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return function(*args, **kwargs)


class DropoutLayouts(_FunctionMode):
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


class CustomOps(_FunctionMode):
    """Puts our operations in the place of torch's for as long as it is entered."""

    def __init__(
        self, streams: LaneGenerators, *, convolution: type[GroupedConvolution] | type[MatmulConvolution]
    ) -> None:
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
    result: Tensor = _Pooling.apply(input, lambda images: function(images, *settings, **named))
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
    convolution: type[GroupedConvolution] | type[MatmulConvolution],
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


class GroupedConvolution(_Lanewise):
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
        weight_KOCHW, bias_KO = _lanes_first(info, in_dims[1], weight), _lanes_first(info, in_dims[2], bias)
        if in_dims[0] is not None:
            images, groups = _lanes_as_channels(images, in_dims[0]), groups * info.batch_size
        elif groups > 1:  # the same pictures for all lanes, in groups
            images, groups = images.repeat(1, info.batch_size, 1, 1), groups * info.batch_size
        bias_O = None if bias_KO is None else bias_KO.flatten()
        result = F.conv2d(images, weight_KOCHW.flatten(0, 1), bias_O, stride, padding, dilation, groups)
        return result.view(len(result), info.batch_size, -1, *result.shape[2:]), 1


class MatmulConvolution(GroupedConvolution):
    """The same as a product of matrices for each lane, where that can be."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, images: Tensor, weight: Tensor, bias: Tensor | None,
        stride: Any, padding: Any, dilation: Any, groups: int,
    ) -> tuple[Tensor, int]:  # fmt: skip
        if groups > 1 or dilation != (1, 1) or isinstance(padding, str):
            return GroupedConvolution.vmap(info, in_dims, images, weight, bias, stride, padding, dilation, groups)
        weight_KOCHW, bias_KO = _lanes_first(info, in_dims[1], weight), _lanes_first(info, in_dims[2], bias)
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


class _Pooling(_Lanewise):
    """A pooling of pictures, in the layout of the convolutions."""

    @staticmethod
    def forward(images: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        return pool(images)

    @staticmethod
    def vmap(info: Any, in_dims: Any, images: Tensor, pool: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
        result = pool(_lanes_as_channels(images, in_dims[0]))
        return result.view(len(result), info.batch_size, -1, *result.shape[2:]), 1


class _Linear(_Lanewise):
    """A linear layer of every lane, as a product of matrices each; under autocast in its precision, unlike vmap's."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(inputs, weight, bias)

    @staticmethod
    def vmap(info: Any, in_dims: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        inputs, weight_KOF = _lanes_first(info, in_dims[0], inputs), _lanes_first(info, in_dims[1], weight)
        bias_KO = _lanes_first(info, in_dims[2], bias)
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
        stacked = [_lanes_first(info, dim, tensor) for dim, tensor in zip(in_dims[1:], given, strict=False)]
        channels = _lanes_first(info, in_dims[0], inputs).movedim(0, 1).flatten(1, 2)
        if channels.device.type == "cpu":  # where in channels_last the sums depend on the number of lanes
            channels = channels.contiguous()
        result = normalise(channels, *(None if tensor is None else tensor.flatten() for tensor in stacked))
        return result.view(len(result), info.batch_size, -1, *result.shape[2:]), 1


def _lanes_as_channels(images: Tensor, lane_dim: int) -> Tensor:
    """(B, K C, H, W) in channels_last."""
    return images.movedim(lane_dim, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)


def _lanes_first(info: Any, lane_dim: int | None, tensor: Tensor | None) -> Any:
    """With the lanes in front, also where it is the same for all of them; None stays None."""
    if tensor is None:
        return None
    return tensor.expand(info.batch_size, *tensor.shape) if lane_dim is None else tensor.movedim(lane_dim, 0)


def _pair(value: Any) -> Any:
    """One number for both directions as two; a padding may also be a word."""
    return (value, value) if isinstance(value, int) else value if isinstance(value, str) else tuple(value)

"""Operations for many networks at once: what torch.vmap runs in the place of some of torch's own.

Dropout is drawn for each network from its own generator, as it would be alone. Convolutions are grouped ones, or
products of matrices. They, pooling and batch norm keep a fast memory layout. They and linear layers keep the precision
of autocast, which does not reach what vmap makes of them.
Shapes: K lanes (networks), B batch, C H W image, O output channels, N rows, F values under a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

POOLINGS = (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


class LaneGenerators:
    """A random generator for each lane, in the state that the device's generator would have if the lane were alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: list[Tensor] = []

    def seed(self, seeds: Sequence[int]) -> None:
        """Have one generator for each seed, in the state after `torch.manual_seed(seed)`."""
        with self.restored():
            self._states = []
            for seed in seeds:
                self._seed(seed)
                self._states.append(self._get())

    def __len__(self) -> int:
        """Return the number of lanes."""
        return len(self._states)

    @contextmanager
    def of(self, lane: int) -> Iterator[None]:
        """Make torch draw from this lane's generator."""
        with self.restored():
            self._set(self._states[lane])
            yield
            self._states[lane] = self._get()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Give the device's generator the state back that it has now."""
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
    """A mode in which every call of a function of torch's goes through `call`."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.call(function, args, kwargs or {})

    def call(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what the function returns."""
        return function(*args, **kwargs)


class DropoutNotes(_FunctionMode):
    """A mode that notes the mask of each dropout of a network alone, and how its input lies, which orders the draw."""

    def __init__(self, generators: LaneGenerators) -> None:
        super().__init__()
        self.inputs: list[tuple[torch.memory_format, torch.dtype]] = []
        self.masks: list[Tensor] = []
        self._generators = generators

    def call(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Note a dropout's input and its mask, and call the function."""
        if function in DROPOUTS:
            self._note(function, *args, **kwargs)
        return super().call(function, args, kwargs)

    def _note(self, function: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> None:
        if not training:
            return
        is_channels_last = input.dim() == 4 and not input.is_contiguous()
        layout = torch.channels_last if is_channels_last else torch.contiguous_format
        self.inputs.append((layout, input.dtype))
        with self._generators.restored():
            self.masks.append(function(torch.ones_like(input), p))


class DropoutReplay(_FunctionMode):
    """A mode in which each dropout takes a mask that was noted; it sees whether anything is not in float64."""

    def __init__(self, masks: Sequence[Tensor]) -> None:
        super().__init__()
        self.is_exact = True
        self._masks = iter(masks)

    def call(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the function, or apply the next mask in the place of a dropout."""
        result = self._drop(*args, **kwargs) if function in DROPOUTS else super().call(function, args, kwargs)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.is_exact = self.is_exact and result.dtype == torch.float64
        return result

    def _drop(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training:
            return input
        dropped = input * next(self._masks).to(input.dtype)
        return input.copy_(dropped) if inplace else dropped


class CustomOps(_FunctionMode):
    """A mode that puts our operations in the place of torch's."""

    def __init__(self, generators: LaneGenerators, *, convolution: type[GroupedConvolution]) -> None:
        super().__init__()
        self.dropouts: list[tuple[torch.memory_format, torch.dtype]] = []  # how their inputs lie alone, in their order
        self.masks_KB: Sequence[Tensor] | None = None  # of each dropout, to be taken; None: they are drawn
        self._generators, self._convolution = generators, convolution
        self._num_dropouts = 0

    def __enter__(self) -> Self:
        self._num_dropouts = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def call(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call our operation where there is one, else the function itself."""
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
        input: Tensor,  # torch's names of the arguments, which callers may use
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if not training:
            return function(input, p, training, inplace)
        number = self._num_dropouts
        self._num_dropouts += 1

        def masks(lanes_K: Tensor) -> Tensor:
            if self.masks_KB is not None:
                return self.masks_KB[number]
            layout, dtype = self.dropouts[number]
            return self._drawn(lambda ones: function(ones, p), lanes_K, layout=layout, dtype=dtype)

        dropped: Tensor = _Dropout.apply(input, masks)
        return input.copy_(dropped) if inplace else dropped

    def _drawn(
        self, drop: Callable[[Tensor], Tensor], lanes_K: Tensor, *, layout: torch.memory_format, dtype: torch.dtype
    ) -> Tensor:
        """Return each lane's mask, drawn as it would be alone."""
        assert len(lanes_K) == len(self._generators)
        masks = []
        for lane, activations in enumerate(lanes_K.detach()):
            with self._generators.of(lane):
                masks.append(drop(torch.ones_like(activations, dtype=dtype, memory_format=layout)))
        return torch.stack(masks)


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
    convolution: type[GroupedConvolution],
) -> Tensor:
    result: Tensor
    if input.dim() != 4:
        result = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        return result
    result = convolution.apply(input, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups)
    return result


class _LanewiseFunction(torch.autograd.Function):
    """An operation with a rule for vmap; autograd records what the rule does.

    `forward` runs where the input is the same for all lanes, as images are in validation before the first layer.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: autograd differentiates the rule itself."""


class _Dropout(_LanewiseFunction):
    """Dropout of every lane with that lane's mask."""

    @staticmethod
    def forward(inputs: Tensor, masks: Callable[[Tensor], Tensor]) -> Tensor:
        """Raise RuntimeError: lanes that share an input would have to draw different masks for it."""
        raise RuntimeError("dropout of what is the same for all lanes")

    @staticmethod
    def vmap(info: Any, in_dims: Any, inputs: Tensor, masks: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
        """Return each lane's input times its mask."""
        lanes_K = inputs.movedim(in_dims[0], 0)
        return lanes_K * masks(lanes_K).to(lanes_K.dtype), 0


class GroupedConvolution(_LanewiseFunction):
    """A convolution of every lane's images with that lane's kernels, as one whose groups are the lanes.

    With the lanes' channels next to each other in channels_last it is faster on a CPU than what vmap makes of it.
    """

    @staticmethod
    def forward(images: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        """Return the convolution of images with kernels that are the same for all lanes."""
        return F.conv2d(images, weight, bias, *settings)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
    ) -> tuple[Tensor, int]:
        """Return (K, B, O, H, W) from one grouped convolution."""
        weight_KOCHW, bias_KO = _lanes_first(info, in_dims[1], weight), _lanes_first(info, in_dims[2], bias)
        if in_dims[0] is not None:
            images, groups = _lanes_as_channels(images, in_dims[0]), groups * info.batch_size
        elif groups > 1:  # the same images for all lanes, in groups
            images, groups = images.repeat(1, info.batch_size, 1, 1), groups * info.batch_size
        bias_O = None if bias_KO is None else bias_KO.flatten()
        result = F.conv2d(images, weight_KOCHW.flatten(0, 1), bias_O, stride, padding, dilation, groups)
        return _channels_as_lanes(info, result), 0


class MatmulConvolution(GroupedConvolution):
    """The same convolution as a product of matrices for each lane, where that is possible."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
    ) -> tuple[Tensor, int]:
        """Return (K, B, O, H, W) from products of the patches under the kernel with the kernels."""
        if groups > 1 or dilation != (1, 1) or isinstance(padding, str):
            return GroupedConvolution.vmap(info, in_dims, images, weight, bias, stride, padding, dilation, groups)
        weight_KOCHW, bias_KO = _lanes_first(info, in_dims[1], weight), _lanes_first(info, in_dims[2], bias)
        height, width = weight_KOCHW.shape[-2:]
        is_shared = in_dims[0] is None  # the same images for all lanes
        all_images = images if is_shared else images.movedim(in_dims[0], 0).flatten(0, 1)
        padded = F.pad(all_images, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1)
        places = padded.unfold(1, height, stride[0]).unfold(2, width, stride[1])  # B H W C kernel's H W
        filters_KFO = weight_KOCHW.flatten(2).mT
        patches = places.reshape(1 if is_shared else info.batch_size, -1, filters_KFO.shape[1])  # K BN F
        if bias_KO is None:
            products = patches @ filters_KFO
        else:
            products = torch.baddbmm(bias_KO[:, None], patches.expand(info.batch_size, -1, -1), filters_KFO)
        result_KBHWO = products.view(info.batch_size, -1, *places.shape[1:3], filters_KFO.shape[2])
        return _owned(result_KBHWO.permute(0, 1, 4, 2, 3)), 0


CONVOLUTIONS: dict[str, type[GroupedConvolution]] = {"grouped": GroupedConvolution, "products": MatmulConvolution}


class _Pooling(_LanewiseFunction):
    """A pooling of images, in the memory layout of the convolutions."""

    @staticmethod
    def forward(images: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the pooled images that are the same for all lanes."""
        return pool(images)

    @staticmethod
    def vmap(info: Any, in_dims: Any, images: Tensor, pool: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
        """Return (K, B, C, H, W), pooled with the lanes as channels."""
        result = pool(_lanes_as_channels(images, in_dims[0]))
        return _channels_as_lanes(info, result), 0


class _Linear(_LanewiseFunction):
    """A linear layer of every lane, as a product of matrices each; under autocast in its precision, unlike vmap's."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output for inputs and weights that are the same for all lanes."""
        return F.linear(inputs, weight, bias)

    @staticmethod
    def vmap(info: Any, in_dims: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        """Return (K, ..., O) from one product of matrices a lane."""
        inputs, weight_KOF = _lanes_first(info, in_dims[0], inputs), _lanes_first(info, in_dims[1], weight)
        bias_KO = _lanes_first(info, in_dims[2], bias)
        rows_KNF, weight_KFO = inputs.flatten(1, -2), weight_KOF.mT
        if bias_KO is None:
            result = torch.bmm(rows_KNF, weight_KFO)
        else:
            result = torch.baddbmm(bias_KO[:, None], rows_KNF, weight_KFO)
        return _owned(result.view(*inputs.shape[:-1], -1)), 0


class _BatchNorm(_LanewiseFunction):
    """A batch norm over the channels of all lanes at once; it changes running statistics in place."""

    @staticmethod
    def forward(inputs: Tensor, *rest: Any) -> Tensor:
        """Return the normalised inputs that are the same for all lanes."""
        *given, normalise = rest
        return normalise(inputs, *given)  # type: ignore[no-any-return]

    @staticmethod
    def vmap(info: Any, in_dims: Any, inputs: Tensor, *rest: Any) -> tuple[Tensor, int]:
        """Return (K, B, C, ...), normalised with the lanes as channels."""
        *given, normalise = rest
        stacked = [_lanes_first(info, dim, tensor) for dim, tensor in zip(in_dims[1:], given, strict=False)]
        channels = _lanes_first(info, in_dims[0], inputs).movedim(0, 1).flatten(1, 2)
        if channels.device.type == "cpu":  # in channels_last the sums would depend on the number of lanes
            channels = channels.contiguous()
        result = normalise(channels, *(None if tensor is None else tensor.flatten() for tensor in stacked))
        return _channels_as_lanes(info, result), 0


def _lanes_as_channels(images: Tensor, lane_dim: int) -> Tensor:
    """Return the images as (B, K C, H, W) in channels_last."""
    return images.movedim(lane_dim, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)


def _channels_as_lanes(info: Any, result_BC: Tensor) -> Tensor:
    """Return (B, K C, ...) as (K, B, C, ...), in the same memory; in front, because torch changes it in place there."""
    lanes_BKC = result_BC.view(len(result_BC), info.batch_size, -1, *result_BC.shape[2:])
    return _owned(lanes_BKC.movedim(1, 0))


def _lanes_first(info: Any, lane_dim: int | None, tensor: Tensor | None) -> Any:
    """Return a tensor with the lanes in front, repeated where it is the same for all of them; None stays None."""
    if tensor is None:
        return None
    return tensor.expand(info.batch_size, *tensor.shape) if lane_dim is None else tensor.movedim(lane_dim, 0)


def _owned(view: Tensor) -> Tensor:
    """Return a view as a tensor of its own for autograd, where nobody else uses the memory.

    An activation in place would else be recorded as a change of the viewed tensor, with four passes over it for one.
    """
    owned: Tensor = torch.ops.aten._unsafe_view(view, view.shape)
    return owned


def _pair(value: Any) -> Any:
    """Return one number for both directions as two; a padding may also be a word, which stays."""
    if isinstance(value, int):
        return value, value
    return value if isinstance(value, str) else tuple(value)

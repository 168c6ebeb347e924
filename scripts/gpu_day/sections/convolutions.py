"""Each convolution of the article's network, forward and backward: of one trial, of 16 at once in each way.

`dense_16` is one convolution over the images of all trials, which no stack can have; it is the bound for the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from scripts.gpu_day.common import Section, device, new_stream, on_gpu, wait

# Channels in, side of the image, channels out, stride.
LAYERS = [(3, 32, 16, 2), (16, 16, 64, 1), (64, 8, 128, 1), (128, 8, 256, 1), (256, 4, 512, 1), (512, 4, 512, 1)]
LAYERS += [(512, 2, 256, 1)]
LANES, BATCH = 16, 128
# The factor of the batch, the number of groups, and the memory format.
WAYS = {
    "one": (1, 1, torch.channels_last),
    "dense_16": (LANES, 1, torch.channels_last),
    "grouped_16_channels_last": (1, LANES, torch.channels_last),
    "grouped_16_contiguous": (1, LANES, torch.contiguous_format),
}


def run(section: Section) -> None:
    batch = section.pick(BATCH, 2)
    for benchmark in section.pick((False, True), (False,)):
        torch.backends.cudnn.benchmark = benchmark
        for index, layer in enumerate(LAYERS[: section.pick(None, 2)], 1):
            for way in WAYS:
                key = f"{index}.{way}{'.benchmark' if benchmark else ''}"
                with section.trying(key):
                    section.say(key, convolution_us(layer, way, batch=batch, section=section))
            if not benchmark:
                with section.trying(f"{index}.products_16"):
                    section.say(f"{index}.products_16", products_us(layer, batch=batch, section=section))


def convolution_us(layer: tuple[int, int, int, int], way: str, *, batch: int, section: Section) -> dict[str, float]:
    """Return the microseconds of a layer forward, of both gradients, and the TFLOP/s of all three."""
    inputs, side, outputs, stride = layer
    times, groups, layout = WAYS[way]
    images = _numbers(batch * times, inputs * groups, side, side).contiguous(memory_format=layout)
    weights = _numbers(outputs * groups, inputs, 3, 3).contiguous(memory_format=layout)

    def forward() -> Tensor:
        return functional.conv2d(images, weights, None, stride, 1, 1, groups)

    output = forward()
    gradient = torch.randn_like(output)

    def backward(mask: list[bool]) -> object:
        return torch.ops.aten.convolution_backward(
            gradient, images, weights, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], groups, mask
        )

    found = {
        "forward": _microseconds(forward, section=section),
        "gradient_of_images": _microseconds(lambda: backward([True, False, False]), section=section),
        "gradient_of_weights": _microseconds(lambda: backward([False, True, False]), section=section),
    }
    flops = 3 * 2 * output.numel() * inputs * 9
    return found | {"tflops": flops / sum(found.values()) / 1e6}


def products_us(layer: tuple[int, int, int, int], *, batch: int, section: Section) -> dict[str, float]:
    """Return the microseconds of 16 trials' layer as products of matrices: cutting patches out, and the products."""
    inputs, side, outputs, stride = layer
    images_KBCHW = _numbers(LANES, batch, inputs, side, side)
    weights = _numbers(LANES, inputs * 9, outputs)

    def patches() -> Tensor:
        padded = functional.pad(images_KBCHW, (1, 1, 1, 1))
        cut = padded.unfold(3, 3, stride).unfold(4, 3, stride)  # K, B, C, rows, columns, 3, 3
        return cut.permute(0, 1, 3, 4, 2, 5, 6).reshape(LANES, -1, inputs * 9)

    columns = patches()
    gradient = torch.bmm(columns, weights)
    return {
        "patches": _microseconds(patches, section=section),
        "forward": _microseconds(lambda: torch.bmm(columns, weights), section=section),
        "gradient_of_weights": _microseconds(lambda: torch.bmm(columns.mT, gradient), section=section),
    }


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, device=device(), dtype=torch.bfloat16 if on_gpu() else torch.float32)


def _microseconds(function: Callable[[], object], *, section: Section) -> float:
    """Return the microseconds of a call; on a GPU captured, so that the host's share does not count."""
    if not on_gpu():
        start_s = time.perf_counter()
        function()
        return 1e6 * (time.perf_counter() - start_s)
    repeats, replays = int(section.pick(10, 1)), int(section.pick(3, 1))
    stream = new_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # and not torch.cuda.graph, which empties the allocator's cache each time
        graph.capture_begin()
        for _ in range(repeats):
            function()
        graph.capture_end()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * float(begin.elapsed_time(end)) / replays / repeats

"""Convolutions of 3 by 3, stride 1, by Winograd's F(2x2, 3x3) on a CPU: 16 multiplications where there were 36.

Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.1. The output is computed in tiles
of 2 by 2. A tile of 4 by 4 of the input, transformed by sums and differences, is multiplied with the transformed
weight, and the result is transformed back. In an attack step the weight's transform depends on weights alone, so that
it is computed once per attack and costs nothing per step.

The kernel is C++, compiled once per machine by Inductor's compiler, with the multiplications left to the BLAS that
torch brings along. It works on blocks of tiles that stay in the cache between the transforms and the product.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradprune.torch_compat.aot import without_modes
from gradprune.torch_compat.background import begin
from gradprune.torch_compat.kernels import compile_cpp
from gradprune.torch_compat.lowering import fallback_handler, ir, register_lowering

from .library import LIBRARY

log = logging.getLogger(__name__)

LANES = 16
"""Numbers of input and of output channels are multiples of it."""

TILES = 96
"""Tiles of a block, for one thread: with 64 channels in and out, 16 transforms of them take half a megabyte."""

# --- Kernel -----------------------------------------------------------------------------------------------------------

_ARGUMENTS = ("const float*", "const float*", "const float*", "float*", "float*", *["int64_t"] * 12)

_SOURCE = r"""
#include <algorithm>
#include <cstdint>
#include <cstring>

typedef float vec __attribute__((vector_size(64)));
typedef void (*gemm_t)(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                       const int*, const float*, const int*, const float*, float*, const int*);

static inline vec load(const float* from) { vec value; std::memcpy(&value, from, sizeof(vec)); return value; }
static inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof(vec)); }

// The plane of one of the 16 products is followed by some unused floats: planes a power of two apart would evict
// each other from the cache.
static const int64_t GAP = 16;

extern "C" void kernel(const float* x, const float* weight, const float* bias, float* y, float* workspace,
                       int64_t gemm_address, int64_t images, int64_t channels, int64_t height, int64_t width,
                       int64_t outputs, int64_t pad_h, int64_t pad_w, int64_t has_bias, int64_t relu,
                       int64_t block, int64_t chunk) {
  const gemm_t gemm = reinterpret_cast<gemm_t>(gemm_address);
  const int64_t out_h = height + 2 * pad_h - 2, out_w = width + 2 * pad_w - 2;
  const int64_t tiles_h = (out_h + 1) / 2, tiles_w = (out_w + 1) / 2, tiles = images * tiles_h * tiles_w;
  const int64_t in_plane = block * channels + GAP, out_plane = block * outputs + GAP;
  float* transformed = workspace;
  float* product = transformed + 16 * in_plane;
  float* zeros = product + 16 * out_plane;  // what lies outside of the input
  std::fill(zeros, zeros + channels, 0.f);

  for (int64_t first = 0; first < tiles; first += block) {
    const int64_t count = std::min(block, tiles - first);
#pragma omp parallel
    {
#pragma omp for
      for (int64_t tile = 0; tile < count; tile++) {
        const int64_t at = first + tile, column = at % tiles_w, row = at / tiles_w % tiles_h;
        const float* image = x + at / (tiles_w * tiles_h) * height * width * channels;
        const float* pixel[16];
        for (int i = 0; i < 4; i++)
          for (int j = 0; j < 4; j++) {
            const int64_t h = 2 * row + i - pad_h, w = 2 * column + j - pad_w;
            const bool inside = h >= 0 && h < height && w >= 0 && w < width;
            pixel[4 * i + j] = inside ? image + (h * width + w) * channels : zeros;
          }
        float* to = transformed + tile * channels;
        for (int64_t c = 0; c < channels; c += 16) {
          vec d[16], t[16];
          for (int k = 0; k < 16; k++) d[k] = load(pixel[k] + c);
          for (int j = 0; j < 4; j++) {
            t[j] = d[j] - d[8 + j];
            t[4 + j] = d[4 + j] + d[8 + j];
            t[8 + j] = d[8 + j] - d[4 + j];
            t[12 + j] = d[4 + j] - d[12 + j];
          }
          for (int i = 0; i < 4; i++) {
            const vec* s = t + 4 * i;
            float* plane = to + c + 4 * i * in_plane;
            store(plane, s[0] - s[2]);
            store(plane + in_plane, s[1] + s[2]);
            store(plane + 2 * in_plane, s[2] - s[1]);
            store(plane + 3 * in_plane, s[1] - s[3]);
          }
        }
      }
#pragma omp for collapse(2)
      for (int k = 0; k < 16; k++)
        for (int64_t start = 0; start < count; start += chunk) {
          const int m = static_cast<int>(outputs), n = static_cast<int>(std::min(chunk, count - start));
          const int depth = static_cast<int>(channels);
          const float one = 1.f, zero = 0.f;
          gemm("N", "N", &m, &n, &depth, &one, weight + k * channels * outputs, &m,
               transformed + k * in_plane + start * channels, &depth, &zero,
               product + k * out_plane + start * outputs, &m);
        }
#pragma omp for
      for (int64_t tile = 0; tile < count; tile++) {
        const int64_t at = first + tile, column = at % tiles_w, row = at / tiles_w % tiles_h;
        float* image = y + at / (tiles_w * tiles_h) * out_h * out_w * outputs;
        const float* from = product + tile * outputs;
        const bool right = 2 * column + 1 < out_w, below = 2 * row + 1 < out_h;
        float* pixel = image + (2 * row * out_w + 2 * column) * outputs;
        for (int64_t c = 0; c < outputs; c += 16) {
          vec d[16], s[8];
          for (int k = 0; k < 16; k++) d[k] = load(from + c + k * out_plane);
          for (int j = 0; j < 4; j++) {
            s[j] = d[j] + d[4 + j] + d[8 + j];
            s[4 + j] = d[4 + j] - d[8 + j] - d[12 + j];
          }
          const vec shift = has_bias ? load(bias + c) : vec{};
          vec out[4];
          for (int i = 0; i < 2; i++) {
            const vec* r = s + 4 * i;
            out[2 * i] = r[0] + r[1] + r[2] + shift;
            out[2 * i + 1] = r[1] - r[2] - r[3] + shift;
          }
          if (relu)
            for (int i = 0; i < 4; i++) out[i] = out[i] < vec{} ? vec{} : out[i];  // so that NaN stays NaN
          store(pixel + c, out[0]);
          if (right) store(pixel + outputs + c, out[1]);
          if (below) store(pixel + out_w * outputs + c, out[2]);
          if (right && below) store(pixel + (out_w + 1) * outputs + c, out[3]);
        }
      }
    }
  }
}
"""


_WEIGHT_ARGUMENTS = ("const float*", "float*", *["int64_t"] * 5)

_WEIGHT_SOURCE = r"""
#include <cstdint>
#include <cstring>

typedef float vec __attribute__((vector_size(64)));

// Taps of the weight from input channel i to output channel o begin at i * in_stride + o * out_stride.
extern "C" void kernel(const float* weight, float* result, int64_t channels, int64_t outputs, int64_t in_stride,
                       int64_t out_stride, int64_t flip) {
  const int64_t plane = channels * outputs;
#pragma omp parallel for
  for (int64_t c = 0; c < channels; c++)
    for (int64_t o = 0; o < outputs; o += 16) {
      float taps[9][16];
      for (int lane = 0; lane < 16; lane++) {
        const float* from = weight + c * in_stride + (o + lane) * out_stride;
        for (int t = 0; t < 9; t++) taps[t][lane] = from[flip ? 8 - t : t];
      }
      vec g[9], r[12];
      std::memcpy(g, taps, sizeof(taps));
      for (int j = 0; j < 3; j++) {
        const vec ends = g[j] + g[6 + j];
        r[j] = g[j];
        r[3 + j] = (ends + g[3 + j]) * 0.5f;
        r[6 + j] = (ends - g[3 + j]) * 0.5f;
        r[9 + j] = g[6 + j];
      }
      for (int i = 0; i < 4; i++) {
        const vec *s = r + 3 * i, ends = s[0] + s[2];
        const vec out[4] = {s[0], (ends + s[1]) * 0.5f, (ends - s[1]) * 0.5f, s[2]};
        for (int j = 0; j < 4; j++) std::memcpy(result + (4 * i + j) * plane + c * outputs + o, out + j, sizeof(vec));
      }
    }
}
"""


@functools.cache
def _gemm() -> int:
    """Address of torch's own ``sgemm_``, 0 if its BLAS does not show it."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.sgemm_, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


@functools.cache
def _compile(arguments: tuple[str, ...], source: str) -> Future[Callable[..., None]]:
    return begin(compile_cpp, arguments, source)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compile.cache_clear)  # the threads are not there


def prepare() -> None:
    """Begin to compile the kernels, which takes a second."""
    if _gemm():
        _compile(_ARGUMENTS, _SOURCE)
        _compile(_WEIGHT_ARGUMENTS, _WEIGHT_SOURCE)


@functools.cache
def _kernel() -> Callable[..., None]:
    return _compile(_ARGUMENTS, _SOURCE).result()


@functools.cache
def _weight_kernel() -> Callable[..., None]:
    return _compile(_WEIGHT_ARGUMENTS, _WEIGHT_SOURCE).result()


@functools.cache
def is_available() -> bool:
    """Whether the kernel can be compiled here, and computes a convolution."""
    if not _gemm():
        return False
    prepare()
    with without_modes():
        x = torch.linspace(-1, 1, 2 * 16 * 5 * 4).view(2, 16, 5, 4)
        weight, bias = torch.linspace(-1, 1, 32 * 16 * 9).view(32, 16, 3, 3), torch.linspace(-1, 1, 32)
        try:
            result = _winograd_convolution(x, _winograd_weight(weight, False), bias, [1, 0], "relu")
        except Exception as error:
            log.warning("gradprune computes no convolution by Winograd's algorithm, for its kernel fails: %s", error)
            return False
        expected = torch.conv2d(x.double(), weight.double(), bias.double(), padding=(1, 0)).relu()
        return torch.allclose(result.double(), expected, rtol=1e-4, atol=1e-4)


# --- Operators --------------------------------------------------------------------------------------------------------

LIBRARY.define("winograd_weight(Tensor weight, bool transposed) -> Tensor")
LIBRARY.define(
    "winograd_convolution(Tensor input, Tensor weight, Tensor? bias, int[] padding, str activation) -> Tensor"
)

winograd_weight = torch.ops.gradprune.winograd_weight.default
"""``winograd_weight(weight, transposed)``: ``(16, C, O)`` from ``(O, C, 3, 3)``; if transposed, from ``(C, O, 3, 3)``.

A transposed convolution of stride 1 and padding ``p`` is a plain one of padding ``2 - p`` with that weight.
"""

winograd_convolution = torch.ops.gradprune.winograd_convolution.default
"""``winograd_convolution(input, weight, bias, padding, activation)``: from ``(N, C, H, W)``, float32, channels-last.

``weight`` is a ``winograd_weight``, ``activation`` is ``"none"`` or ``"relu"``. The result is channels-last.
"""


@torch.library.impl(LIBRARY, "winograd_weight", "CompositeExplicitAutograd")
def _winograd_weight(weight: Tensor, transposed: bool) -> Tensor:
    weight = weight.contiguous()
    result: Tensor = _fake_winograd_weight(weight, transposed)
    channels, outputs = result.shape[1:]
    in_stride, out_stride = (9 * outputs, 9) if transposed else (9, 9 * channels)
    _weight_kernel()(weight, result, channels, outputs, in_stride, out_stride, transposed)
    return result


@torch.library.register_fake("gradprune::winograd_weight", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_winograd_weight(weight: Tensor, transposed: bool) -> Tensor:
    first, second = weight.shape[:2]
    return weight.new_empty([16, first, second] if transposed else [16, second, first])


@torch.library.impl(LIBRARY, "winograd_convolution", "CompositeExplicitAutograd")
def _winograd_convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], activation: str
) -> Tensor:
    input = input.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = input.shape
    outputs = weight.shape[2]
    result: Tensor = _fake_winograd_convolution(input, weight, bias, padding, activation)
    tiles = images * ((result.shape[2] + 1) // 2) * ((result.shape[3] + 1) // 2)
    block = min(tiles, TILES * torch.get_num_threads())
    workspace = input.new_empty(16 * (block * (channels + outputs) + 2 * 16) + channels)
    _kernel()(
        input, weight.contiguous(), workspace if bias is None else bias.contiguous(), result, workspace, _gemm(),
        images, channels, height, width, outputs, *padding, bias is not None, activation == "relu", block, TILES,
    )  # fmt: skip
    return result


@torch.library.register_fake("gradprune::winograd_convolution", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_winograd_convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], activation: str
) -> Tensor:
    size = [input.shape[0], weight.shape[2], *(n + 2 * p - 2 for n, p in zip(input.shape[2:], padding, strict=True))]
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)


_call = fallback_handler(winograd_convolution, add_to_fallback_set=False)


@register_lowering(winograd_convolution, type_promotion_kind=None)
def _lower_winograd_convolution(input: Any, weight: Any, bias: Any, padding: Any, activation: str) -> Any:
    return _call(ir.ExternKernel.require_channels_last(input), weight, bias, padding, activation)

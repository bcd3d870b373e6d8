"""Calls of every operator that has a narrowing rule: layouts, dtypes, geometries, absent weights.

Tensors are made when a case runs, from a generator seeded alike for all of them, so a failure can be repeated alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from rule_contract import Case, operator_named

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}

SCHEMA_ONLY = frozenset(
    {
        # CUDA, ROCm or MPS only, and without a meta kernel.
        "aten._cudnn_rnn_backward.default",
        "aten._thnn_fused_gru_cell_backward.default",
        "aten.batch_norm_backward_reduce.default",
        "aten.miopen_rnn_backward.default",
        "aten.mps_convolution_backward.default",
        "aten.mps_convolution_transpose_backward.default",
        # Has a meta kernel, but one that lacks an argument of the operator and takes the next for it.
        "aten._efficient_attention_backward.default",
        # For a backend outside torch to implement: raises in torch itself.
        "aten.convolution_backward_overrideable.default",
    }
)
"""Operators that nothing here can run; their rules are checked against the schema."""

Layout = Callable[[torch.Tensor], torch.Tensor]


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats[tensor.dim()])


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with a gap after each: neither contiguous nor channels-last."""
    return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]


def layouts(dimensions: int) -> dict[str, Layout]:
    made: dict[str, Layout] = {"contiguous": torch.Tensor.contiguous, "strided": strided}
    if dimensions in (4, 5):
        made["channels_last"] = channels_last
    return made


def normal(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal values, the same on every call with the same sizes."""
    generator = torch.Generator().manual_seed(sum(sizes))
    return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)


def with_decomposition(case: Case) -> Iterator[Case]:
    """A case twice: with the operator's kernel, and with the decomposition that Inductor compiles in its place."""
    yield case
    decomposition = torch._decomp.decomposition_table[operator_named(case.operator)]
    yield replace(case, label=f"{case.label}-decomposed", implementation=decomposition)


def convolutions() -> Iterator[Case]:
    for dimensions, (dtype_name, dtype) in itertools.product([1, 2, 3], DTYPES.items()):
        for (geometry, options), (layout_name, layout) in itertools.product(
            GEOMETRIES.items(), layouts(dimensions + 2).items()
        ):
            yield Case(
                "aten.convolution_backward.default",
                f"{dimensions}d-{geometry}-{layout_name}-{dtype_name}",
                convolution_arguments(dimensions, dtype, layout, **options),
            )
        yield Case(
            "aten.convolution_backward.default",
            f"{dimensions}d-expanded_gradient-{dtype_name}",
            convolution_arguments(dimensions, dtype, torch.Tensor.contiguous, expanded=True),
        )
        yield Case(
            "aten.convolution_backward.default",
            f"{dimensions}d-no_bias-{dtype_name}",
            convolution_arguments(dimensions, dtype, torch.Tensor.contiguous, bias=False),
            impossible=frozenset({2}),
        )


GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "pointwise": {"kernel": 1},
    "strided_padded": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "transposed": {"transposed": True, "stride": 2, "padding": 1, "output_padding": 1},
    "transposed_groups": {"transposed": True, "groups": 2},
    "transposed_dilated": {"transposed": True, "dilation": 2},
}


def convolution_arguments(
    dimensions: int,
    dtype: torch.dtype,
    layout: Layout,
    *,
    kernel: int = 3,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int = 0,
    bias: bool = True,
    expanded: bool = False,
) -> Callable[[], tuple[Any, ...]]:
    channels = 4

    def make() -> tuple[Any, ...]:
        inputs = normal(2, channels, *[6] * dimensions, dtype=dtype)
        weight = normal(channels, channels // groups, *[kernel] * dimensions, dtype=dtype)
        geometry = [[value] * dimensions for value in (stride, padding, dilation)]
        rest = (*geometry, transposed, [output_padding] * dimensions, groups)
        shape = torch.convolution(inputs, weight, None, *rest).shape
        gradient = normal(1, dtype=dtype).expand(shape) if expanded else layout(normal(*shape, dtype=dtype))
        return gradient, layout(inputs), layout(weight), [channels] if bias else None, *rest, None

    return make


def slow_convolutions() -> Iterator[Case]:
    for (dtype_name, dtype), (layout_name, layout) in itertools.product(DTYPES.items(), layouts(4).items()):

        def make(dtype: torch.dtype = dtype, layout: Layout = layout) -> tuple[Any, ...]:
            tensors = normal(2, 4, 3, 3, dtype=dtype), normal(2, 3, 6, 6, dtype=dtype), normal(4, 3, 3, 3, dtype=dtype)
            return *map(layout, tensors), [3, 3], [2, 2], [1, 1], None

        yield Case("aten._slow_conv2d_backward.output_mask", f"{layout_name}-{dtype_name}", make)


def batch_norms() -> Iterator[Case]:
    shapes = {"2d": (4, 3), "3d": (4, 3, 5), "4d": (2, 3, 4, 4), "5d": (2, 3, 2, 3, 2)}
    for (shape_name, shape), (dtype_name, dtype), train, affine in itertools.product(
        shapes.items(), [*DTYPES.items(), ("mixed", None)], [True, False], [True, False]
    ):
        for layout_name, layout in layouts(len(shape)).items():
            mode = "train" if train else "eval"
            label = f"{shape_name}-{layout_name}-{mode}-{'affine' if affine else 'no_weight'}-{dtype_name}"
            impossible = frozenset() if affine else frozenset({1})

            def tensors(
                shape: tuple[int, ...] = shape,
                layout: Layout = layout,
                dtype: torch.dtype | None = dtype,
                affine: bool = affine,
                train: bool = train,
            ) -> dict[str, Any]:
                # Mixed precision: activations in half the width of the parameters and statistics.
                wide, narrow = (torch.float32, torch.bfloat16) if dtype is None else (dtype, dtype)
                inputs = layout(normal(*shape, dtype=narrow))
                weight = normal(3, dtype=wide) if affine else None
                running = normal(3, dtype=wide), normal(3, dtype=wide).abs() + 0.5
                _, mean, invstd = torch.native_batch_norm(inputs, weight, None, *running, train, 0.1, 1e-5)
                return {
                    "gradient": layout(normal(*shape, dtype=narrow).cos()),
                    "inputs": inputs,
                    "weight": weight,
                    "statistics": (*running, mean, invstd),
                }

            def native(tensors: Any = tensors, train: bool = train) -> tuple[Any, ...]:
                t = tensors()
                return t["gradient"], t["inputs"], t["weight"], *t["statistics"], train, 1e-5, None

            def reserved(tensors: Any = tensors, train: bool = train) -> tuple[Any, ...]:
                return *native(tensors, train), torch.empty(0, dtype=torch.uint8)

            def indexed(tensors: Any = tensors, train: bool = train) -> tuple[Any, ...]:
                gradient, inputs, *rest = reserved(tensors, train)
                return 0, inputs, gradient, *rest

            yield from with_decomposition(
                Case("aten.native_batch_norm_backward.default", label, native, impossible=impossible)
            )
            if affine:
                yield from with_decomposition(Case("aten.batch_norm_backward.default", label, reserved))
            if dtype_name == "f32":
                yield Case("aten._batch_norm_impl_index_backward.default", label, indexed, impossible=impossible)


def group_norms() -> Iterator[Case]:
    for (dtype_name, dtype), (layout_name, layout) in itertools.product(DTYPES.items(), layouts(4).items()):

        def make(dtype: torch.dtype = dtype, layout: Layout = layout) -> tuple[Any, ...]:
            inputs, gradient = layout(normal(2, 4, 3, 5, dtype=dtype)), layout(normal(2, 4, 3, 5, dtype=dtype).cos())
            weight = normal(4, dtype=dtype)
            _, mean, rstd = torch.native_group_norm(inputs.contiguous(), weight, None, 2, 4, 15, 2, 1e-5)
            return gradient, inputs, mean, rstd, weight, 2, 4, 15, 2, None

        yield from with_decomposition(
            Case(
                "aten.native_group_norm_backward.default",
                f"{layout_name}-{dtype_name}",
                make,
                required=frozenset({0}) if layout_name == "channels_last" else frozenset(),
            )
        )


def layer_norms() -> Iterator[Case]:
    parameters = {"affine": (), "no_bias": (2,), "no_weight": (1,)}
    for (dtype_name, dtype), (layout_name, layout), (parameters_name, absent), normalized in itertools.product(
        DTYPES.items(), layouts(4).items(), parameters.items(), [(5,), (3, 5)]
    ):

        def make(
            dtype: torch.dtype = dtype,
            layout: Layout = layout,
            absent: tuple[int, ...] = absent,
            normalized: tuple[int, ...] = normalized,
        ) -> tuple[Any, ...]:
            inputs, gradient = layout(normal(2, 4, 3, 5, dtype=dtype)), layout(normal(2, 4, 3, 5, dtype=dtype).cos())
            weight = None if 1 in absent else normal(*normalized, dtype=dtype)
            bias = None if 2 in absent else normal(*normalized, dtype=dtype)
            _, mean, rstd = torch.native_layer_norm(inputs, normalized, weight, bias, 1e-5)
            return gradient, inputs, list(normalized), mean, rstd, weight, bias, None

        yield from with_decomposition(
            Case(
                "aten.native_layer_norm_backward.default",
                f"last{len(normalized)}-{layout_name}-{parameters_name}-{dtype_name}",
                make,
                impossible=frozenset(absent),
            )
        )


def rms_norms() -> Iterator[Case]:
    for dtype_name, dtype in DTYPES.items():

        def make(dtype: torch.dtype = dtype) -> tuple[Any, ...]:
            inputs = normal(2, 3, 5, dtype=dtype)
            rstd = (inputs.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
            statistics = rstd.to(torch.promote_types(dtype, torch.float32))
            return inputs.cos(), inputs, [5], statistics, normal(5, dtype=dtype), None

        # There is no CPU kernel: compiled code always has the decomposition there.
        _, decomposed = with_decomposition(Case("aten._fused_rms_norm_backward.default", dtype_name, make))
        yield decomposed


def grid_samplers() -> Iterator[Case]:
    for dimensions, (dtype_name, dtype), mode, padding, corners in itertools.product(
        [2, 3], [("f32", torch.float32), ("f64", torch.float64)], [0, 1, 2], [0, 1, 2], [True, False]
    ):
        if dimensions == 3 and mode == 2:  # no bicubic interpolation of volumes
            continue
        for layout_name, layout in layouts(dimensions + 2).items():

            def make(
                dimensions: int = dimensions,
                dtype: torch.dtype = dtype,
                layout: Layout = layout,
                options: tuple[int, int, bool] = (mode, padding, corners),
            ) -> tuple[Any, ...]:
                inputs = normal(2, 3, *[5] * dimensions, dtype=dtype)
                grid = normal(2, *[4] * dimensions, dimensions, dtype=dtype)
                gradient = normal(2, 3, *[4] * dimensions, dtype=dtype)
                return layout(gradient), layout(inputs), grid, *options, None

            label = f"mode{mode}-padding{padding}-{'corners' if corners else 'centres'}-{layout_name}-{dtype_name}"
            # The bicubic CPU kernel is compiled once with and once without the gradient of the input, and the compiler
            # contracts the sum that gives the gradient of the grid differently in the two. Both are as near to float64.
            rounding = 16 if mode == 2 else 0
            yield Case(f"aten.grid_sampler_{dimensions}d_backward.default", label, make, rounding=rounding)


def products() -> Iterator[Case]:
    """Matrix products of nested, sparse and oneDNN tensors; the dense ones are other operators."""
    for dtype_name, dtype in [("f32", torch.float32), ("f64", torch.float64)]:

        def nested(*sizes: tuple[int, ...], dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.nested.nested_tensor([normal(*size, dtype=dtype) for size in sizes])

        def linear(dtype: torch.dtype = dtype, nested: Any = nested) -> tuple[Any, ...]:
            return nested((2, 5), (3, 5)), nested((2, 4), (3, 4)), normal(4, 5, dtype=dtype), None

        def matmul(nested: Any = nested) -> tuple[Any, ...]:
            left, right = nested((2, 2, 5), (2, 3, 5)), nested((2, 5, 4), (2, 5, 6))
            return nested((2, 2, 4), (2, 3, 6)), left, right, None

        yield Case("aten.linear_backward.default", f"nested-{dtype_name}", linear)
        yield Case("aten.matmul_backward.default", f"nested-{dtype_name}", matmul)
        for reduction in ("sum", "mean", "amax", "amin"):

            def sparse(dtype: torch.dtype = dtype, reduction: str = reduction) -> tuple[Any, ...]:
                # The forward operator returns the positions of extrema only to operands that require gradients.
                matrix = normal(4, 5, dtype=dtype).relu().to_sparse_csr().requires_grad_()
                other = normal(5, 3, dtype=dtype).requires_grad_()
                _, positions = torch.ops.aten._sparse_mm_reduce_impl(matrix, other, reduction)
                return matrix.detach(), normal(4, 3, dtype=dtype), other.detach(), reduction, positions, None

            yield Case("aten._sparse_mm_reduce_impl_backward.default", f"{reduction}-{dtype_name}", sparse)
    if torch.backends.mkldnn.is_available():
        for name, batch in {"2d": (3,), "3d": (2, 3)}.items():

            def masked(batch: tuple[int, ...] = batch) -> tuple[Any, ...]:
                return normal(*batch, 5).to_mkldnn(), normal(*batch, 4).to_mkldnn(), normal(4, 5), None

            def flagged(batch: tuple[int, ...] = batch) -> tuple[Any, ...]:
                return normal(*batch, 4).to_mkldnn(), normal(*batch, 5).to_mkldnn(), normal(4, 5), None

            # oneDNN may choose another kernel where a product is not asked for.
            yield Case("aten.mkldnn_linear_backward.default", name, masked, rounding=8)
            yield Case("aten.mkldnn_linear_backward_weights.default", name, flagged, rounding=8)


def attentions() -> Iterator[Case]:
    """On meta tensors: the kernels are CUDA's or those of a backend outside torch."""
    for bias in (True, False):

        def meta(*sizes: int) -> torch.Tensor:
            return torch.empty(sizes, device="meta")

        def scaled(bias: bool = bias, meta: Any = meta) -> dict[str, Any]:
            query, key, value, out = meta(2, 3, 8, 16), meta(2, 3, 9, 16), meta(2, 3, 9, 16), meta(2, 3, 8, 16)
            return {
                "qkv": (meta(2, 3, 8, 16), query, key, value, meta(2, 3, 8, 9) if bias else None),
                "out": (out, meta(2, 3, 8)),
                "rng": (meta(), meta()),
            }

        def efficient(scaled: Any = scaled) -> tuple[Any, ...]:
            t = scaled()
            return *t["qkv"], *t["out"], *t["rng"], 0.0, None

        def overrideable(scaled: Any = scaled) -> tuple[Any, ...]:
            t = scaled()
            return *t["qkv"], None, *t["out"], None, None, 8, 9, 0.0, False, *t["rng"]

        label = "bias" if bias else "no_bias"
        impossible = frozenset() if bias else frozenset({3})
        for operator, make in {
            "_scaled_dot_product_efficient_attention_backward": efficient,
            "_scaled_dot_product_fused_attention_overrideable_backward": overrideable,
        }.items():
            yield Case(f"aten.{operator}.default", label, make, {"scale": 0.5}, impossible)


def recurrent_cells() -> Iterator[Case]:
    """On meta tensors: the fused cells are CUDA kernels."""

    def lstm() -> tuple[Any, ...]:
        state = [torch.empty(2, 3, device="meta") for _ in range(4)]
        return *state, torch.empty(2, 12, device="meta"), None

    yield Case("aten._thnn_fused_lstm_cell_backward_impl.default", "meta", lstm)
    yield Case("aten._thnn_fused_lstm_cell_backward.default", "meta", lstm)


CASES: list[Case] = [
    case
    for family in (
        convolutions,
        slow_convolutions,
        batch_norms,
        group_norms,
        layer_norms,
        rms_norms,
        grid_samplers,
        products,
        attentions,
        recurrent_cells,
    )
    for case in family()
]
"""Every case."""

"""Reading generated code: order, bytes, edges, memory and arithmetic, of a module written by hand."""

from __future__ import annotations

import pytest
import torch
from emitting import skip_unless_possible

from gradprune.emit.gpus import GPUS

skip_unless_possible()

from gradprune.emit.calls import kernel_sources, read_part  # noqa: E402
from gradprune.torch_compat.fake_cuda import Layout  # noqa: E402

CODE = """
async_compile = AsyncCompile()

triton_add = async_compile.triton('triton_add', '''
@triton.jit
def triton_add(in_out_ptr0, in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    tmp0 = tl.load(in_out_ptr0 + (x0), xmask)
    tmp1 = tl.load(in_ptr0 + (x1), xmask)
    tl.store(in_out_ptr0 + (x0), tmp0 + tmp1, xmask)
    tl.store(out_ptr0 + (x0), tmp0 <= tmp1, xmask)
''', device_str='cuda')

triton_fill = async_compile.triton('triton_fill', '''
@triton.jit
def triton_fill(out_ptr0, xnumel, XBLOCK : tl.constexpr):
    tl.store(out_ptr0 + (x0), 0.0, xmask)
''', device_str='cuda')

class Runner:
    def call(self, args):
        arg0_1, arg1_1, arg2_1 = args
        args.clear()
        assert_size_stride(arg0_1, (2, 3, 8, 8), (192, 64, 8, 1), 'input')
        with torch.cuda._DeviceGuard(0):
            torch.cuda.set_device(0)
            buf0 = extern_kernels.convolution(arg0_1, arg1_1, stride=(1, 1), padding=(0, 0), dilation=(1, 1), transposed=False, output_padding=(0, 0), groups=1, bias=None)
            assert_size_stride(buf0, (2, 4, 6, 6), (144, 1, 24, 4), 'x')
            buf1 = buf0; del buf0  # reuse
            buf2 = empty_strided_cuda((2, 4, 6, 6), (144, 1, 24, 4), torch.bool)
            raw_stream0 = get_raw_stream(0)
            triton_add.run(buf1, arg2_1, buf2, 288, stream=raw_stream0)
            buf3 = empty_strided_cuda((4, 4), (4, 1), torch.float32)
            extern_kernels.mm(reinterpret_tensor(buf1, (4, 72), (72, 1), 0), reinterpret_tensor(buf1, (72, 4), (1, 72), 0), out=buf3)
            buf4 = torch.ops.aten.convolution_backward.default(buf1, arg0_1, arg1_1, [0], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False])
            del arg0_1
            del buf1
            buf5 = buf4[0]
            del buf4
            triton_fill.run(buf3, 16, stream=raw_stream0)
        return (buf5, buf2, )
"""  # noqa: E501

IMAGES = Layout((2, 3, 8, 8), (192, 64, 8, 1), torch.float32)
LAYOUTS = {
    "arg0_1": IMAGES,
    "arg1_1": Layout((4, 3, 3, 3), (27, 1, 9, 3), torch.float32),
    "arg2_1": Layout((4,), (1,), torch.float32),
    "buf0": Layout((2, 4, 6, 6), (144, 1, 24, 4), torch.float32),
    "buf5": IMAGES,
}
X, W, Y, MASK = 4 * 2 * 3 * 64, 4 * 4 * 27, 4 * 288, 288
"""Bytes of images, weight, activation and mask."""


class ByHand:
    """Stands for what Inductor generated."""

    code = CODE

    def layout(self, name: str) -> Layout | None:
        return LAYOUTS.get(name)


@pytest.fixture(scope="module")
def part():
    return read_part("step", ByHand(), GPUS["sm_75"])  # type: ignore[arg-type]


def test_calls_are_in_order(part):
    assert [(call.name, call.kind) for call in part.calls] == [
        ("convolution", "external"),
        ("triton_add", "generated"),
        ("mm", "external"),
        ("convolution_backward", "external"),
        ("triton_fill", "generated"),
    ]


def test_each_buffer_counts_once_for_reading_and_once_for_writing(part):
    sizes = [(sum(call.reads.values()), sum(call.writes.values())) for call in part.calls]
    assert sizes == [
        (X + W, Y),
        (Y + 16, Y + MASK),  # in place
        (Y, 64),  # both operands are the same buffer
        (Y + W, X),  # an input gradient reads no input
        (0, 64),
    ]


def test_edges_carry_what_is_read(part):
    assert [call.sources for call in part.calls] == [{}, {0: Y}, {1: 2 * Y}, {1: Y}, {}]


def test_arithmetic(part):
    convolution = 2 * 2 * 36 * 4 * 27
    assert [call.flops for call in part.calls] == [convolution, 0, 2 * 4 * 72 * 4, convolution, 0]


def test_memory(part):
    assert part.peak_bytes == Y + MASK + 64 + X  # the activation is still there when the gradient is computed
    assert part.returned_bytes == X + MASK


def test_time_is_traffic_or_arithmetic():
    gpu = GPUS["sm_80"]
    assert gpu.seconds(1555, 0) == pytest.approx(1e-9)
    assert gpu.seconds(1555, 195_000) == pytest.approx(1e-8)
    assert gpu.seconds(1555, 195_000, "tf32") == pytest.approx(195_000 / 156e12)


def test_kernels_are_read_as_they_are_escaped():
    source = "x = async_compile.triton('x', '''\n@triton.jit\ndef x(a):\n    tl.device_assert(a, \"\\\\n\")\n''')\n"
    assert '"\\n"' in kernel_sources(source)["x"]


@pytest.mark.parametrize(
    ("gpu", "warps", "registers", "shared", "expected"),
    [
        ("sm_75", 4, 32, 0, 1.0),  # 8 blocks of 128 threads
        ("sm_75", 4, 91, 0, 0.625),  # 96 registers: 5 blocks in 65536
        ("sm_75", 1, 16, 0, 0.5),  # 16 blocks of 32 threads
        ("sm_75", 4, 32, 20480, 0.375),  # 3 blocks in 64 KB
        ("sm_80", 8, 64, 0, 0.5),
    ],
)
def test_occupancy(gpu: str, warps: int, registers: int, shared: int, expected: float):
    assert GPUS[gpu].occupancy(warps, registers, shared) == expected

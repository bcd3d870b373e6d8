"""GPUs that code is generated for: what Inductor and Triton ask of a device, and the rates that bound its kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU, as its vendor describes it.

    Attributes:
        name: What it is called.
        capability: Compute capability, 75 for 7.5.
        processors: Streaming multiprocessors.
        threads: Threads that are resident on one of them at most.
        blocks: Blocks that are.
        shared_bytes: Shared memory of one of them.
        shared_bytes_block: That a block may have.
        memory_bytes: Of the device.
        cache_bytes: Of the second level.
        bandwidth: Bytes a second to and from memory.
        rates: FLOPs a second by type: ``fp32``, ``tf32`` where it has that, ``fp16``, and ``bf16`` where it has that.
    """

    name: str
    capability: int
    processors: int
    threads: int
    blocks: int
    shared_bytes: int
    shared_bytes_block: int
    memory_bytes: int
    cache_bytes: int
    bandwidth: float
    rates: dict[str, float]

    REGISTERS = 65536
    """Of a multiprocessor, in all that are listed here."""
    WARP = 32

    @property
    def properties(self) -> dict[str, Any]:
        """What ``torch.cuda.get_device_properties`` says of it."""
        return {
            "name": self.name,
            "major": self.capability // 10,
            "minor": self.capability % 10,
            "multi_processor_count": self.processors,
            "total_memory": self.memory_bytes,
            "max_threads_per_multi_processor": self.threads,
            "regs_per_multiprocessor": self.REGISTERS,
            "shared_memory_per_block": 48 << 10,
            "shared_memory_per_block_optin": self.shared_bytes_block,
            "shared_memory_per_multiprocessor": self.shared_bytes,
            "L2_cache_size": self.cache_bytes,
            "warp_size": self.WARP,
            "max_threads_per_block": 1024,
            "gcnArchName": "",
        }

    def occupancy(self, warps: int, registers: int, shared_bytes: int) -> float:
        """Share of the resident threads that blocks of a kernel can make use of.

        Args:
            warps: Of a block.
            registers: Of a thread.
            shared_bytes: Of a block.
        """
        by_warp = -(-registers * self.WARP // 256) * 256  # registers are given out in units of 256
        limits = [self.blocks, self.threads // (warps * self.WARP), self.REGISTERS // max(1, by_warp * warps)]
        if shared_bytes:
            limits.append(self.shared_bytes // shared_bytes)
        return min(limits) * warps * self.WARP / self.threads

    def seconds(self, moved_bytes: int, flops: int = 0, rate: str = "fp32") -> float:
        """The least time that a kernel takes by the roofline: its traffic or its arithmetic, whichever is longer."""
        return max(moved_bytes / self.bandwidth, flops / self.rates.get(rate, self.rates["fp32"]))


GPUS = {
    "sm_75": Gpu(
        *("Tesla T4", 75, 40, 1024, 16, 64 << 10, 64 << 10, 15 << 30, 4 << 20),
        *(320e9, {"fp32": 8.1e12, "fp16": 65e12}),
    ),
    "sm_80": Gpu(
        *("NVIDIA A100-SXM4-40GB", 80, 108, 2048, 32, 164 << 10, 163 << 10, 40 << 30, 40 << 20),
        *(1555e9, {"fp32": 19.5e12, "tf32": 156e12, "fp16": 312e12, "bf16": 312e12}),
    ),
    "sm_90": Gpu(
        *("NVIDIA H100 80GB HBM3", 90, 132, 2048, 32, 228 << 10, 227 << 10, 80 << 30, 50 << 20),
        *(3350e9, {"fp32": 67e12, "tf32": 494e12, "fp16": 989e12, "bf16": 989e12}),
    ),
}
"""By what the command line calls them."""

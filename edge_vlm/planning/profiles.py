"""Speeds of machines that are not at hand, estimated from published measurements.

The figures are rates, so that they hold for any bundle: FLOPs a second in prefill and vision,
bytes a second in decode. They are estimates from other models on the same device, and each profile
says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_vlm.families.sizes import decoder_flops
from edge_vlm.machine.engine_settings import KV_TYPES
from edge_vlm.planning.speeds import Speeds

if TYPE_CHECKING:
    from edge_vlm.planning.request import ModelSizes

_REFERENCE_TOKENS = 1024


@dataclass(frozen=True)
class DeviceProfile:
    """A machine's rates; memory in bytes."""

    name: str
    title: str
    memory: int
    processor_family: str  # x86 or arm
    prefill_flops: float  # a second, quantized decoder
    vision_flops: float  # a second, float vision graph
    vision_int8_flops: float  # a second, int8 vision graph
    decode_bytes: float  # a second: weights and KV cache read for each token
    load_bytes: float  # a second, from its usual storage
    sources: tuple[str, ...]
    on_gpu: bool = False  # the decoder's layers, in the figures given

    def speeds(self, model: ModelSizes, kv_type: str = "f16") -> Speeds:
        """Estimated speeds of a bundle."""
        is_int8 = "int8" in model.vision.precision
        vision_rate = self.vision_int8_flops if is_int8 else self.vision_flops
        n = _REFERENCE_TOKENS
        kv = n * model.decoder.kv_bytes_per_token(KV_TYPES[kv_type])
        return Speeds(
            load_seconds=(model.vision_bytes + model.decoder_bytes) / self.load_bytes,
            vision_seconds_per_tile=model.work.flops / vision_rate,
            prefill_tokens_per_second=n * self.prefill_flops / decoder_flops(model.decoder, n),
            prefill_tokens=n,
            decode_tokens_per_second=self.decode_bytes / (model.decoder_bytes + kv),
            decode_positions=n,
        )


_PI_RATES = (126e9, 77e9, 126e9, 10.1e9, 90e6)  # from prefill to load
_PI_SOURCES = (
    "prefill: llama.cpp PR #19356, a 0.7B model at 90 tokens/s with repacked kernels"
    " (2 x 0.7e9 x 90 = 126 GFLOP/s); needs a llama.cpp built with dot product",
    "decode: potato-os #148, Qwen3.5-2B q4_k_m at 7.8 tokens/s (about 1.3 GB read a token)",
    "vision: no measurement of this tower exists; int8 at the rate of prefill, float32 at half"
    " of the four cores' peak of 154 GFLOP/s",
    "load: a microSD card of 90 MB/s; an SSD is four to eight times as fast",
)
_PI = "Raspberry Pi 5, {} GB, four Cortex-A76 cores"
_ORIN_RATES = (2.5e12, 2.7e12, 2.7e12, 45e9, 1e9)
_ORIN = "Jetson Orin Nano 8 GB Super, everything on its GPU"
_ORIN_SOURCES = (
    "prefill: genie-ai-runtime 1.1.0, Gemma 4 E2B (about 2e9 active weights) q4_k_m"
    " at 620 tokens/s",
    "decode: hokwangchoi/jetson-orin-nano-benchmarks, a Qwen3-VL-2B q4_k_m in"
    " llama.cpp at 26 ms a token (about 1.2 GB read a token)",
    "vision: the same page, a first image in 0.5 to 3 s in llama.cpp, about 2.7 TFLOP"
    " for its picture; the middle of that range, 1 s",
    "load: an NVMe drive of 1 GB/s",
)
_LAPTOP_RATES = (210e9, 260e9, 410e9, 25e9, 2e9)
_LAPTOP = "Laptop with four x86 cores, AVX2 and two memory channels"
_LAPTOP_SOURCES = (
    "prefill: pt13762104.github.io, Gemma 4 E2B (about 2e9 active weights) in"
    " llama.cpp on six cores of an i7-10750H at 78 tokens/s, four sixths of it",
    "decode: the same page, 19 tokens/s with about 1.3 GB read a token",
    "vision: ik_llama.cpp PR #798, 1,656 patches of Qwen2.5-VL's tower (2.1 TFLOP) in"
    " 2.04 s on 16 threads, a quarter of it; int8 1.6 times as fast with VNNI,"
    " onnxruntime #6695",
    "load: an SSD of 2 GB/s",
)

PROFILES = {
    name: DeviceProfile(name, title, gib << 30, family, *rates, sources, on_gpu)
    for name, title, gib, family, rates, sources, on_gpu in (
        ("raspberry-pi-5-8gb", _PI.format(8), 8, "arm", _PI_RATES, _PI_SOURCES, False),
        ("raspberry-pi-5-4gb", _PI.format(4), 4, "arm", _PI_RATES, _PI_SOURCES, False),
        ("jetson-orin-nano-8gb", _ORIN, 8, "arm", _ORIN_RATES, _ORIN_SOURCES, True),
        ("laptop-4core", _LAPTOP, 16, "x86", _LAPTOP_RATES, _LAPTOP_SOURCES, False),
    )
}

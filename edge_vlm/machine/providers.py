"""Which hardware runs what: onnxruntime's execution providers and llama.cpp's GPU layers.

What the user asked for by name has to be there, or it is an error that says what to install.
"auto" takes the best that is installed and falls back to the CPU with one line that says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from edge_vlm.errors import InputError

log = logging.getLogger("edge_vlm")  # without a handler, warnings go to stderr as they are

CPU = "CPUExecutionProvider"


class Provider(NamedTuple):
    """An execution provider, and how to get an onnxruntime that has it."""

    id: str  # onnxruntime's name
    install: str
    chosen_by_auto: bool = False


# The order is that of "auto". TensorRT builds an engine for minutes, CoreML and QNN compute in half
# precision or less, XNNPACK is no faster than onnxruntime's own CPU kernels on most machines: these
# are used when asked for.
PROVIDERS = {
    "cuda": Provider("CUDAExecutionProvider", "pip install onnxruntime-gpu", True),
    "dml": Provider("DmlExecutionProvider", "pip install onnxruntime-directml", True),
    "openvino": Provider("OpenVINOExecutionProvider", "pip install onnxruntime-openvino", True),
    "tensorrt": Provider("TensorrtExecutionProvider", "pip install onnxruntime-gpu tensorrt"),
    "coreml": Provider("CoreMLExecutionProvider", "pip install onnxruntime, on macOS"),
    "qnn": Provider("QNNExecutionProvider", "pip install onnxruntime-qnn"),
    "xnnpack": Provider("XnnpackExecutionProvider", "build onnxruntime with --use_xnnpack"),
    "cpu": Provider(CPU, "pip install onnxruntime"),
}
PROVIDER_CHOICES = ("auto", "cpu", *sorted(set(PROVIDERS) - {"cpu"}))

GPU_INSTALL = (
    'CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-deps --no-cache-dir'
    " --no-binary llama-cpp-python llama-cpp-python (or -DGGML_VULKAN=on, -DGGML_METAL=on)"
)
ALL_LAYERS = -1  # llama.cpp's number for every layer


def candidates(wanted: str, available: Sequence[str]) -> list[str]:
    """Names of providers to try in turn for one of ``PROVIDER_CHOICES``.

    ``available`` are the ids of those that the installed onnxruntime has.

    Raises:
        InputError: the wanted one is not installed.
    """
    if wanted == "auto":
        chosen = [n for n, p in PROVIDERS.items() if p.chosen_by_auto and p.id in available]
        return [*chosen, "cpu"]
    provider = PROVIDERS[wanted]
    if provider.id not in available:
        raise InputError(
            f"provider {wanted}: the installed onnxruntime does not have it;"
            f" get one that does: {provider.install} (in place of onnxruntime)"
        )
    return [wanted]


def open_session(wanted: str, available: Sequence[str], create: Callable[[list[str]], Any]) -> Any:
    """An onnxruntime session on the wanted provider, or with "auto" on the best that works.

    ``create`` makes a session from a list of provider ids; for the others see ``candidates``.

    Raises:
        InputError: the wanted provider is not installed or does not start here.
        Exception: whatever ``create`` raises on the CPU.
    """
    reasons: list[str] = []
    for name in candidates(wanted, available):
        provider = PROVIDERS[name]
        if name == "cpu":
            if reasons:
                log.warning("vision runs on the CPU: %s", "; ".join(reasons))
            return create([CPU])
        try:
            session = create([provider.id, CPU])
            # onnxruntime drops a provider whose libraries are missing, and goes on without it.
            if provider.id in session.get_providers():
                return session
            reason = "it does not start here; are its driver and libraries installed?"
        except Exception as error:  # onnxruntime's exceptions share no base class
            reason = " ".join(str(error).split())[:200]
        reasons.append(f"{name}: {reason}")
    raise InputError(f"provider {reasons[0]}")


def gpu_layers(wanted: str | int, supported: bool) -> int:
    """Decoder layers to put on a GPU for a count, "auto" or "all"; ``ALL_LAYERS`` for every one.

    ``supported`` tells whether the installed llama.cpp can use a GPU.

    Raises:
        InputError: layers were asked for, and it cannot.
    """
    if wanted == "auto":
        return ALL_LAYERS if supported else 0
    count = ALL_LAYERS if wanted == "all" else int(wanted)
    if count and not supported:
        raise InputError(
            f"gpu layers: the installed llama.cpp runs on the CPU alone; rebuild it: {GPU_INSTALL}"
        )
    return count


def parse_gpu_layers(text: str) -> str | int:
    """``auto``, ``all`` or a whole number.

    Raises:
        ValueError: it is none of them.
    """
    if text in ("auto", "all"):
        return text
    if not text.isdecimal() or len(text) > 20 or int(text) > 1024:
        raise ValueError(f"{text[:40]!r} is not auto, all or a number from 0 to 1024")
    return int(text)

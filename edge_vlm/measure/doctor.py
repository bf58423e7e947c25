"""What this machine could do better: instructions llama.cpp was built without, unused hardware.

``examine`` looks at the machine; the functions it uses work on what was read, so that each can be
tested with what other machines report.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from edge_vlm.machine.hardware import Machine, default_threads, this_machine
from edge_vlm.machine.process import import_onnxruntime
from edge_vlm.machine.providers import GPU_INSTALL, PROVIDERS, candidates

# The processor's name for an instruction set, llama.cpp's for kernels that use it, and what becomes
# of quantized matrix products without them.
INSTRUCTIONS = (
    ("avx", "AVX", "several times slower"),
    ("avx2", "AVX2", "several times slower"),
    ("fma", "FMA", "slower"),
    ("f16c", "F16C", "slower"),
    ("bmi2", "BMI2", ""),
    ("avx512f", "AVX512", "slower prefill"),
    ("avx512vbmi", "AVX512_VBMI", ""),
    ("avx512_vnni", "AVX512_VNNI", "slower prefill"),
    ("avx512_bf16", "AVX512_BF16", ""),
    ("avx_vnni", "AVX_VNNI", "slower prefill"),
    ("amx_int8", "AMX_INT8", ""),
    ("asimd", "NEON", ""),
    ("asimddp", "DOTPROD", "prefill at about half its speed"),
    ("i8mm", "MATMUL_INT8", "prefill at about half its speed"),
    ("asimdhp", "FP16_VA", ""),
    ("sve", "SVE", ""),
)
PACKAGES = ("edge-vlm", "llama-cpp-python", "numpy", "pillow", "psutil")
ONNXRUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
)

SystemInfo = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Advice:
    """Something that would help: what is wrong, what it costs, and what to type."""

    problem: str
    effect: str
    command: str | None = None


@dataclass(frozen=True)
class Report:
    """What ``edge-vlm doctor`` shows."""

    machine: Machine
    threads: int  # used by default
    packages: dict[str, str]
    providers: tuple[str, ...]  # of the installed onnxruntime
    vision_provider: str  # that "auto" takes first
    llama_build: SystemInfo
    gpu_offload: bool
    errors: tuple[str, ...]  # what does not work at all
    advice: tuple[Advice, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        data = asdict(self)
        data["machine"]["features"] = sorted(self.machine.features)
        return data


def examine() -> Report:
    """Look at this machine, its packages and the engines' builds."""
    machine, packages, errors = this_machine(), installed_packages(), []
    providers: tuple[str, ...] = ()
    build: SystemInfo = {}
    offload = False
    try:
        providers = tuple(import_onnxruntime().get_available_providers())
    except Exception as error:  # a broken installation can raise anything
        errors.append(f"onnxruntime does not load: {_one_line(error)}")
    try:
        from edge_vlm.decoder.llama import build_info

        text, offload = build_info()
        build = parse_system_info(text)
    except Exception as error:  # see above
        errors.append(f"llama.cpp does not load: {_one_line(error)}")
    advice = (
        *build_advice(machine, build, packages.get("llama-cpp-python"), sys.platform),
        *package_advice(packages),
        *gpu_advice(machine, bool(shutil.which("nvidia-smi")), providers, offload),
        *limit_advice(machine),
    )
    return Report(
        machine=machine,
        threads=default_threads(),
        packages=packages,
        providers=providers,
        vision_provider=candidates("auto", providers)[0],
        llama_build=build,
        gpu_offload=offload,
        errors=tuple(errors),
        advice=advice,
    )


def parse_system_info(text: str) -> SystemInfo:
    """llama.cpp's ``llama_print_system_info``: backend -> feature -> value.

    Newer releases write ``CUDA : ARCHS = 860 | CPU : AVX2 = 1 | ``, older ones only the features,
    also those that are absent (``AVX2 = 0``).
    """
    found: SystemInfo = {}
    backend = "CPU"
    for part in text.split("|"):
        match = re.fullmatch(r"\s*(?:(\w+) : )?\s*(\w+) = (.*?)\s*", part)
        if match:
            backend = match[1] or backend
            found.setdefault(backend, {})[match[2]] = match[3]
    return found


def missing_instructions(features: Iterable[str], build: SystemInfo) -> list[str]:
    """llama.cpp's names of instruction sets the processor has and the build does not use."""
    used = {name for name, value in build.get("CPU", {}).items() if value != "0"}
    if "AVX512_VNNI" in used:
        used.add("AVX_VNNI")  # the same products in narrower registers
    present = set(features)
    return [
        name
        for feature, name, effect in INSTRUCTIONS
        if feature in present and effect and name not in used
    ]


def rebuild_command(version: str | None, platform: str) -> str:
    """The line that compiles llama.cpp for the processor it runs on."""
    package = f"llama-cpp-python=={version}" if version else "llama-cpp-python"
    install = (
        "pip install --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python"
        f" {package}"
    )
    flags = '"-DGGML_NATIVE=on"'
    if platform == "win32":
        return f"$env:CMAKE_ARGS={flags}; {install}"
    return f"CMAKE_ARGS={flags} {install}"


def build_advice(
    machine: Machine, build: SystemInfo, version: str | None, platform: str
) -> Iterator[Advice]:
    """About how llama.cpp was built."""
    if "CPU" not in build:
        return
    command = rebuild_command(version, platform)
    if missing := missing_instructions(machine.features, build):
        effects = dict.fromkeys(effect for _, name, effect in INSTRUCTIONS if name in missing)
        yield Advice(
            f"llama.cpp was built without {', '.join(missing)}, which this processor has",
            ", ".join(effects),
            command,
        )
    if machine.family == "arm" and not {"REPACK", "AARCH64_REPACK"} & set(build["CPU"]):
        yield Advice(
            "llama.cpp was built without repacked kernels",
            "prefill at a half to a third of its speed on ARM",
            command,
        )


def package_advice(packages: Mapping[str, str]) -> Iterator[Advice]:
    """About packages that get in each other's way."""
    several = [name for name in ONNXRUNTIMES if name in packages]
    if len(several) > 1:
        yield Advice(
            f"{' and '.join(several)} are both installed and overwrite each other's files",
            "providers may be missing",
            f"pip uninstall -y {' '.join(several)} && pip install {several[-1]}",
        )


def gpu_advice(
    machine: Machine, has_nvidia: bool, providers: Iterable[str], offload: bool
) -> Iterator[Advice]:
    """About a GPU that is there and not used."""
    on_cpu = "the decoder runs on the CPU"
    if has_nvidia and not offload:
        yield Advice("llama.cpp was built without CUDA", on_cpu, GPU_INSTALL)
    if has_nvidia and PROVIDERS["cuda"].id not in providers:
        yield Advice(
            "onnxruntime has no CUDA provider",
            "the vision tower runs on the CPU",
            "pip uninstall -y onnxruntime && pip install onnxruntime-gpu",
        )
    apple = machine.processor.startswith("Apple")
    if apple and machine.family == "arm" and not offload:
        metal = GPU_INSTALL.split(" (")[0].replace("GGML_CUDA", "GGML_METAL")
        yield Advice("llama.cpp was built without Metal", on_cpu, metal)
    if apple and machine.family == "x86":
        yield Advice(
            "this Python is built for Intel and runs translated on Apple silicon",
            "everything is several times slower",
            "install an arm64 Python and edge-vlm in it",
        )


def limit_advice(machine: Machine) -> Iterator[Advice]:
    """About limits a container or a 32-bit system sets."""
    if machine.architecture in ("armv7l", "armv6l", "i386", "i686"):
        yield Advice(
            f"the system is 32-bit ({machine.architecture})",
            "no ready-made engines, and at most 3 GB for a process",
            "install a 64-bit system",
        )
    if machine.memory_limit and machine.memory_limit < machine.memory:
        yield Advice(
            f"a container limit allows {machine.memory_limit / 1e9:.1f} of"
            f" {machine.memory / 1e9:.1f} GB of memory",
            "larger models are killed; 'edge-vlm plan' says what a request needs",
        )
    if machine.cpu_limit and machine.cpu_limit < (machine.physical_cores or machine.usable_cores):
        yield Advice(
            f"a container limit allows {machine.cpu_limit:g} of {machine.usable_cores} cores",
            "as many threads are used as that",
        )


def installed_packages(names: Sequence[str] = (*PACKAGES, *ONNXRUNTIMES)) -> dict[str, str]:
    """Versions of packages, by name; those that are missing are left out."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def instruction_sets(machine: Machine) -> list[str]:
    """Names of the machine's instruction sets that the engines can use."""
    return [name for feature, name, _ in INSTRUCTIONS if feature in machine.features]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

"""What this machine could do better: instructions llama.cpp was built without, unused hardware.

``examine`` looks at the machine; the functions it uses work on what was read, so that each can be
tested with what other machines report.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from edge_vlm.machine.hardware import Machine, default_threads, this_machine
from edge_vlm.machine.process import import_onnxruntime
from edge_vlm.machine.providers import GPU_INSTALL, PROVIDERS, candidates

# The processor's name for an instruction set, and llama.cpp's for kernels that use it.
INSTRUCTIONS = {
    "avx": "AVX",
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "bmi2": "BMI2",
    "avx512f": "AVX512",
    "avx512vbmi": "AVX512_VBMI",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "avx_vnni": "AVX_VNNI",
    "amx_int8": "AMX_INT8",
    "asimd": "NEON",
    "asimddp": "DOTPROD",
    "i8mm": "MATMUL_INT8",
    "asimdhp": "FP16_VA",
    "sve": "SVE",
}
# Those without which quantized matrix products are much slower, and by how much.
MATTER = {
    "AVX": "several times slower",
    "AVX2": "several times slower",
    "FMA": "slower",
    "F16C": "slower",
    "AVX512": "slower prefill",
    "AVX512_VNNI": "slower prefill",
    "AVX_VNNI": "slower prefill",
    "DOTPROD": "prefill at about half its speed",
    "MATMUL_INT8": "prefill at about half its speed",
}
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
    advice = [
        *build_advice(machine, build, packages.get("llama-cpp-python"), sys.platform),
        *package_advice(packages),
        *gpu_advice(machine, bool(shutil.which("nvidia-smi")), providers, offload),
        *limit_advice(machine),
    ]
    return Report(
        machine=machine,
        threads=default_threads(),
        packages=packages,
        providers=providers,
        vision_provider=candidates("auto", providers)[0],
        llama_build=build,
        gpu_offload=offload,
        errors=tuple(errors),
        advice=tuple(advice),
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
        for feature, name in INSTRUCTIONS.items()
        if feature in present and name in MATTER and name not in used
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
) -> list[Advice]:
    """About how llama.cpp was built."""
    if "CPU" not in build:
        return []
    command = rebuild_command(version, platform)
    missing = missing_instructions(machine.features, build)
    advice = []
    if missing:
        effects = dict.fromkeys(MATTER[name] for name in missing)
        advice.append(
            Advice(
                f"llama.cpp was built without {', '.join(missing)}, which this processor has",
                ", ".join(effects),
                command,
            )
        )
    repacks = {"REPACK", "AARCH64_REPACK"} & set(build["CPU"])
    if machine.family == "arm" and not repacks:
        advice.append(
            Advice(
                "llama.cpp was built without repacked kernels",
                "prefill at a half to a third of its speed on ARM",
                command,
            )
        )
    return advice


def package_advice(packages: Mapping[str, str]) -> list[Advice]:
    """About packages that get in each other's way."""
    several = [name for name in ONNXRUNTIMES if name in packages]
    if len(several) < 2:
        return []
    return [
        Advice(
            f"{' and '.join(several)} are both installed and overwrite each other's files",
            "providers may be missing",
            f"pip uninstall -y {' '.join(several)} && pip install {several[-1]}",
        )
    ]


def gpu_advice(
    machine: Machine, has_nvidia: bool, providers: Iterable[str], offload: bool
) -> list[Advice]:
    """About a GPU that is there and not used."""
    advice = []
    if has_nvidia and not offload:
        effect = "the decoder runs on the CPU"
        advice.append(Advice("llama.cpp was built without CUDA", effect, GPU_INSTALL))
    if has_nvidia and PROVIDERS["cuda"].id not in providers:
        advice.append(
            Advice(
                "onnxruntime has no CUDA provider",
                "the vision tower runs on the CPU",
                "pip uninstall -y onnxruntime && pip install onnxruntime-gpu",
            )
        )
    apple = machine.processor.startswith("Apple")
    if apple and machine.family == "arm" and not offload:
        metal = GPU_INSTALL.split(" (")[0].replace("GGML_CUDA", "GGML_METAL")
        effect = "the decoder runs on the CPU"
        advice.append(Advice("llama.cpp was built without Metal", effect, metal))
    if apple and machine.family == "x86":
        advice.append(
            Advice(
                "this Python is built for Intel and runs translated on Apple silicon",
                "everything is several times slower",
                "install an arm64 Python and edge-vlm in it",
            )
        )
    return advice


def limit_advice(machine: Machine) -> list[Advice]:
    """About limits a container or a 32-bit system sets."""
    advice = []
    if machine.architecture in ("armv7l", "armv6l", "i386", "i686"):
        advice.append(
            Advice(
                f"the system is 32-bit ({machine.architecture})",
                "no ready-made engines, and at most 3 GB for a process",
                "install a 64-bit system",
            )
        )
    if machine.memory_limit and machine.memory_limit < machine.memory:
        advice.append(
            Advice(
                f"a container limit allows {machine.memory_limit / 1e9:.1f} of"
                f" {machine.memory / 1e9:.1f} GB of memory",
                "larger models are killed; 'edge-vlm plan' says what a request needs",
            )
        )
    if machine.cpu_limit and machine.cpu_limit < (machine.physical_cores or machine.usable_cores):
        advice.append(
            Advice(
                f"a container limit allows {machine.cpu_limit:g} of {machine.usable_cores} cores",
                "as many threads are used as that",
            )
        )
    return advice


def installed_packages() -> dict[str, str]:
    """Versions of the packages that matter, by name; those that are missing are left out."""
    found = {}
    for name in (*PACKAGES, *ONNXRUNTIMES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def instruction_sets(machine: Machine) -> list[str]:
    """Names of the machine's instruction sets that the engines can use."""
    return [name for feature, name in INSTRUCTIONS.items() if feature in machine.features]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

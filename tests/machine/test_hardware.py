"""What machines report about themselves, and what edge-vlm makes of it."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_vlm import EdgeVLM, InputError, MachineSettings
from edge_vlm.machine.hardware import (
    Machine,
    cpu_limit,
    default_threads,
    family,
    fingerprint,
    memory_limit,
    this_machine,
)
from edge_vlm.machine.providers import (
    ALL_LAYERS,
    PROVIDER_CHOICES,
    candidates,
    gpu_layers,
    open_session,
    parse_gpu_layers,
)
from edge_vlm.measure.doctor import (
    build_advice,
    gpu_advice,
    installed_packages,
    instruction_sets,
    limit_advice,
    missing_instructions,
    package_advice,
    parse_system_info,
    rebuild_command,
)
from tests.conftest import Run

RECEIPT = Path(__file__).parents[2] / "examples" / "images" / "receipt-1.png"

# /proc/cpuinfo of a Raspberry Pi 5 (Cortex-A76), a Graviton3 and two x86 machines, shortened.
PI_5 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop"
PI_5 += " asimddp"
PI_4 = "fp asimd evtstrm crc32 cpuid"
GRAVITON_3 = PI_5 + " sve i8mm bf16 svei8mm"
HASWELL = "fpu sse2 ssse3 sse4_1 sse4_2 avx f16c fma avx2 bmi1 bmi2"
SAPPHIRE_RAPIDS = HASWELL + " avx512f avx512bw avx512vbmi avx512_vnni avx512_bf16 avx_vnni amx_int8"
M2 = PI_5 + " i8mm bf16"

# llama_print_system_info() as logged on these machines.
GENERIC_ARM = "CPU : NEON = 1 | ARM_FMA = 1 | LLAMAFILE = 1 | REPACK = 1 | "
NATIVE_PI_5 = (
    "CPU : NEON = 1 | ARM_FMA = 1 | FP16_VA = 1 | DOTPROD = 1 | LLAMAFILE = 1 | OPENMP = 1"
    " | AARCH64_REPACK = 1 | "
)
MACBOOK = (
    "Metal : EMBED_LIBRARY = 1 | BF16 = 1 | CPU : NEON = 1 | ARM_FMA = 1 | FP16_VA = 1"
    " | MATMUL_INT8 = 1 | DOTPROD = 1 | MATMUL_INT8 = 1 | ACCELERATE = 1 | AARCH64_REPACK = 1 | "
)
RTX_5090 = (
    "CUDA : ARCHS = 750,800,860,890,900,1200,1210 | USE_GRAPHS = 1 | PEER_MAX_BATCH_SIZE = 128"
    " | BLACKWELL_NATIVE_FP4 = 1 | CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1"
    " | FMA = 1 | BMI2 = 1 | LLAMAFILE = 1 | OPENMP = 1 | REPACK = 1 | "
)
XEON = (
    "CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX_VNNI = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1"
    " | AVX512 = 1 | AVX512_VBMI = 1 | AVX512_VNNI = 1 | AVX512_BF16 = 1 | LLAMAFILE = 1"
    " | OPENMP = 1 | REPACK = 1 | "
)
ORANGE_PI_2024 = (
    "AVX = 0 | AVX_VNNI = 0 | AVX2 = 0 | AVX512 = 0 | AVX512_VBMI = 0 | AVX512_VNNI = 0 | FMA = 0"
    " | NEON = 1 | ARM_FMA = 1 | F16C = 0 | FP16_VA = 0 | WASM_SIMD = 0 | BLAS = 0 | SSE3 = 0"
    " | SSSE3 = 0 | VSX = 0 | MATMUL_INT8 = 0 |"
)


def machine(features: str = "", **changes: Any) -> Machine:
    arm = "asimd" in features
    known = Machine(
        system="Linux 6.12",
        architecture="aarch64" if arm else "x86_64",
        processor="a processor",
        features=frozenset(features.split()),
        physical_cores=4,
        logical_cores=4,
        usable_cores=4,
        cpu_limit=None,
        memory=8 << 30,
        memory_available=6 << 30,
        memory_limit=None,
    )
    return dataclasses.replace(known, **changes)


@pytest.mark.parametrize(
    ("features", "recorded", "missing"),
    [
        (PI_5, GENERIC_ARM, ["DOTPROD"]),
        (PI_5, NATIVE_PI_5, []),
        (PI_4, GENERIC_ARM, []),
        (GRAVITON_3, GENERIC_ARM, ["DOTPROD", "MATMUL_INT8"]),
        (GRAVITON_3, NATIVE_PI_5, ["MATMUL_INT8"]),
        (M2, MACBOOK, []),
        (PI_5, ORANGE_PI_2024, ["DOTPROD"]),
        (GRAVITON_3, ORANGE_PI_2024, ["DOTPROD", "MATMUL_INT8"]),
        (HASWELL, RTX_5090, []),
        (SAPPHIRE_RAPIDS, RTX_5090, ["AVX512", "AVX512_VNNI", "AVX_VNNI"]),
        (SAPPHIRE_RAPIDS, XEON, []),
        (SAPPHIRE_RAPIDS, XEON.replace("AVX_VNNI = 1 | ", ""), []),
        (HASWELL, "CPU : SSE3 = 1 | ", ["AVX", "AVX2", "FMA", "F16C"]),
    ],
)
def test_instructions_a_build_leaves_unused(
    features: str, recorded: str, missing: list[str]
) -> None:
    build = parse_system_info(recorded)
    assert missing_instructions(features.split(), build) == missing
    advice = build_advice(machine(features), build, "0.3.36", "linux")
    named = [one for one in advice if "was built without" in one.problem and one.effect]
    if missing:
        assert ", ".join(missing) in named[0].problem
        assert named[0].command == rebuild_command("0.3.36", "linux")


def test_backends_and_values_of_a_build() -> None:
    build = parse_system_info(RTX_5090)
    assert list(build) == ["CUDA", "CPU"]
    assert build["CUDA"]["ARCHS"].startswith("750,800")
    assert build["CPU"]["REPACK"] == "1"
    assert "AVX512" not in build["CPU"]
    assert list(parse_system_info(MACBOOK)) == ["Metal", "CPU"]
    assert parse_system_info(ORANGE_PI_2024)["CPU"]["AVX"] == "0"
    assert parse_system_info("") == {}
    assert parse_system_info("nonsense | = | : ") == {}


def test_a_raspberry_pi_with_the_ready_made_wheel_gets_the_line_that_rebuilds() -> None:
    (advice,) = build_advice(machine(PI_5), parse_system_info(GENERIC_ARM), "0.3.36", "linux")
    assert "DOTPROD" in advice.problem
    assert "half its speed" in advice.effect
    assert advice.command == (
        'CMAKE_ARGS="-DGGML_NATIVE=on" pip install --force-reinstall --no-deps --no-cache-dir'
        " --no-binary llama-cpp-python llama-cpp-python==0.3.36"
    )
    assert rebuild_command("0.3.36", "win32").startswith('$env:CMAKE_ARGS="-DGGML_NATIVE=on"; pip')


def test_missing_repacked_kernels_are_noticed_on_arm_alone() -> None:
    without = parse_system_info(NATIVE_PI_5.replace("AARCH64_REPACK = 1 | ", ""))
    (advice,) = build_advice(machine(PI_5), without, None, "linux")
    assert "repacked" in advice.problem
    plain = parse_system_info(RTX_5090.replace("REPACK = 1 | ", ""))
    assert not list(build_advice(machine(HASWELL), plain, None, "linux"))
    assert not list(build_advice(machine(PI_5), {}, None, "linux"))


def test_gpus_that_are_not_used() -> None:
    none = list(gpu_advice(machine(HASWELL), True, ["CUDAExecutionProvider"], True))
    assert none == []
    both = list(gpu_advice(machine(HASWELL), True, ["CPUExecutionProvider"], False))
    assert [bool(one.command) for one in both] == [True, True]
    assert "GGML_CUDA" in (both[0].command or "")
    assert "onnxruntime-gpu" in (both[1].command or "")
    (metal,) = gpu_advice(machine(M2, processor="Apple M2"), False, [], False)
    assert "GGML_METAL" in (metal.command or "")
    assert "GGML_CUDA" not in (metal.command or "")
    (rosetta,) = gpu_advice(machine(HASWELL, processor="Apple M2"), False, [], False)
    assert "translated" in rosetta.problem
    assert not list(gpu_advice(machine(HASWELL), False, [], False))


def test_limits_are_noticed() -> None:
    assert not list(limit_advice(machine()))
    limited = machine(cpu_limit=1.5, memory_limit=2 << 30)
    assert [one.problem.split()[:3] for one in limit_advice(limited)] == [
        ["a", "container", "limit"],
        ["a", "container", "limit"],
    ]
    assert "32-bit" in next(limit_advice(machine(architecture="armv7l"))).problem


def test_two_onnxruntimes_at_once_are_noticed() -> None:
    assert not list(package_advice({"onnxruntime": "1.23"}))
    (advice,) = package_advice({"onnxruntime": "1.23", "onnxruntime-gpu": "1.23"})
    assert "overwrite" in advice.problem
    assert advice.command is not None
    assert advice.command.endswith("pip install onnxruntime-gpu")


def test_container_limits(tmp_path: Path) -> None:
    assert cpu_limit(tmp_path) is None
    assert memory_limit(tmp_path) is None
    for text, cores in (("max 100000", None), ("150000 100000", 1.5), ("x y", None), ("5 0", None)):
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert cpu_limit(tmp_path) == cores
    for text, size in (("max", None), ("2147483648", 2 << 30), ("-1", None)):
        (tmp_path / "memory.max").write_text(text + "\n")
        assert memory_limit(tmp_path) == size


def test_container_limits_of_the_first_kind(tmp_path: Path) -> None:
    for folder in ("cpu", "memory"):
        (tmp_path / folder).mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(str((1 << 63) - 4096))
    assert cpu_limit(tmp_path) is None
    assert memory_limit(tmp_path) is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1000000")
    assert cpu_limit(tmp_path) == 0.5
    assert memory_limit(tmp_path) == 1_000_000


def test_threads_stay_within_a_containers_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for limit, threads in (("max", 8), ("150000", 2), ("50000", 1), ("6400000", 8)):
        (tmp_path / "cpu.max").write_text(f"{limit} 100000\n")
        assert default_threads(tmp_path) == threads


def test_this_machine() -> None:
    found = this_machine()
    assert found.processor
    assert found.memory > found.memory_available > 0
    assert found.usable_cores >= 1
    assert fingerprint() == fingerprint()
    assert len(fingerprint()) == 16
    if found.family in ("x86", "arm"):
        assert instruction_sets(found)
    assert [family(name) for name in ("AMD64", "x86_64", "arm64", "aarch64", "riscv64")] == [
        *("x86", "x86", "arm", "arm", "riscv64")
    ]
    assert {"onnxruntime", "llama-cpp-python"} <= set(installed_packages())


CPU_ONLY = ["AzureExecutionProvider", "CPUExecutionProvider"]


class FakeSession:
    """As onnxruntime does, it leaves out a provider that does not start, and says nothing."""

    def __init__(self, providers: list[str], working: set[str]) -> None:
        self.used = [name for name in providers if name in working]

    def get_providers(self) -> list[str]:
        return self.used


def creator(*working: str) -> Callable[[list[str]], FakeSession]:
    return lambda providers: FakeSession(providers, {*working, "CPUExecutionProvider"})


def test_auto_takes_the_best_that_is_installed() -> None:
    assert candidates("auto", CPU_ONLY) == ["cpu"]
    many = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert candidates("auto", many) == ["cuda", "cpu"]
    assert candidates("tensorrt", many) == ["tensorrt"]
    session = open_session("auto", many, creator("CUDAExecutionProvider"))
    assert session.get_providers() == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert open_session("auto", ["CoreMLExecutionProvider"], creator()).get_providers() == [
        "CPUExecutionProvider"
    ]


def test_auto_falls_back_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    available = ["CUDAExecutionProvider", "OpenVINOExecutionProvider", "CPUExecutionProvider"]

    def create(providers: list[str]) -> FakeSession:
        if "OpenVINOExecutionProvider" in providers:
            raise RuntimeError("no\nlibrary")
        return FakeSession(providers, {"CPUExecutionProvider"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("edge_vlm"), "propagate", False)  # pytest listens at root
        session = open_session("auto", available, create)
    assert session.get_providers() == ["CPUExecutionProvider"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "vision runs on the CPU: cuda: it does not start here" in lines[0]
    assert "openvino: no library" in lines[0]


@pytest.mark.parametrize("name", sorted(set(PROVIDER_CHOICES) - {"auto", "cpu"}))
def test_a_missing_provider_names_what_to_install(name: str) -> None:
    with pytest.raises(InputError, match=rf"provider {name}: .*(pip install|build) onnxruntime"):
        candidates(name, CPU_ONLY)


def test_a_provider_that_was_asked_for_and_does_not_start_is_an_error() -> None:
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    with pytest.raises(InputError, match="cuda: it does not start here"):
        open_session("cuda", available, creator())


def test_gpu_layers() -> None:
    assert gpu_layers("auto", supported=True) == ALL_LAYERS
    assert gpu_layers("auto", supported=False) == 0
    assert gpu_layers("all", supported=True) == ALL_LAYERS
    assert gpu_layers(7, supported=True) == 7
    assert gpu_layers(0, supported=False) == 0
    for wanted in ("all", 1):
        with pytest.raises(InputError, match="GGML_CUDA"):
            gpu_layers(wanted, supported=False)
    assert [parse_gpu_layers(text) for text in ("auto", "all", "0", "28")] == ["auto", "all", 0, 28]
    for text in ("", "-1", "some", "1.5", "9" * 30):
        with pytest.raises(ValueError, match="not auto"):
            parse_gpu_layers(text)


def test_settings_of_the_hardware() -> None:
    settings = MachineSettings.from_environment(
        {"EDGE_VLM_PROVIDER": "CPU", "EDGE_VLM_GPU_LAYERS": "3"}
    )
    assert (settings.provider, settings.gpu_layers) == ("cpu", 3)
    for bad in ({"provider": "npu"}, {"gpu_layers": "many"}, {"gpu_layers": -2}):
        with pytest.raises(InputError, match=next(iter(bad))):
            MachineSettings(**bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="EDGE_VLM_GPU_LAYERS"):
        MachineSettings.from_environment({"EDGE_VLM_GPU_LAYERS": "x"})


@pytest.mark.engine
def test_a_quantized_kv_cache_answers() -> None:
    answers = set()
    for kv_type in ("f16", "q8_0"):
        settings = MachineSettings(threads=1, kv_type=kv_type, provider="cpu")
        with EdgeVLM.load("demo", settings=settings) as vlm:
            answer = vlm.ask(RECEIPT, "What is the total?", max_tokens=16)
        answers.add(str(answer))
    assert len(answers) == 1


def test_options_of_the_hardware_through_the_command(run: Run) -> None:
    result = run("ask", RECEIPT, "Hi", "--provider", "qnn")
    assert result.returncode == 2
    assert b"pip install onnxruntime-qnn" in result.stderr
    assert result.stdout == b""
    hardware = ("--provider", "cpu", "--gpu-layers", "0")
    cpu = run("ask", RECEIPT, "Hi", *hardware, "--max-tokens", "2")
    assert cpu.returncode == 0
    assert cpu.stderr == b""
    assert run("ask", "Hi", "--gpu-layers", "x").returncode == 2


def test_doctor(run: Run) -> None:
    result = run("doctor", "--json")
    assert result.returncode == 0
    assert result.stderr == b""
    data = json.loads(result.stdout)
    assert data["machine"]["usable_cores"] >= 1
    assert "CPUExecutionProvider" in data["providers"]
    assert "CPU" in data["llama_build"]
    assert math.isfinite(data["machine"]["memory"])
    text = run("doctor").stdout.decode()
    assert "llama.cpp CPU" in text
    assert data["machine"]["processor"] in text


def test_doctor_reports_an_engine_that_does_not_load(run: Run, tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "onnxruntime"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libfoo.so: not found')\n")
    path = os.pathsep.join([str(broken.parent), os.environ.get("PYTHONPATH", "")])
    result = run("doctor", PYTHONPATH=path)
    assert result.returncode == 1
    assert b"onnxruntime does not load: libfoo.so: not found" in result.stdout
    assert b"Traceback" not in result.stderr

"""The planner: against llama.cpp's own log, published tables, and other models' processors."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from edge_vlm_export import export_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm import InputError, MachineSettings
from edge_vlm.bundle.find import embedded_bundle
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.cli.tools.plan import DECODER, DEVICES, VISION
from edge_vlm.decoder.decoder import LlamaDecoder
from edge_vlm.families.jina_vlm.cost import vision_sizes
from edge_vlm.families.jina_vlm.paper import efficiency_table
from edge_vlm.families.others import OTHER_MODELS, OtherModel, Usage
from edge_vlm.machine.engine_settings import KV_TYPES as KV_ELEMENT_BYTES
from edge_vlm.machine.engine_settings import untuned
from edge_vlm.planning import cost
from edge_vlm.planning.compare import compare
from edge_vlm.planning.models import DECODER_PRECISIONS, VISION_BYTES, model_sizes
from edge_vlm.planning.profiles import PROFILES
from edge_vlm.planning.request import Memory, ModelSizes, RequestSettings, plan_request
from edge_vlm.planning.speeds import Speeds
from edge_vlm.planning.tuning import Tuning, store_tuning
from tests.conftest import Run, assert_one_line

CHECKPOINT = Path(__file__).parents[2] / "models" / "demo" / "checkpoint"
LARGEST = (2728, 2046)
SPEEDS = Speeds(
    load_seconds=2.0,
    vision_seconds_per_tile=1.5,
    prefill_tokens_per_second=100.0,
    prefill_tokens=512,
    decode_tokens_per_second=20.0,
    decode_positions=512,
)


def family(name: str) -> OtherModel:
    return next(family for family in OTHER_MODELS if family.name == name)


@pytest.mark.engine
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize(("positions", "batch"), [(1, 512), (700, 64), (2000, 512)])
def test_kv_and_compute_bytes_are_llama_cpps(
    kv_type: str, positions: int, batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.open(embedded_bundle())
    geometry = bundle.manifest.decoder
    engines = dataclasses.replace(
        untuned(), threads=1, prefill_threads=1, batch_size=batch, flash_attention="off"
    )
    decoder = LlamaDecoder(bundle, engines, kv_type=kv_type, logs=True)
    capsys.readouterr()
    with decoder.context(positions) as context:
        context.settle()
        size = context.capacity
    decoder.close()
    LlamaDecoder(bundle, engines, kv_type=kv_type, logs=False).close()
    log = capsys.readouterr().err
    allocated = float(re.findall(r"KV buffer size =\s*([\d.]+) MiB", log)[0])
    compute = float(re.findall(r"compute buffer size =\s*([\d.]+) MiB", log)[-1])
    assert size == cost.context_size(positions)
    assert cost.kv_bytes(geometry, positions, kv_type) / 2**20 == pytest.approx(
        allocated, abs=0.006
    )
    computed = cost.compute_bytes(geometry, size, batch, kv_type, kv_type.startswith("q"))
    assert computed / 2**20 == pytest.approx(compute, rel=0.03, abs=0.05)


def test_compute_buffers_at_full_width() -> None:
    """As llama.cpp logged them for a decoder of the released width, in MiB."""
    geometry = model_sizes().decoder
    for batch, context, kv_type, logged in (
        (64, 512, "f16", 6.63),
        (64, 2048, "f16", 11.50),
        (128, 2560, "f32", 27.25),
        (512, 512, "f16", 53.01),
        (512, 2560, "f16", 109.01),
        (512, 2048, "q8_0", 50.09),
        (128, 2560, "q4_0", 12.71),
    ):
        computed = cost.compute_bytes(geometry, context, batch, kv_type, kv_type != "f16")
        if kv_type == "f32":
            computed = cost.compute_bytes(geometry, context, batch, kv_type, False)
        assert computed / 2**20 == pytest.approx(logged, rel=0.01)


def test_kv_bytes_of_the_released_model_in_all_types() -> None:
    """2,366 positions: 271 MB f16, 144 MB q8_0, 76 MB q4_0; contexts are multiples of 256."""
    decoder = model_sizes().decoder
    for kv_type, megabytes in (("f16", 271), ("q8_0", 144), ("q4_0", 76)):
        per_token = decoder.kv_bytes_per_token(KV_ELEMENT_BYTES[kv_type])
        assert round(2366 * per_token / 1e6) == megabytes
        assert cost.kv_bytes(decoder, 2366, kv_type) == 2560 * per_token


def test_the_papers_table_within_two_percent() -> None:
    figures = {figure.name: figure for figure in efficiency_table()}
    assert [figure.published for figure in figures.values()] == [
        9477,
        2366,
        27.2,
        6.9,
        2.12,
        0.53,
        2.3,
    ]
    for figure in figures.values():
        assert abs(figure.deviation) < 0.02, figure
        decimals = len(str(figure.published).partition(".")[2])
        assert round(figure.computed, decimals) == figure.published, figure  # as printed
    assert figures["visual tokens, pooled"].runtime == 1744
    assert figures["KV cache, pooled"].runtime == pytest.approx(0.2, abs=0.001)


def test_sizes_of_the_released_model() -> None:
    """About 0.41 billion in the tower, 1.7 in the decoder; q4_k_m is 1.2 to 1.4 GB."""
    sizes = model_sizes("fp16", "q4_k_m")
    assert sizes.vision_bytes / 2 == pytest.approx(0.42e9, rel=0.02)
    assert 1.2e9 < sizes.decoder_bytes < 1.4e9
    assert model_sizes("fp32", "f16").decoder_bytes == pytest.approx(2 * 2.03e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "gib"),
    [("q4_k_m", 4.58), ("q5_k_m", 5.33), ("q6_k", 6.14), ("q8_0", 7.95)],
)
def test_gguf_sizes_against_published_ones(name: str, gib: float) -> None:
    """Llama 3.1 8B, from the table in llama.cpp's tools/quantize/README.md."""
    llama = family("LLaVA-NeXT 7B").decoder.model_copy(update={"vocab_size": 128256})
    assert sum(cost.gguf_bytes(llama, name).values()) / 2**30 == pytest.approx(gib, rel=0.005)


def test_repacked_weights_follow_the_processor() -> None:
    decoder = model_sizes().decoder
    # Measured without repacking at full size: 0.65 GB less.
    assert cost.repacked_bytes(decoder, "q4_k_m", "x86") == pytest.approx(0.66e9, rel=0.05)
    assert cost.repacked_bytes(decoder, "q5_k_m", "x86") == 0
    assert cost.repacked_bytes(decoder, "q4_k_m", "arm") > 1e9
    assert cost.repacked_bytes(decoder, "f16", "arm") == 0
    assert cost.repacked_bytes(decoder, "anything", "x86") == 0
    copies = [
        plan_request(
            model_sizes("int8", "q4_0"),
            *(2728, 2046),
            RequestSettings(processor_family="arm", repack=repack, mmap=mmap, on_demand=False),
        ).memory.repacked_weights
        for repack, mmap in ((False, True), (True, False), (True, True))
    ]
    assert copies[:2] == [0, 0]
    assert copies[2] > 1e9


def test_memory_of_a_run_with_the_demo_model(run: Run) -> None:
    picture = Path(__file__).parents[2] / "examples" / "images" / "receipt-1.png"
    environment = {"EDGE_VLM_MODEL": "demo", "EDGE_VLM_PROVIDER": "cpu"}
    asked = json.loads(run("ask", picture, "What?", "--json", **environment).stdout)
    planned = json.loads(run("plan", picture, "--json", **environment).stdout)
    assert planned["image_tokens"] == asked["image_tokens"]
    question = str(asked["prompt_tokens"] - asked["image_tokens"])
    exact = run("plan", picture, "--json", "--question-tokens", question, **environment)
    assert json.loads(exact.stdout)["memory"]["kv_cache"] == asked["kv_bytes"]
    assert planned["memory"]["peak"] == pytest.approx(asked["peak_rss_bytes"], rel=0.15)


def test_vision_weights_in_memory() -> None:
    """Measured with a tower of the released width and 6 blocks, MB of files and of memory.

    fp32 in a second file: 516 and 491; fp16 in a second file: 258 and 602, in one: 258 and 767.
    """
    for precision, parsed, file_mb, measured in (
        ("fp32", 0, 516, 491),
        ("fp16", 0, 258, 602),
        ("fp16", 258_000_000, 258, 767),
        ("int8", 0, 131, 134),
    ):
        model = dataclasses.replace(
            model_sizes(precision), vision_bytes=file_mb * 1_000_000, parsed_bytes=parsed
        )
        weights = plan_request(model, *LARGEST).memory.vision_weights
        assert weights / 1e6 == pytest.approx(measured, rel=0.15)


def test_turns_need_less_memory() -> None:
    model = model_sizes("int8", "q4_k_m")
    together = plan_request(model, *LARGEST).memory
    turns = plan_request(model, *LARGEST, RequestSettings(residency="in-turns")).memory
    assert together.peak - turns.peak == together.vision_weights
    assert turns.peak > max(turns.vision_weights, turns.decoder_weights)
    parts = dataclasses.asdict(together)
    named = (
        "vision_weights",
        "decoder_weights",
        "kv_cache",
        "compute_buffers",
        "picture",
        "python",
    )
    # The prompt's own cache is gone before the head is read.
    assert 0 < together.prompt_kv_cache < together.head
    assert together.peak == sum(parts[name] for name in named)


def test_a_prompts_own_cache_and_pages_that_are_not_read() -> None:
    def memory(**settings: Any) -> Memory:
        model = model_sizes("int8", "q4_k_m")
        return plan_request(model, *LARGEST, RequestSettings(**settings)).memory

    lean, whole = memory(), memory(on_demand=False)
    assert lean.token_table == whole.decoder_weights - lean.decoder_weights
    assert whole.token_table == 0
    decoder = model_sizes().decoder
    n_weights = decoder.vocab_size * decoder.hidden_size
    assert lean.token_table == pytest.approx(0.5625 * n_weights, rel=0.02)  # q4_K
    assert whole.prompt_kv_cache == cost.kv_bytes(decoder, 1744, "f16")
    assert whole.peak > lean.peak + lean.token_table
    for none in (
        {"flash_attention": "off"},
        {"flash_attention": "on"},
        {"kv_type": "q8_0"},
        {"kv_budget": 300_000_000},
    ):
        assert memory(on_demand=False, **none).prompt_kv_cache == 0
    assert memory(vision_streams=1).onnxruntime_arena < lean.onnxruntime_arena
    read = memory(repack=True, mmap=False)
    assert read.held_weights == read.decoder_weights == whole.decoder_weights
    assert lean.held_weights == 0


def test_interleaved_weights_take_the_place_of_the_files() -> None:
    def memory(family: str, **settings: Any) -> Memory:
        model = model_sizes("int8", "q4_0")
        request = RequestSettings(processor_family=family, **settings)
        return plan_request(model, *LARGEST, request).memory

    plain = memory("x86")
    for family in ("x86", "arm"):
        mapped = memory(family, repack=True)
        assert mapped.decoder_weights == plain.decoder_weights
        assert mapped.repacked_weights == 0
        assert mapped.held_weights > 0.7e9
        assert mapped.peak < memory(family, repack=True, mmap=False).peak
    assert memory("x86", repack=True).peak == plain.peak  # the head is mapped there
    assert memory("arm", repack=True).peak > plain.peak


@given(st.integers(32, 6000), st.integers(32, 6000), st.integers(1, 11))
def test_more_tiles_never_cost_less(width: int, height: int, tiles: int) -> None:
    if max(width, height) > 200 * min(width, height):
        return
    fewer = plan_request(model_sizes(), width, height, max_tiles=tiles, speeds=SPEEDS)
    more = plan_request(model_sizes(), width, height, max_tiles=12, speeds=SPEEDS)
    assert fewer.image.crops <= more.image.crops
    assert fewer.flops.vision <= more.flops.vision
    assert fewer.seconds is not None
    assert more.seconds is not None
    assert fewer.seconds.vision <= more.seconds.vision


def test_settings_are_checked() -> None:
    for bad in ({"kv_type": "q9"}, {"residency": "apart"}, {"processor_family": "mips"}):
        with pytest.raises(InputError, match=next(iter(bad))):
            RequestSettings(**bad)  # type: ignore[arg-type]


def test_predictions_scale_from_what_was_measured() -> None:
    model = model_sizes()
    small = plan_request(model, 300, 300, RequestSettings(question_tokens=88), speeds=SPEEDS)
    assert small.prompt_tokens == 512
    assert small.seconds is not None
    assert small.seconds.prefill == pytest.approx(5.12)
    assert small.seconds.vision == pytest.approx(2 * 1.5)
    assert small.seconds.per_token == pytest.approx(0.05)
    large = plan_request(model, *LARGEST, speeds=SPEEDS)
    assert large.seconds is not None
    # Attention grows with the square: longer than in proportion, but not by much.
    proportional = large.prompt_tokens / 100
    assert proportional < large.seconds.prefill < 1.2 * proportional
    assert large.seconds.per_token > small.seconds.per_token
    assert large.seconds.first_token == pytest.approx(
        large.seconds.vision + large.seconds.prefill + large.seconds.per_token
    )


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, True, "1"])
def test_speeds_are_positive_numbers(value: object) -> None:
    with pytest.raises(InputError, match="load_seconds"):
        dataclasses.replace(SPEEDS, load_seconds=value)  # type: ignore[arg-type]


def test_profiles_give_seconds_and_say_where_from() -> None:
    assert tuple(PROFILES) == DEVICES
    model = model_sizes("int8", "q4_k_m")
    pi, jetson = PROFILES["raspberry-pi-5-8gb"], PROFILES["jetson-orin-nano-8gb"]
    for profile in PROFILES.values():
        assert len(profile.sources) == 4
        assert profile.speeds(model).vision_seconds_per_tile > 0
    # The survey's own arithmetic: 40 s of prefill and 60 to 80 s of int8 vision for 13 crops.
    plan = plan_request(model, *LARGEST, speeds=pi.speeds(model))
    assert plan.seconds is not None
    assert plan.seconds.prefill == pytest.approx(40, rel=0.15)
    assert 60 < plan.seconds.vision < 80
    assert jetson.speeds(model).decode_tokens_per_second == pytest.approx(38, rel=0.2)


def test_choices_of_the_command_are_those_of_the_planner() -> None:
    assert tuple(VISION_BYTES) == VISION
    assert DECODER_PRECISIONS == DECODER
    for kv_type in KV_ELEMENT_BYTES:
        assert MachineSettings(kv_type=kv_type, threads=1).kv_type == kv_type


# Published counts: LLaVA-1.5 and LLaVA-NeXT (576; 576 to 2,880 without the newline of each row),
# LLaVA-OneVision (729 x 10 = 7,290 without them), Llama 3.2 (1,601 a tile, four tiles),
# Qwen2.5-VL (4 to 16,384), Pixtral (4,096 and a break each row), InternVL (256 a tile, 12 and a
# thumbnail), Phi-4 (256 a tile, one row separator each, 273 for the global view).
@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("LLaVA-1.5 13B", (100, 900), 576),
        ("LLaVA-NeXT 7B", (672, 672), 2880 + 48),
        ("LLaVA-NeXT 7B", (1344, 1344), 2880 + 48),
        ("LLaVA-NeXT 7B", (672, 336), 576 + 48 * 24 + 24),
        ("LLaVA-NeXT 7B", (1000, 500), 576 + 48 * 24 + 24),
        ("LLaVA-OneVision 7B", (1152, 1152), 7290 + 81),
        ("LLaVA-OneVision 7B", (2304, 2304), 7290 + 81),
        ("LLaVA-OneVision 7B", (384, 384), 729 * 2 + 27),
        ("Llama 3.2 Vision 11B", (1120, 1120), 4 * 1601),
        ("Llama 3.2 Vision 90B", (4000, 4000), 4 * 1601),
        ("Llama 3.2 Vision 11B", (560, 560), 1601),
        ("Llama 3.2 Vision 11B", (560, 1120), 2 * 1601),
        ("Qwen2.5-VL 7B", (28 * 10, 28 * 20), 200 + 2),
        ("Qwen2.5-VL 7B", (1, 1), 4 + 2),
        ("Qwen2.5-VL 7B", (28 * 256, 28 * 256), 16384 + 2),
        ("Pixtral 12B", (1024, 1024), 4096 + 64),
        ("Pixtral 12B", (512, 512), 1024 + 32),
        ("Pixtral 12B", (2048, 1024), 64 * 32 + 32),
        ("InternVL2.5 8B", (448, 448), 256 + 2),
        ("InternVL2.5 8B", (896, 448), 3 * 256 + 2),
        ("InternVL2.5 8B", (1792, 1344), 13 * 256 + 2),
        ("Phi-4-Multimodal", (448, 448), 256 + 16 + 273),
        ("Phi-4-Multimodal", (1344, 448), 3 * 256 + 16 + 273),
        ("Phi-4-Multimodal", (448 * 12, 448 * 10), 30 * 256 + 80 + 273),
    ],
)
def test_image_tokens_of_other_families(name: str, size: tuple[int, int], tokens: int) -> None:
    assert family(name).rule(*size).tokens == tokens


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_every_family_counts_every_picture(width: int, height: int) -> None:
    limits = {
        "LLaVA-1.5 13B": 576,
        "LLaVA-NeXT 7B": 2928,
        "LLaVA-OneVision 7B": 729 + round(1.1**2 * 6561) + 300,
        "Llama 3.2 Vision 11B": 6404,
        "Llama 3.2 Vision 90B": 6404,
        "Qwen2.5-VL 3B": 16386,
        "Qwen2.5-VL 7B": 16386,
        "Pixtral 12B": 4160,
        "InternVL2.5 1B": 3330,
        "InternVL2.5 8B": 3330,
        "Phi-4-Multimodal": 36 * 256 + 36 * 16 + 273,
    }
    for one in OTHER_MODELS:
        assert 1 <= one.rule(width, height).tokens <= limits[one.name], one.name


def test_costs_of_other_families() -> None:
    """KV bytes by hand; parameters of the model cards through the FLOPs of one position."""
    found = {one.name: one for one in compare(model_sizes(), *LARGEST, name="jina-vlm")}
    assert next(iter(found)) == "jina-vlm"
    assert found["jina-vlm"].image_tokens == 1744
    assert found["jina-vlm"].kv_bytes == 1744 * 114_688
    assert found["LLaVA-1.5 13B"].kv_bytes == 576 * 2 * 40 * 40 * 128 * 2
    # One position in 32 blocks, 6,404 states in the 8 with cross-attention.
    eleven = found["Llama 3.2 Vision 11B"]
    assert eleven.kv_bytes == (32 + 6404 * 8) * 2 * 8 * 128 * 2
    billions = {
        "LLaVA-1.5 13B": 13.0,
        "LLaVA-OneVision 7B": 7.6,
        "Llama 3.2 Vision 11B": 9.8,
        "Llama 3.2 Vision 90B": 87.7,
        "Qwen2.5-VL 3B": 3.1,
        "Qwen2.5-VL 7B": 7.6,
        "Pixtral 12B": 12.2,
        "InternVL2.5 1B": 0.63,
        "InternVL2.5 8B": 7.7,
        "Phi-4-Multimodal": 3.8,
    }
    for name, expected in billions.items():
        decoder = family(name).decoder
        table = decoder.vocab_size * decoder.hidden_size
        parameters = decoder.n_layers * cost.block_weights(decoder)
        parameters += table * (1 if decoder.tied_head else 2)
        assert parameters / 1e9 == pytest.approx(expected, rel=0.02), name


def test_cross_attention_costs_no_decoder_positions() -> None:
    assert Usage(1, 6404).tokens == 6404
    found = {one.name: one for one in compare(model_sizes(), *LARGEST, name="jina-vlm")}
    assert found["Llama 3.2 Vision 11B"].prefill_flops < found["jina-vlm"].prefill_flops


def test_manifests_without_the_planners_sizes_have_siglips_proportions() -> None:
    manifest = Bundle.open(embedded_bundle()).manifest
    assert ModelSizes.of(manifest).vision.ffn_size == 384
    early = manifest.vision.model_copy(
        update={"hidden_size": 1152, "n_heads": None, "ffn_size": None, "output_size": 2048}
    )
    widths = vision_sizes(early)
    assert (widths.n_heads, widths.ffn_size) == (16, 4304)


@pytest.mark.engine
def test_weights_of_a_vision_graph(tmp_path: Path) -> None:
    folder = export_checkpoint(CHECKPOINT, tmp_path / "demo", vision="fp16", decoder="f16")
    sizes = ModelSizes.of(Bundle.open(folder).manifest)
    half_precision = 2 * sizes.work.n_weights
    assert half_precision == pytest.approx(sizes.vision_bytes, rel=0.05)


def test_plan_in_words(run: Run) -> None:
    text = run("plan", "2728x2046", "-m", "jina-vlm").stdout.decode()
    assert "264.2 MB (f16), 2304 positions" in text
    assert "seconds       not measured here" in text
    few = run("plan", "2728x2046", "-m", "jina-vlm", "--max-tiles", "4", "--kv-type", "q8_0")
    assert "tiling        2x2" in few.stdout.decode()
    device = run(
        *("plan", "2728x2046", "-m", "jina-vlm", "--device", "raspberry-pi-5-4gb", "-v"),
        *("--decoder", "f16"),
    )
    assert b"does not fit" in device.stdout
    assert b"estimated for raspberry-pi-5-4gb" in device.stdout
    assert b"potato-os #148" in device.stderr
    fits = run(
        *("plan", "2728x2046", "-m", "jina-vlm", "--device", "raspberry-pi-5-4gb"),
        *("--vision", "int8", "--residency", "in-turns"),
    )
    assert b": fits" in fits.stdout
    assert b"take turns" in fits.stdout


def test_plan_uses_what_was_measured(run: Run, tmp_path: Path) -> None:
    manifest = Bundle.open(embedded_bundle()).manifest
    before = run("plan", "300x200", EDGE_VLM_MODEL="demo").stdout
    assert b"not measured" in before
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_VLM_CONFIG", str(tmp_path))
        store_tuning(manifest, Tuning(untuned(), SPEEDS, {}, ""))
    result = run("plan", "300x200", "--json", EDGE_VLM_MODEL="demo", EDGE_VLM_CONFIG=str(tmp_path))
    data = json.loads(result.stdout)
    assert data["seconds_from"] == "measured on this machine"
    assert data["seconds"]["vision"] == pytest.approx(1.5 * data["crops"])


def test_paper_and_comparison_in_words(run: Run) -> None:
    paper = run("plan", "--paper").stdout.decode()
    assert re.search(r"visual tokens, pooled +2366 +2366 +\+0.0% +1744", paper)
    assert len(json.loads(run("plan", "--paper", "--json").stdout)) == 7
    table = run("plan", "2728x2046", "-m", "jina-vlm", "--compare").stdout.decode().splitlines()
    assert len(table) == 2 + len(OTHER_MODELS)
    assert table[1].split()[:2] == ["jina-vlm", "1744"]
    data = json.loads(run("plan", "640x480", "--compare", "--json").stdout)
    assert data["size"] == [640, 480]
    assert data["models"][1]["image_tokens"] == 576


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["plan"], b"no picture"),
        (["plan", "9x9", "--vision", "fp16"], b"--model jina-vlm"),
        (["plan", "0x9"], b"at least one pixel"),
        (["plan", "9x9", "--device", "toaster"], b"raspberry-pi-5-8gb"),
        (["plan", "1x9999", "-m", "jina-vlm", "--compare"], b"200"),
    ],
)
def test_plan_refuses(run: Run, arguments: list[str], word: bytes) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert word in result.stderr
    assert b"Traceback" not in result.stderr


def test_a_plan_within_memory_and_time(run: Run) -> None:
    picture = ("plan", "2728x2046", "--model", "jina-vlm", "--vision", "int8", "--json")
    result = run(*picture, "--ram", "1.8GB")
    found = json.loads(result.stdout)
    assert found["memory"]["peak"] <= 1.8e9
    assert found["memory"]["residency"] == "in-turns"
    assert b"1800 MB: in-turns" in result.stderr
    assert_one_line(run(*picture, "--ram", "500MB"), 2, "too little by")
    given = json.loads(run(*picture, "--ram", "1.9GB", "--kv-type", "q8_0").stdout)
    assert given["kv_bytes"] < found["kv_bytes"]

    device = (*picture, "--device", "raspberry-pi-5-8gb")
    slow, fast = (json.loads(run(*device, *more).stdout) for more in ((), ("--within", "60")))
    assert slow["seconds"]["first_token"] > 60 >= fast["seconds"]["first_token"]
    assert fast["crops"] < slow["crops"]
    assert_one_line(run(*picture, "--within", "60"), 2, "edge-vlm tune")


def test_a_quantized_cache_has_a_speed_of_its_own() -> None:
    model = model_sizes()
    settings = RequestSettings(kv_type="q8_0")
    speeds = dataclasses.replace(SPEEDS, quantized_prefill_tokens_per_second=50.0)
    seconds = [
        plan.seconds.prefill
        for plan in (
            plan_request(model, *LARGEST, settings, speeds=SPEEDS),
            plan_request(model, *LARGEST, settings, speeds=speeds),
            plan_request(model, *LARGEST, speeds=speeds),
        )
        if plan.seconds
    ]
    assert seconds[1] == pytest.approx(2 * seconds[0])
    assert seconds[2] == seconds[0]

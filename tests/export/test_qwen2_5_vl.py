"""Qwen2.5-VL from a checkpoint to answers: every stage against transformers' numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from edge_vlm_export.decoder.reference import Reference
from edge_vlm_export.families.opened import Model
from edge_vlm_export.families.qwen2_5_vl.family import FAMILY
from edge_vlm_export.proof.fidelity import compare
from edge_vlm_export.samples.conversations import Sample
from edge_vlm_export.samples.prompts import PromptMaker

from edge_vlm import EdgeVLM, MachineSettings
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.pictures.image import load_image
from edge_vlm.prompt.builder import ImageSpan, TokenSpan
from edge_vlm.prompt.messages import parse_messages
from tests.answering.test_pipeline import conversation_of
from tests.conftest import GoldenCase, Run, load_golden
from tests.export.test_vision import TAPS, relative, tapped
from tests.export_helpers import check_caches, check_choices, check_schema, turn

pytestmark = pytest.mark.engine  # it exports models

NAME = "qwen2.5-vl"
MODEL = load_golden(NAME)
CASES = list(MODEL.cases.values())
SEEING = [case for case in CASES if case.images]
N_KNOWN, N_ROWS = 562, 581  # ids with a token, rows of the token table
PAGE, BADGE, COLUMN = (
    MODEL.folder / "images" / name
    for name in ("page_640x477.png", "badge_33x24_rgba.png", "column_99x505_gray.png")
)
Load = Callable[..., EdgeVLM]


@pytest.fixture(scope="module")
def load(bundle: Callable[..., Path]) -> Load:
    """``load(vision="fp32", decoder="f32", kv_type="f32")``: the golden model, loaded once."""

    @cache
    def loader(vision: str = "fp32", decoder: str = "f32", kv_type: str = "f32") -> EdgeVLM:
        settings = MachineSettings(threads=1, kv_type=kv_type, cache=None, alpha="drop")
        return EdgeVLM.load(bundle(NAME, vision, decoder), settings=settings)

    return loader


def tiles_of(case: GoldenCase) -> list[Any]:
    """The one crop of each picture."""
    processor = Model(MODEL.checkpoint).settings.image_processor
    return [FAMILY.runtime.cut(load_image(path, alpha="drop"), processor) for path in case.images]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompt_ids_and_positions_equal_the_published_ones(case: GoldenCase, load: Load) -> None:
    vlm, arrays = load(), case.arrays
    messages = parse_messages(conversation_of(case))
    prompts, processor = vlm.engine.prompts, vlm.manifest.image_processor
    assert prompts.render(messages).plain == case.data["prompt"]
    ids: list[int] = []
    at = np.zeros((0, 3), np.int32)
    for span in prompts.build(messages):
        start = at.max(initial=-1) + 1
        if isinstance(span, TokenSpan):
            ids += span.ids
            own = np.repeat(np.arange(len(span.ids))[:, None], 3, axis=1)
        else:
            assert isinstance(span, ImageSpan)
            plan = FAMILY.runtime.layout(*arrays[f"img{span.index}_size_wh"].tolist(), processor)
            ids += FAMILY.runtime.block(plan, processor, vlm.manifest.tokens).tolist()
            own = FAMILY.runtime.positions(plan, processor)
        at = np.concatenate((at, start + own))
    assert ids == arrays["input_ids"].tolist()
    np.testing.assert_array_equal(at.T, arrays["position_ids"])
    assert at.max() + 1 == arrays["next_position"]


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("case", SEEING, ids=str)
def test_features_equal_the_published_ones(
    case: GoldenCase, target: str, bundle: Callable[..., Path]
) -> None:
    session = tapped(bundle(NAME, target=target) / "vision.onnx")
    parts = [session.run(list(TAPS), tiles.feed) for tiles in tiles_of(case)]
    arrays = case.arrays
    vits, features = zip(*parts, strict=True)
    assert relative(vits[0][0, arrays["vit_row_index"]], arrays["vit_rows_first"]) < 1e-4
    total = sum(float(vit.sum(dtype=np.float64)) for vit in vits)
    scale = sum(float(np.abs(vit).sum(dtype=np.float64)) for vit in vits)
    assert abs(total - arrays["vit_sum"]) < 1e-4 * scale
    merged = np.concatenate([feature[0] for feature in features])
    assert merged.shape == tuple(arrays["image_features_shape"])
    rows = arrays["image_features_rows"]
    assert relative(merged[arrays["image_features_row_index"]], rows) < 1e-4
    squares = np.square(merged, dtype=np.float64).sum()
    assert squares == pytest.approx(float(arrays["image_features_sumsq"]), rel=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_embeddings_and_scores_equal_the_published_ones(case: GoldenCase, load: Load) -> None:
    """Greedy ids too, those of rows without a token among them: the published code gives them."""
    vlm, arrays = load(), case.arrays
    engine, family, processor = vlm.engine, FAMILY.runtime, vlm.manifest.image_processor
    tiles = tiles_of(case)
    rows = [
        family.rows(engine.tiles.encode(one)[0], engine.tiles.markers(), one.plan, processor)
        for one in tiles
    ]
    index, golden = arrays["inputs_embeds_row_index"], arrays["inputs_embeds_rows"]
    seen = 0
    with engine.decoder.context(len(arrays["input_ids"]) + 16) as context:
        for span in engine.prompts.build(parse_messages(conversation_of(case))):
            if isinstance(span, TokenSpan):
                last = context.n_positions + len(span.ids) == len(arrays["input_ids"])
                context.append_tokens(span.ids, logits=last)
                continue
            start, image = context.n_positions, rows[span.index]
            inside = (index >= start) & (index < start + len(image))
            seen += int(inside.sum())
            assert relative(image[index[inside] - start], golden[inside]) < 1e-4
            positions = family.positions(tiles[span.index].plan, processor)
            context.append_embeddings(image, positions=positions)
        assert bool(seen) is bool(case.images)
        assert context.next_position == arrays["next_position"]
        expected = arrays["logits_last"]
        assert np.abs(context.logits() - expected).max() <= 1e-3 * np.ptp(expected)
        for token in arrays["greedy_ids"].tolist():
            assert int(np.argmax(context.logits())) == token
            context.append_tokens([token], logits=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_answers_equal_the_published_ones(case: GoldenCase, load: Load) -> None:
    """Up to a row of the table without a token: these are never generated here."""
    answer = load().ask(messages=conversation_of(case), max_tokens=16)
    golden = case.data["ids_until_stop"]
    expected = list(takewhile(lambda token: token < N_KNOWN, golden))
    assert len(expected) > 5 or not case.images
    assert list(answer.token_ids)[: len(expected)] == expected
    if expected == golden:
        assert list(answer.token_ids) == golden
        assert answer.answer == case.data["text_until_stop"].strip()
    assert answer.prompt_tokens == case.data["n_input_tokens"]
    for used, one in zip(answer.images, case.data["per_image"], strict=True):
        assert used.size == (one["width"], one["height"])
        assert (used.crops, used.tiling) == (1, tuple(one["tiling"]))
        assert list(reversed(used.resized)) == one["resized_hw"]


def test_answers_from_caches_are_the_same(bundle: Callable[..., Path], tmp_path: Path) -> None:
    check_caches(bundle(NAME), PAGE, tmp_path, n_crops=1, restored=391)


def test_other_sizes_are_other_pictures(load: Load) -> None:
    """One that is reduced is not taken from the cache of the whole one."""
    vlm, square = load(), MODEL.folder / "images/square_336x336.png"
    pixels = np.tile(load_image(square), (2, 2, 1))
    whole = vlm.ask([pixels], "What?", max_tokens=2)
    less = vlm.ask([pixels], "What?", max_tiles=1, max_tokens=2)
    assert (whole.image_tokens, less.image_tokens) == (24**2, 16**2)
    assert (whole.images[0].reduced, less.images[0].reduced) == (False, True)
    assert (whole.encoded_crops, less.encoded_crops) == (1, 1)


def test_a_follow_up_costs_only_what_is_new(load: Load) -> None:
    vlm = load()
    with vlm.chat(max_tokens=4) as chat:
        chat.ask(PAGE, "What is shown here?")  # what is said to it is whole characters
        second = chat.ask(BADGE, "And what else?")
        third = chat.ask((), "Which is larger?")
        assert second.cached_tokens > 391
        assert (second.encoded_crops + second.cached_crops, third.encoded_crops) == (1, 0)
        assert third.cached_tokens > second.prompt_tokens
        said = [m.text for m in chat.messages if m.role == "assistant"]

    whole = [
        turn("What is shown here?", PAGE),
        {"role": "assistant", "content": said[0]},
        turn("And what else?", BADGE),
        {"role": "assistant", "content": said[1]},
        turn("Which is larger?"),
    ]
    assert vlm.ask(messages=whole[:3], max_tokens=4).token_ids == second.token_ids
    assert vlm.ask(messages=whole, max_tokens=4).token_ids == third.token_ids


def test_special_text_of_a_user_stays_text(load: Load) -> None:
    vlm = load()
    typed = "<|image_pad|><|vision_start|><|im_end|>"
    messages = [{"role": "user", "content": typed}]
    (span,) = vlm.engine.prompts.build(parse_messages(messages))
    assert isinstance(span, TokenSpan)
    special = [token for token in span.ids if 540 <= token < 554]
    # Those of the template alone: two messages and the answer's beginning.
    assert special == [541, 542, 541, 542, 541]
    assert vlm.ask((), typed, max_tokens=1).image_tokens == 0


def test_structured_answers(load: Load) -> None:
    vlm = load()
    check_schema(vlm, BADGE)
    check_choices(vlm, BADGE)


def test_ids_without_a_token_are_never_generated(load: Load) -> None:
    for seed in range(5):
        answer = load().ask((), "Say anything.", temperature=100.0, seed=seed, max_tokens=100)
        assert max(answer.token_ids) < N_KNOWN


@pytest.mark.parametrize(
    ("vision", "decoder"), [("fp16", "f16"), ("int8", "f16"), ("int4", "q4_k_m")]
)
def test_smaller_precisions(load: Load, vision: str, decoder: str) -> None:
    """Random weights have small gaps: full precision alone gives every id."""
    case = MODEL.cases["image_page"]
    answer = load(vision, decoder, "f16").ask(messages=conversation_of(case), max_tokens=4)
    assert len(answer.token_ids) == 4
    if vision == "fp16":
        assert list(answer.token_ids) == case.data["greedy_ids"][:4]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_gives_the_published_scores(case: GoldenCase, load: Load) -> None:
    """With a picture's vectors and three positions, or with text alone."""
    arrays, vlm = case.arrays, load()
    exact = Reference(Model(MODEL.checkpoint))
    ids = arrays["input_ids"]
    inputs = exact.embed(ids.tolist())
    if case.images:
        rows = [vlm.engine.tiles.encode(tiles)[0][0] for tiles in tiles_of(case)]
        inputs[arrays["image_positions"]] = np.concatenate(rows)
    (hidden,) = exact.run(
        [inputs],
        [np.arange(len(ids)) == len(ids) - 1],
        positions=[np.ascontiguousarray(arrays["position_ids"].T)],
    )
    expected = arrays["logits_last"][:N_KNOWN]
    assert np.abs(exact.logits(hidden)[0] - expected).max() < 1e-5 * np.ptp(expected)


def test_the_proof_places_a_picture_as_the_runtime_does(bundle: Callable[..., Path]) -> None:
    """llama.cpp and the reference agree behind a picture; with counted positions they would not."""
    folder = bundle(NAME)
    with PromptMaker(Bundle.open(folder), 1) as maker:
        prompt = maker.make(Sample(BADGE, (("What is in the picture?", None),)))
        long = maker.make(Sample(COLUMN, (("What?", "A column."), ("Which?", "That one."))))
    case = MODEL.cases["image_badge_rgba"].arrays
    assert prompt.positions is not None
    np.testing.assert_array_equal(prompt.positions.T, case["position_ids"])
    assert long.positions is not None
    assert long.positions.shape == (len(long.ids), 3)
    model, prompts = Model(MODEL.checkpoint), [prompt, long]
    found = compare(folder / "decoder.gguf", model, prompts, threads=1)
    assert found.divergence.max() < 1e-4  # the KV cache is f16
    assert found.same_top.all()
    counted = [replace(one, positions=None) for one in prompts]
    apart = compare(folder / "decoder.gguf", model, counted, threads=1)
    assert apart.divergence.max() > 1e-2


def test_the_gguf_is_what_llama_cpp_asks_for(bundle: Callable[..., Path]) -> None:
    """Two equal names would end the whole process in llama.cpp."""
    fields = gguf.GGUFReader(bundle(NAME) / "decoder.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(set(tokens)) == len(tokens) == N_ROWS
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["general.architecture"].contents() == "qwen2vl"
    assert fields["qwen2vl.rope.dimension_sections"].contents() == [4, 6, 6, 0]


def test_from_a_folder_to_an_answer(run: Run, tmp_path: Path) -> None:
    """Quantized, calibrated, measured and proven, as a user would do it."""
    out, samples = tmp_path / "bundle", tmp_path / "samples"
    samples.mkdir()
    for picture in (PAGE, COLUMN):
        shutil.copy(picture, samples)
    exported = run(
        *("export", MODEL.checkpoint, "--out", out, "--name", "tiny", "--calibrate", samples)
    )
    assert exported.returncode == 0, exported.stderr.decode()
    report = Bundle.open(out).manifest.report
    assert report is not None
    assert report.vision is not None
    assert report.vision.cosine_mean > 0.99
    assert report.decoder is not None
    assert report.decoder.divergence_mean < report.decoder.max_divergence
    asked = run("ask", PAGE, "What?", "--model", out, "--max-tokens", "4", "--json")
    assert asked.returncode == 0, asked.stderr.decode()
    answer = json.loads(asked.stdout)
    assert (answer["image_tokens"], answer["encoded_crops"]) == (391, 1)
    for command in (("verify", out), ("info", out), ("plan", PAGE, "--model", out)):
        done = run(*command)
        assert done.returncode == 0, done.stderr.decode()
    said = run("chat", "--model", out, "--max-tokens", "2", stdin=f"/image {BADGE}\nHi\n".encode())
    assert said.returncode == 0, said.stderr.decode()

"""Pixtral from a checkpoint to answers: every stage against transformers' numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from edge_vlm_export.decoder.reference import Reference
from edge_vlm_export.families.opened import Model
from edge_vlm_export.families.pixtral.family import FAMILY
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

NAME = "pixtral"
MODEL = load_golden(NAME)
CASES = list(MODEL.cases.values())
SEEING = [case for case in CASES if case.images]
SCENE, BADGE, TALL, EXACT = (
    MODEL.folder / "images" / name
    for name in (
        *("scene_520x333.png", "badge_17x15_rgba.png", "tall_97x311_gray.png"),
        "exact_64x32.png",
    )
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
def test_prompt_ids_equal_the_published_ones(case: GoldenCase, load: Load) -> None:
    vlm, arrays = load(), case.arrays
    messages = parse_messages(conversation_of(case))
    prompts, processor = vlm.engine.prompts, vlm.manifest.image_processor
    assert prompts.render(messages).plain == case.data["prompt"]
    ids: list[int] = []
    for span in prompts.build(messages):
        if isinstance(span, TokenSpan):
            ids += span.ids
        else:
            assert isinstance(span, ImageSpan)
            assert len(ids) == arrays[f"img{span.index}_start"]
            plan = FAMILY.runtime.layout(*arrays[f"img{span.index}_size_wh"].tolist(), processor)
            assert FAMILY.runtime.positions(plan, processor) is None  # one a row, as for text
            ids += FAMILY.runtime.block(plan, processor, vlm.manifest.tokens).tolist()
    assert ids == arrays["input_ids"].tolist()


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("case", SEEING, ids=str)
def test_features_equal_the_published_ones(
    case: GoldenCase, target: str, bundle: Callable[..., Path]
) -> None:
    session = tapped(bundle(NAME, target=target) / "vision.onnx")
    parts = [session.run(list(TAPS), tiles.feed) for tiles in tiles_of(case)]
    arrays = case.arrays
    vits, features = (
        np.concatenate([rows[0] for rows in part]) for part in zip(*parts, strict=True)
    )
    for which in ("first", "last"):  # crop of one: all pictures, one after the other
        assert relative(vits[arrays["vit_row_index"]], arrays[f"vit_rows_{which}"]) < 1e-4
    total, scale = vits.sum(dtype=np.float64), np.abs(vits).sum(dtype=np.float64)
    assert abs(total - arrays["vit_sum"].sum()) < 1e-4 * scale
    assert features.shape == tuple(arrays["image_features_shape"][-2:])
    rows = arrays["image_features_rows"]
    assert relative(features[arrays["image_features_row_index"]], rows) < 1e-4
    squares = np.square(features, dtype=np.float64).sum()
    assert squares == pytest.approx(float(arrays["image_features_sumsq"].sum()), rel=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_embeddings_and_scores_equal_the_published_ones(case: GoldenCase, load: Load) -> None:
    vlm, arrays = load(), case.arrays
    engine, family, processor = vlm.engine, FAMILY.runtime, vlm.manifest.image_processor
    rows = [
        family.rows(engine.tiles.encode(one)[0], engine.tiles.markers(), one.plan, processor)
        for one in tiles_of(case)
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
            if inside.any():  # a small picture may have none of these rows
                seen += int(inside.sum())
                assert relative(image[index[inside] - start], golden[inside]) < 1e-4
            packed = arrays[f"img{span.index}_packed_rows"]
            own = image[arrays[f"img{span.index}_tokens"] == 10]
            assert relative(own[arrays[f"img{span.index}_packed_row_index"]], packed) < 1e-4
            context.append_embeddings(image)
        assert bool(seen) is bool(case.images)
        expected = arrays["logits_last"]
        assert np.abs(context.logits() - expected).max() <= 1e-3 * np.ptp(expected)
        for token in arrays["greedy_ids"].tolist():
            assert int(np.argmax(context.logits())) == token
            context.append_tokens([token], logits=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_answers_equal_the_published_ones(case: GoldenCase, load: Load) -> None:
    answer = load().ask(messages=conversation_of(case), max_tokens=16, loop_guard=False)
    assert list(answer.token_ids) == case.data["ids_until_stop"]
    assert answer.answer == case.data["text_until_stop"].strip()
    assert answer.prompt_tokens == case.data["n_input_tokens"]
    for used, one in zip(answer.images, case.data["per_image"], strict=True):
        assert used.size == (one["width"], one["height"])
        assert (used.crops, used.tiling) == (1, tuple(one["patches_hw"]))
        assert list(reversed(used.resized)) == one["resized_hw"]


def test_answers_from_caches_are_the_same(bundle: Callable[..., Path], tmp_path: Path) -> None:
    check_caches(bundle(NAME), TALL, tmp_path, n_crops=1, restored=160)


def test_other_sizes_are_other_pictures(load: Load) -> None:
    """Neither one that is reduced, nor one whose patches lie otherwise, comes from the cache."""
    vlm = load()
    pixels = np.full((320, 512, 3), 77, np.uint8)
    whole = vlm.ask([pixels], "What?", max_tokens=2)
    less = vlm.ask([pixels], "What?", max_tiles=1, max_tokens=2)
    turned = vlm.ask([pixels.swapaxes(0, 1)], "What?", max_tokens=2)
    assert (whole.image_tokens, turned.image_tokens) == (20 * 33, 32 * 21)
    assert less.image_tokens < 256 + 20
    assert (whole.images[0].reduced, less.images[0].reduced) == (False, True)
    assert [answer.encoded_crops for answer in (whole, less, turned)] == [1, 1, 1]


def test_a_follow_up_costs_only_what_is_new(load: Load) -> None:
    vlm = load()
    with vlm.chat(max_tokens=4) as chat:
        chat.ask(TALL, "What is shown here?")
        second = chat.ask(BADGE, "And what else?")
        third = chat.ask((), "Which is larger?")
        assert second.cached_tokens > 160
        assert (second.encoded_crops + second.cached_crops, third.encoded_crops) == (1, 0)
        assert third.cached_tokens > 160
        said = [m.text for m in chat.messages if m.role == "assistant"]

    whole = [
        turn("What is shown here?", TALL),
        {"role": "assistant", "content": said[0]},
        turn("And what else?", BADGE),
        {"role": "assistant", "content": said[1]},
        turn("Which is larger?"),
    ]
    assert vlm.ask(messages=whole[:3], max_tokens=4).token_ids == second.token_ids
    assert vlm.ask(messages=whole, max_tokens=4).token_ids == third.token_ids


def test_what_the_template_is_given(load: Load) -> None:
    """A system message stands in the last question; text and pictures come in their order."""
    picture = {"type": "image_url", "image_url": {"url": str(EXACT)}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "First"}, picture]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
    rendered = load().engine.prompts.render(parse_messages(messages))
    assert rendered.plain == ("<s>[INST]First[IMG][/INST]Yes.</s>[INST]Be brief.\n\nWhy?[/INST]")
    spans = load().engine.prompts.build(parse_messages(messages))
    assert [isinstance(span, ImageSpan) for span in spans] == [False, True, False]
    assert spans[0].ids[:2] == (1, 3)
    assert spans[2].ids[0] == 4
    assert 2 in spans[2].ids


def test_special_text_of_a_user_stays_text(load: Load) -> None:
    vlm = load()
    typed = "[IMG][IMG_BREAK]</s><s>[/INST][INST]"
    messages = [{"role": "user", "content": typed}]
    (span,) = vlm.engine.prompts.build(parse_messages(messages))
    assert isinstance(span, TokenSpan)
    assert [token for token in span.ids if token < 32] == [1, 3, 4]  # the template's
    assert vlm.ask((), typed, max_tokens=1).image_tokens == 0


def test_structured_answers(load: Load) -> None:
    vlm = load()
    check_schema(vlm, BADGE)
    check_choices(vlm, BADGE)


def test_parts_of_a_picture_are_never_said(load: Load) -> None:
    """All other special tokens could be: every id is about as likely."""
    said: set[int] = set()
    chance = {"temperature": 100.0, "top_p": 1.0, "min_p": 0.0, "loop_guard": False}
    for seed in range(30):
        answer = load().ask((), "Say anything.", seed=seed, max_tokens=200, **chance)
        said.update(answer.token_ids)
    assert set(range(32)) - said == {2, 10, 12, 13}  # 2 ends an answer


@pytest.mark.parametrize(
    ("vision", "decoder"), [("fp16", "f16"), ("int8", "f16"), ("int4", "q4_k_m")]
)
def test_smaller_precisions(load: Load, vision: str, decoder: str) -> None:
    """Random weights have small gaps: full precision alone gives every id."""
    case = MODEL.cases["image_scene"]
    answer = load(vision, decoder, "f16").ask(messages=conversation_of(case), max_tokens=4)
    assert len(answer.token_ids) == 4
    if vision == "fp16":
        assert list(answer.token_ids) == case.data["greedy_ids"][:4]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_gives_the_published_scores(case: GoldenCase, load: Load) -> None:
    """With a picture's rows, or with text alone."""
    arrays, vlm = case.arrays, load()
    exact = Reference(Model(MODEL.checkpoint))
    ids = arrays["input_ids"]
    inputs = exact.embed(ids.tolist())
    for index, tiles in enumerate(tiles_of(case)):
        encoded, ends = vlm.engine.tiles.encode(tiles)[0], vlm.engine.tiles.markers()
        rows = FAMILY.runtime.rows(encoded, ends, tiles.plan, vlm.manifest.image_processor)
        start = arrays[f"img{index}_start"]
        inputs[start : start + len(rows)] = rows
    (hidden,) = exact.run([inputs], [np.arange(len(ids)) == len(ids) - 1])
    expected = arrays["logits_last"]
    assert np.abs(exact.logits(hidden)[0] - expected).max() < 1e-4 * np.ptp(expected)


def test_the_proof_sees_what_the_runtime_does(bundle: Callable[..., Path]) -> None:
    folder = bundle(NAME)
    with PromptMaker(Bundle.open(folder), 1) as maker:
        prompt = maker.make(Sample(EXACT, (("What is in the picture?", None),)))
        long = maker.make(Sample(TALL, (("What?", "A column."), ("Which?", "That one."))))
    assert prompt.positions is None
    found = compare(folder / "decoder.gguf", Model(MODEL.checkpoint), [prompt, long], threads=1)
    assert found.divergence.max() < 1e-4  # the KV cache is f16
    assert found.same_top.all()


def test_the_gguf_is_what_llama_cpp_asks_for(bundle: Callable[..., Path]) -> None:
    fields = gguf.GGUFReader(bundle(NAME) / "decoder.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(set(tokens)) == len(tokens) == 704
    told = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "pixtral",
        "tokenizer.ggml.add_bos_token": False,  # the template writes it
        "tokenizer.ggml.eos_token_id": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 1e9,
    }
    assert {key: fields[key].contents() for key in told} == told
    assert fields["tokenizer.ggml.token_type"].contents()[:32] == [3] * 32


def test_from_a_folder_to_an_answer(run: Run, tmp_path: Path) -> None:
    """Quantized, calibrated, measured and proven, as a user would do it."""
    out, samples = tmp_path / "bundle", tmp_path / "samples"
    samples.mkdir()
    for picture in (SCENE, TALL):
        shutil.copy(picture, samples)
    export = ("export", MODEL.checkpoint, "--out", out, "--name", "tiny", "--calibrate", samples)
    # Two layers of random weights are worth more than four bits, which is found out.
    failed = run(*export)
    assert failed.returncode == 1
    assert b"divergence" in failed.stderr.splitlines()[-1]
    assert b"--allow-loss" in failed.stderr.splitlines()[-1]
    assert not out.exists()
    exported = run(*export, "--decoder", "q8_0")
    assert exported.returncode == 0, exported.stderr.decode()
    assert b"of 18 matrix products" in exported.stderr  # what int8 was not enough for
    report = Bundle.open(out).manifest.report
    assert report is not None
    assert report.vision is not None
    assert report.vision.cosine_mean > 0.99
    assert report.decoder is not None
    assert report.decoder.divergence_mean < report.decoder.max_divergence
    asked = run("ask", SCENE, "What?", "--model", out, "--max-tokens", "4", "--json")
    assert asked.returncode == 0, asked.stderr.decode()
    answer = json.loads(asked.stdout)
    assert (answer["image_tokens"], answer["encoded_crops"]) == (714, 1)
    for command in (("verify", out), ("info", out), ("plan", SCENE, "--model", out)):
        done = run(*command)
        assert done.returncode == 0, done.stderr.decode()
    said = run("chat", "--model", out, "--max-tokens", "2", stdin=f"/image {BADGE}\nHi\n".encode())
    assert said.returncode == 0, said.stderr.decode()

"""LLaVA-OneVision from a checkpoint to answers: every stage against transformers' numbers."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from edge_vlm_export.decoder.reference import Reference
from edge_vlm_export.families.llava_onevision.family import FAMILY
from edge_vlm_export.families.opened import Model

from edge_vlm import EdgeVLM, ImageError, MachineSettings
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.prompt.builder import ImageSpan, TokenSpan
from edge_vlm.prompt.messages import parse_messages
from tests.answering.test_pipeline import conversation_of
from tests.conftest import GoldenCase, Run, load_golden
from tests.export.test_vision import TAPS, relative, tapped
from tests.export_helpers import check_caches, check_choices, check_schema

pytestmark = pytest.mark.engine  # it exports models

NAME = "llava-onevision"
MODEL = load_golden(NAME)
# "two_image_flat" is the way that this project does not take.
CASES = [case for case in MODEL.cases.values() if case.name != "two_image_flat"]
SCENE, TALL, BADGE = (
    MODEL.folder / "images" / name
    for name in ("scene_600x401.png", "tall_205x901_gray.png", "badge_64x48_rgba.png")
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


def crops_of(vlm: EdgeVLM, case: GoldenCase) -> list[Any]:
    """The crops of each picture."""
    from edge_vlm.pictures.image import load_image

    processor = FAMILY.runtime.beside(vlm.manifest.image_processor, len(case.images))
    return [FAMILY.runtime.cut(load_image(path, alpha="drop"), processor) for path in case.images]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompt_ids_equal_the_published_ones(case: GoldenCase, load: Load) -> None:
    vlm = load()
    messages = parse_messages(conversation_of(case))
    prompts = vlm.engine.prompts
    assert prompts.render(messages).plain == case.data["prompt"]
    processor = FAMILY.runtime.beside(vlm.manifest.image_processor, len(case.images))
    ids: list[int] = []
    for span in prompts.build(messages):
        if isinstance(span, TokenSpan):
            ids += span.ids
        else:
            assert isinstance(span, ImageSpan)
            size = case.arrays[f"img{span.index}_size_wh"].tolist()
            plan = FAMILY.runtime.layout(*size, processor)
            block = FAMILY.runtime.block(plan, processor, vlm.manifest.tokens)
            np.testing.assert_array_equal(block, case.arrays[f"img{span.index}_tokens"])
            ids += block.tolist()
    assert ids == case.arrays["input_ids"].tolist()


@pytest.mark.parametrize("case", [c for c in CASES if c.images], ids=str)
def test_features_equal_the_published_ones(
    case: GoldenCase, load: Load, bundle: Callable[..., Path]
) -> None:
    session = tapped(bundle(NAME) / "vision.onnx")
    tiles = crops_of(load(), case)
    crops = np.concatenate([one.crops for one in tiles])
    parts = [session.run(list(TAPS), {"crops": crops[i : i + 4]}) for i in range(0, len(crops), 4)]
    arrays, rows = case.arrays, case.arrays["vit_row_index"]
    vit, features = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert relative(vit[0][rows], arrays["vit_rows_first"]) < 1e-4
    assert relative(vit[-1][rows], arrays["vit_rows_last"]) < 1e-4
    for values, key in ((vit, "vit"), (features, "image_features")):
        scale = np.abs(values).sum(axis=(1, 2)).max()
        sums = values.sum(axis=(1, 2), dtype=np.float64)
        assert np.abs(sums - arrays[f"{key}_sum"]).max() < 1e-4 * scale
        squares = np.square(values, dtype=np.float64).sum(axis=(1, 2))
        np.testing.assert_allclose(squares, arrays[f"{key}_sumsq"], rtol=1e-4)
    assert features.shape == tuple(arrays["image_features_shape"])
    flat = features.reshape(-1, features.shape[-1])
    assert relative(flat[arrays["image_features_row_index"]], arrays["image_features_rows"]) < 1e-4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_embeddings_and_scores_equal_the_published_ones(case: GoldenCase, load: Load) -> None:
    vlm, arrays = load(), case.arrays
    engine, family = vlm.engine, FAMILY.runtime
    processor = family.beside(vlm.manifest.image_processor, len(case.images))
    rows = []
    for index, tiles in enumerate(crops_of(vlm, case)):
        embeddings, _ = engine.tiles.encode(tiles)
        packed = family.rows(embeddings, engine.tiles.markers(), tiles.plan, processor)
        assert packed.shape == tuple(arrays[f"img{index}_packed_shape"])
        golden = arrays[f"img{index}_packed_rows"]
        assert relative(packed[arrays[f"img{index}_packed_row_index"]], golden) < 1e-4
        assert np.square(packed, dtype=np.float64).sum() == pytest.approx(
            arrays[f"img{index}_packed_sumsq"], rel=1e-4
        )
        rows.append(packed)
    index, golden = arrays["inputs_embeds_row_index"], arrays["inputs_embeds_rows"]
    with engine.decoder.context(len(arrays["input_ids"]) + 16) as context:
        for span in engine.prompts.build(parse_messages(conversation_of(case))):
            if isinstance(span, TokenSpan):
                last = context.n_positions + len(span.ids) == len(arrays["input_ids"])
                context.append_tokens(span.ids, logits=last)
                continue
            start, image = context.n_positions, rows[span.index]
            inside = (index >= start) & (index < start + len(image))
            assert inside.any()
            assert relative(image[index[inside] - start], golden[inside]) < 1e-4
            context.append_embeddings(image)
        expected = arrays["logits_last"]
        assert np.abs(context.logits() - expected).max() <= 1e-3 * np.ptp(expected)
        for token in arrays["greedy_ids"].tolist():
            assert int(np.argmax(context.logits())) == token
            context.append_tokens([token], logits=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_answers_equal_the_published_ones(case: GoldenCase, load: Load) -> None:
    answer = load().ask(messages=conversation_of(case), max_tokens=16)
    assert list(answer.token_ids) == case.data["ids_until_stop"]
    assert answer.answer == case.data["text_until_stop"].strip()
    assert answer.prompt_tokens == case.data["n_input_tokens"]
    assert [used.crops for used in answer.images] == [
        golden["n_crops"] for golden in case.data["per_image"]
    ]
    for used, golden in zip(answer.images, case.data["per_image"], strict=True):
        assert used.size == (golden["width"], golden["height"])
        if golden["tiling"]:
            assert (*used.tiling, *reversed(used.resized)) == (
                *golden["tiling"],
                *golden["resized_hw"],
            )


def test_answers_from_caches_are_the_same(bundle: Callable[..., Path], tmp_path: Path) -> None:
    check_caches(bundle(NAME), BADGE, tmp_path, n_crops=2, restored=1317)


def test_a_follow_up_costs_only_what_is_new(load: Load) -> None:
    vlm = load()
    with vlm.chat(max_tokens=4) as chat:
        first = chat.ask(BADGE, "What is this?")
        second = chat.ask((), "And what else?")
        assert second.encoded_crops == 0
        assert second.cached_tokens > 1317
        said = next(m for m in chat.messages if m.role == "assistant").text
    whole = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": str(BADGE)}},
                {"type": "text", "text": "What is this?"},
            ],
        },
        {"role": "assistant", "content": said},
        {"role": "user", "content": "And what else?"},
    ]
    assert vlm.ask(messages=whole, max_tokens=4).token_ids == second.token_ids
    assert first.images[0].crops == 2


def test_a_second_picture_changes_how_the_first_is_seen(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    case = MODEL.cases["two_image"]
    vlm = load()
    with vlm.chat(max_tokens=16) as chat:
        alone = chat.ask(SCENE, "What is here?", max_tokens=2)
        assert alone.image_tokens == 2709
        with caplog.at_level(logging.WARNING, "edge_vlm"):
            both = chat.ask(TALL, "What does the second add?", max_tokens=4)
            assert len(caplog.records) == 1
            third = chat.ask((), "Why?", max_tokens=2)
            assert len(caplog.records) == 1
        assert (both.image_tokens, both.encoded_crops + both.cached_crops) == (2 * 730, 2)
        assert both.cached_tokens < 10
        assert third.cached_tokens > 2 * 730
        messages = chat.messages
        # Taken back, the first picture is what it was before.
        chat.undo()
        chat.undo()
        back = chat.ask((), "And now?", max_tokens=2)
        assert back.image_tokens == 2709
    said = [message.text for message in messages if message.role == "assistant"]
    whole = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": str(SCENE)}},
                {"type": "text", "text": "What is here?"},
            ],
        },
        {"role": "assistant", "content": said[0]},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": str(TALL)}},
                {"type": "text", "text": "What does the second add?"},
            ],
        },
    ]
    assert vlm.ask(messages=whole, max_tokens=4).token_ids == both.token_ids
    # One question with both pictures is the golden case.
    together = vlm.ask([SCENE, TALL], "What does the second add?", max_tokens=16)
    assert list(together.token_ids) == case.data["ids_until_stop"]
    assert together.cached_crops == 2


def test_an_encoded_picture_is_for_a_conversation_of_its_own(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    vlm = load()
    encoded = vlm.encode(BADGE, max_tiles=1)
    with vlm.chat(max_tokens=2) as chat:
        chat.ask(encoded, "What is this?")
        assert chat.ask((), "Really?").cached_tokens > 1317
        assert not caplog.records  # it is what it was
        with pytest.raises(ImageError, match="give the picture itself"):
            chat.ask(TALL, "And this?")
        assert len(chat.messages) == 4
    with pytest.raises(ImageError, match="give the picture itself"):
        vlm.ask([encoded, TALL], "Which?")


def test_structured_answers(load: Load) -> None:
    vlm = load()
    check_schema(vlm, BADGE)
    check_choices(vlm, BADGE)


def test_fewer_tiles(load: Load) -> None:
    answer = load().ask(SCENE, "What?", max_tiles=2, max_tokens=1)
    assert answer.images[0].crops <= 3
    assert answer.images[0].reduced


def test_ids_without_a_meaning_are_never_generated(load: Load) -> None:
    for seed in range(5):
        answer = load().ask((), "Say anything.", temperature=100.0, seed=seed, max_tokens=100)
        assert max(answer.token_ids) < 603


@pytest.mark.parametrize(("vision", "decoder"), [("fp16", "f16"), ("int4", "q4_k_m")])
def test_smaller_precisions(load: Load, vision: str, decoder: str) -> None:
    """Random weights have small gaps: full precision alone gives every id."""
    case = MODEL.cases["image_badge"]
    answer = load(vision, decoder, "f16").ask(messages=conversation_of(case), max_tokens=4)
    assert len(answer.token_ids) == 4
    if decoder == "f16":
        assert list(answer.token_ids) == case.data["greedy_ids"][:4]


def test_the_reference_gives_the_published_scores() -> None:
    arrays = MODEL.cases["text_only"].arrays
    exact = Reference(Model(MODEL.checkpoint))
    ids = arrays["input_ids"]
    (hidden,) = exact.run([exact.embed(ids.tolist())], [np.arange(len(ids)) == len(ids) - 1])
    expected = arrays["logits_last"][:603]
    assert np.abs(exact.logits(hidden)[0] - expected).max() < 1e-5 * np.ptp(expected)


def test_rows_without_a_token_get_names_of_their_own(bundle: Callable[..., Path]) -> None:
    """Two equal names would end the whole process in llama.cpp."""
    fields = gguf.GGUFReader(bundle(NAME) / "decoder.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(set(tokens)) == len(tokens) == 704
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert "tokenizer.ggml.bos_token_id" not in fields


def test_from_a_folder_to_an_answer(run: Run, tmp_path: Path) -> None:
    """Quantized, calibrated, measured and proven, as a user would do it."""
    out, samples = tmp_path / "bundle", tmp_path / "samples"
    samples.mkdir()
    for picture in (BADGE, MODEL.folder / "images" / "exact_384x384.png"):
        shutil.copy(picture, samples)
    exported = run(
        *("export", MODEL.checkpoint, "--out", out, "--name", "tiny"),
        *("--decoder", "q8_0", "--calibrate", samples),
    )
    assert exported.returncode == 0, exported.stderr.decode()
    report = Bundle.open(out).manifest.report
    assert report is not None
    assert report.vision is not None
    assert report.vision.cosine_mean > 0.99
    assert report.decoder is not None
    assert report.decoder.divergence_mean < 0.05
    asked = run("ask", BADGE, "What?", "--model", out, "--max-tokens", "4", "--json")
    assert asked.returncode == 0, asked.stderr.decode()
    answer = json.loads(asked.stdout)
    assert (answer["image_tokens"], answer["encoded_crops"]) == (1317, 2)
    verified = run("verify", out)
    assert verified.returncode == 0, verified.stderr.decode()
    said = run("chat", "--model", out, "--max-tokens", "2", stdin=f"/image {BADGE}\nHi\n".encode())
    assert said.returncode == 0, said.stderr.decode()

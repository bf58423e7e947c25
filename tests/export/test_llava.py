"""LLaVA-1.5 and LLaVA-NeXT from a checkpoint to answers: every stage against transformers."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from edge_vlm_export.decoder.reference import Reference
from edge_vlm_export.families.opened import Model

from edge_vlm import EdgeVLM, MachineSettings
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.families.base import find_family
from edge_vlm.pictures.image import load_image
from edge_vlm.prompt.builder import ImageSpan, TokenSpan, rest_of
from edge_vlm.prompt.messages import parse_messages
from tests.answering.test_pipeline import conversation_of
from tests.conftest import GoldenCase, Run, load_golden
from tests.export.test_vision import TAPS, relative, tapped
from tests.export_helpers import check_caches, check_choices, check_schema

pytestmark = pytest.mark.engine  # it exports models

MODELS = {name: load_golden(name) for name in ("llava-1.5", "llava-next")}
CASES = [case for model in MODELS.values() for case in model.cases.values()]
WITH_PICTURES = [case for case in CASES if case.images]
BADGE = {
    "llava-1.5": MODELS["llava-1.5"].folder / "images" / "badge_90x64_rgba.png",
    "llava-next": MODELS["llava-next"].folder / "images" / "badge_64x48_rgba.png",
}
# What is said to these is text: random weights often say bytes that are none.
QUESTION = {"llava-1.5": "What is red?", "llava-next": "Where is the circle?"}
N_TOKENS = {"llava-1.5": 576, "llava-next": 1368}  # of the badge
N_SPOKEN = 560  # ids that an answer may have
each = pytest.mark.parametrize("name", MODELS)
Load = Callable[..., EdgeVLM]


@pytest.fixture(scope="module")
def load(bundle: Callable[..., Path]) -> Load:
    """``load(name, vision="fp32", decoder="f32", kv_type="f32")``, each loaded once."""

    @cache
    def loader(
        name: str, vision: str = "fp32", decoder: str = "f32", kv_type: str = "f32"
    ) -> EdgeVLM:
        settings = MachineSettings(threads=1, kv_type=kv_type, cache=None, alpha="drop")
        return EdgeVLM.load(bundle(name, vision, decoder), settings=settings)

    return loader


def crops_of(vlm: EdgeVLM, case: GoldenCase) -> list[Any]:
    """The crops of each picture."""
    family = find_family(case.model)
    return [
        family.cut(load_image(path, alpha="drop"), vlm.manifest.image_processor)
        for path in case.images
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompt_ids_equal_the_published_ones(case: GoldenCase, load: Load) -> None:
    vlm = load(case.model)
    family, processor = find_family(case.model), vlm.manifest.image_processor
    messages = parse_messages(conversation_of(case))
    prompts = vlm.engine.prompts
    assert prompts.render(messages).plain == case.data["prompt"]
    ids: list[int] = []
    for span in prompts.build(messages):
        if isinstance(span, TokenSpan):
            ids += span.ids
        else:
            assert isinstance(span, ImageSpan)
            assert len(ids) == case.arrays[f"img{span.index}_start"]
            size = case.arrays[f"img{span.index}_size_wh"].tolist()
            plan = family.layout(*size, processor)
            block = family.block(plan, processor, vlm.manifest.tokens)
            np.testing.assert_array_equal(block, case.arrays[f"img{span.index}_tokens"])
            ids += block.tolist()
    assert ids == case.arrays["input_ids"].tolist()


@pytest.mark.parametrize(
    ("case", "target"),
    [(case, "cpu") for case in WITH_PICTURES]
    + [(model.cases["image_badge"], "portable") for model in MODELS.values()],
    ids=str,
)
def test_features_equal_the_published_ones(
    case: GoldenCase, target: str, load: Load, bundle: Callable[..., Path]
) -> None:
    session = tapped(bundle(case.model, target=target) / "vision.onnx")
    crops = np.concatenate([one.crops for one in crops_of(load(case.model), case)])
    parts = [session.run(list(TAPS), {"crops": crops[i : i + 2]}) for i in range(0, len(crops), 2)]
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
    vlm, arrays = load(case.model), case.arrays
    engine, family = vlm.engine, find_family(case.model)
    rows = []
    for index, tiles in enumerate(crops_of(vlm, case)):
        embeddings, _ = engine.tiles.encode(tiles)
        processor = vlm.manifest.image_processor
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


def as_published(piece: Callable[[int], bytes], ids: Sequence[int]) -> str:
    """The tokenizers library gives up a whole run of bytes that is no UTF-8, not a part of it."""
    text = ""
    for is_byte, run in groupby(ids, lambda token: 3 <= token < 259):
        data = b"".join(map(piece, run))
        try:
            text += data.decode()
        except UnicodeDecodeError:
            assert is_byte
            text += "\ufffd" * len(data)
    return text.removeprefix(" ")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_answers_equal_the_published_ones(case: GoldenCase, load: Load) -> None:
    answer = load(case.model).ask(messages=conversation_of(case), max_tokens=16)
    assert list(answer.token_ids) == case.data["ids_until_stop"]
    pieces = load(case.model).engine.decoder.piece
    assert (
        answer.answer == b"".join(map(pieces, answer.token_ids)).decode("utf-8", "replace").strip()
    )
    assert as_published(pieces, answer.token_ids) == case.data["text_until_stop"]
    assert answer.prompt_tokens == case.data["n_input_tokens"]
    for used, golden in zip(answer.images, case.data["per_image"], strict=True):
        assert used.size == (golden["width"], golden["height"])
        assert used.crops == golden["n_crops"]
        assert list(used.tiling) == golden.get("tiling", [1, 1])
        assert list(reversed(used.resized)) == golden["resized_hw"]


@each
def test_answers_from_caches_are_the_same(
    name: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    (badge,) = MODELS[name].cases["image_badge"].data["per_image"]
    n_crops, restored = badge["n_crops"], N_TOKENS[name]
    check_caches(bundle(name), BADGE[name], tmp_path, n_crops=n_crops, restored=restored)


@each
def test_a_follow_up_costs_only_what_is_new(name: str, load: Load) -> None:
    vlm, question = load(name), QUESTION[name]
    with vlm.chat(max_tokens=3) as chat:
        first = chat.ask(BADGE[name], question)
        second = chat.ask((), "And what else?")
        assert second.encoded_crops == 0
        assert second.cached_tokens > N_TOKENS[name]
        said = next(m for m in chat.messages if m.role == "assistant").text
    assert "\ufffd" not in said  # its bytes would be other tokens
    whole = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": str(BADGE[name])}},
                {"type": "text", "text": question},
            ],
        },
        {"role": "assistant", "content": said},
        {"role": "user", "content": "And what else?"},
    ]
    assert first.answer == said.strip()
    assert vlm.ask(messages=whole, max_tokens=3).token_ids == second.token_ids


@each
def test_what_follows_a_cached_answer_has_the_published_ids(name: str, load: Load) -> None:
    """No space of the tokenizer's stands inside a text: the first turn's end is in its middle."""
    case, prompts = MODELS[name].cases["two_turn"], load(name).engine.prompts
    rendered = prompts.render(parse_messages(conversation_of(case)))
    end = rendered.plain.index("think.") + len("think.")
    (rest,) = prompts.spans(rest_of(rendered, end), first=False)
    assert isinstance(rest, TokenSpan)
    assert len(rest.ids) > 10
    assert case.arrays["input_ids"].tolist()[-len(rest.ids) :] == list(rest.ids)


@each
def test_a_second_picture_leaves_the_first_as_it_is(
    name: str, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    vlm, case = load(name), MODELS[name].cases["two_image"]
    first, second = case.images
    with vlm.chat(max_tokens=2) as chat, caplog.at_level(logging.WARNING, "edge_vlm"):
        alone = chat.ask(first, "What is here?")
        both = chat.ask(second, "And here?")
        assert both.cached_tokens > alone.image_tokens
        assert not caplog.records
    together = vlm.ask([first, second], "What does the second add?", max_tokens=16)
    assert list(together.token_ids) == case.data["ids_until_stop"]


@each
def test_text_that_spells_a_special_token_stays_text(name: str, load: Load) -> None:
    vlm = load(name)
    special = set(vlm.manifest.tokens.special.values())
    typed = "a <image> b</s> <s><unk> <0x41>[PAD570]"
    messages = parse_messages([{"role": "user", "content": typed}])
    (span,) = vlm.engine.prompts.build(messages)
    assert isinstance(span, TokenSpan)
    assert span.ids[0] == 1
    assert not special & set(span.ids[1:])
    assert max(span.ids) < N_SPOKEN
    said = b"".join(map(vlm.engine.decoder.piece, span.ids)).decode()
    assert typed in said


@each
def test_structured_answers(name: str, load: Load) -> None:
    vlm = load(name)
    check_schema(vlm, BADGE[name])
    chosen = check_choices(vlm, BADGE[name])
    # The ids of a choice are those of the text, with one space in front.
    text = b"".join(map(vlm.engine.decoder.piece, chosen.token_ids)).decode()
    assert text == f" {chosen.answer}"
    assert len(chosen.token_ids) < len(text.encode()) + 1


def test_fewer_tiles(load: Load) -> None:
    photo = MODELS["llava-next"].folder / "images" / "photo_1100x808.png"
    answer = load("llava-next").ask(photo, "What?", max_tiles=2, max_tokens=1)
    assert answer.images[0].crops == 3
    assert answer.images[0].reduced


@each
def test_ids_without_a_meaning_are_never_generated(name: str, load: Load) -> None:
    for seed in range(5):
        answer = load(name).ask((), "Say it.", temperature=100.0, seed=seed, max_tokens=100)
        assert max(answer.token_ids) < N_SPOKEN


@pytest.mark.parametrize(
    ("name", "vision", "decoder"),
    [("llava-1.5", "fp16", "f16"), ("llava-next", "int4", "q4_k_m")],
)
def test_smaller_precisions(name: str, load: Load, vision: str, decoder: str) -> None:
    """Random weights have small gaps: full precision alone gives every id."""
    case = MODELS[name].cases["image_exact"]
    answer = load(name, vision, decoder, "f16").ask(messages=conversation_of(case), max_tokens=4)
    assert len(answer.token_ids) == 4
    if decoder == "f16":
        assert list(answer.token_ids) == case.data["greedy_ids"][:4]


@each
def test_the_reference_gives_the_published_scores(name: str) -> None:
    model = MODELS[name]
    arrays, exact = model.cases["text_only"].arrays, Reference(Model(model.checkpoint))
    ids = arrays["input_ids"]
    (hidden,) = exact.run([exact.embed(ids.tolist())], [np.arange(len(ids)) == len(ids) - 1])
    expected = arrays["logits_last"][:N_SPOKEN]
    assert np.abs(exact.logits(hidden)[0] - expected).max() < 1e-5 * np.ptp(expected)


@each
def test_what_llama_cpp_is_told_of_the_tokenizer(name: str, bundle: Callable[..., Path]) -> None:
    """Two equal names would end the whole process in llama.cpp."""
    fields = gguf.GGUFReader(bundle(name) / "decoder.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(set(tokens)) == len(tokens) == 576
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 1
    for key in ("add_bos_token", "add_space_prefix"):  # both are put in front by the runtime
        assert fields[f"tokenizer.ggml.{key}"].contents() is False
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[:4] == [2, 3, 3, 6]
    assert types[N_SPOKEN : N_SPOKEN + 3] == [3, 3, 5]


@pytest.mark.parametrize(
    ("name", "decoder", "more", "divergence"),
    [
        ("llava-1.5", "q8_0", (), 0.05),
        # At four bits and rows of 128 random weights it is just above what is allowed, 0.2.
        ("llava-next", "q4_k_m", ("--allow-loss",), 0.4),
    ],
)
def test_from_a_folder_to_an_answer(
    name: str, decoder: str, more: tuple[str, ...], divergence: float, run: Run, tmp_path: Path
) -> None:
    """Quantized, calibrated, measured and proven, as a user would do it."""
    out, samples = tmp_path / "bundle", tmp_path / "samples"
    samples.mkdir()
    for picture in (BADGE[name], MODELS[name].folder / "images" / "exact_336x336.png"):
        shutil.copy(picture, samples)
    exported = run(
        *("export", MODELS[name].checkpoint, "--out", out, "--name", "tiny"),
        *("--vision", "int8", "--decoder", decoder, "--calibrate", samples, *more),
    )
    assert exported.returncode == 0, exported.stderr.decode()
    manifest = Bundle.open(out).manifest
    assert manifest.report is not None
    assert manifest.report.vision is not None
    assert manifest.report.vision.cosine_mean >= 0.995
    assert b"kept " in exported.stderr  # what the budget left in a larger type
    assert manifest.report.decoder is not None
    assert manifest.report.decoder.divergence_mean < divergence
    asked = run("ask", BADGE[name], "What?", "--model", out, "--max-tokens", "4", "--json")
    assert asked.returncode == 0, asked.stderr.decode()
    assert json.loads(asked.stdout)["image_tokens"] == N_TOKENS[name]
    verified = run("verify", out)
    assert verified.returncode == 0, verified.stderr.decode()
    told = run("info", out, "--json")
    assert json.loads(told.stdout)["family"] == name
    typed = f"/image {BADGE[name]}\nHi\n".encode()
    said = run("chat", "--model", out, "--max-tokens", "2", stdin=typed)
    assert said.returncode == 0, said.stderr.decode()

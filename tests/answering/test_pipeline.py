"""From pictures to text: every stage against the published implementation's numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_vlm import EdgeVLM, MachineSettings
from edge_vlm.answering.answer import AskOptions
from edge_vlm.answering.conversation import Conversation
from edge_vlm.families.jina_vlm.tiling import cut_tiles, stitch
from edge_vlm.prompt.builder import ImageSpan, TokenSpan
from edge_vlm.prompt.messages import images_of, parse_messages
from tests.conftest import GOLDEN_NAMES, GoldenCase, golden_cases

Bundle = Callable[..., Path]
Load = Callable[..., EdgeVLM]


def conversation_of(case: GoldenCase) -> list[dict[str, Any]]:
    """The case's messages in OpenAI's form, pictures as paths."""
    images = iter(case.images)
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image_url", "image_url": {"url": str(next(images))}}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ],
        }
        for message in case.data["messages"]
    ]


@pytest.fixture(scope="module")
def load(bundle: Bundle) -> Iterator[Load]:
    """``load(name, vision="fp32", decoder="f32", kv_type="f32")``: a loaded golden model."""
    loaded: dict[tuple[str, ...], EdgeVLM] = {}

    def loader(
        name: str, vision: str = "fp32", decoder: str = "f32", kv_type: str = "f32"
    ) -> EdgeVLM:
        key = (name, vision, decoder, kv_type)
        if key not in loaded:
            settings = MachineSettings(threads=1, kv_type=kv_type, alpha="drop")
            loaded[key] = EdgeVLM.load(bundle(name, vision, decoder), settings=settings)
        return loaded[key]

    yield loader
    for vlm in loaded.values():
        vlm.close()


@pytest.mark.parametrize("case", golden_cases(), ids=str)
def test_prompt_ids_equal_the_published_ones(case: GoldenCase, load: Load) -> None:
    vlm = load(case.model)
    messages = parse_messages(conversation_of(case))
    engine = vlm.engine
    assert engine is not None
    assert engine.prompts.render(messages).plain == case.data["prompt"]
    ids: list[int] = []
    for span in engine.prompts.build(messages):
        if isinstance(span, TokenSpan):
            ids += span.ids
        else:
            assert isinstance(span, ImageSpan)
            ids += case.arrays[f"img{span.index}_tokens"].tolist()
    assert ids == case.arrays["input_ids"].tolist()


@pytest.mark.parametrize("case", golden_cases(), ids=str)
def test_embeddings_and_logits_equal_the_published_ones(case: GoldenCase, load: Load) -> None:
    vlm = load(case.model)
    engine = vlm.engine
    assert engine is not None
    messages = parse_messages(conversation_of(case))
    arrays = case.arrays
    processor = vlm.manifest.image_processor
    rows = []
    for source in images_of(messages):
        from edge_vlm.pictures.image import load_image

        tiles = cut_tiles(load_image(source, alpha="drop"), processor)
        crops, markers = engine.vision.encode(tiles), engine.vision.marker_embeddings
        rows.append(stitch(crops, markers, tiles.plan, processor))

    with engine.decoder.context(len(arrays["input_ids"]) + 1) as context:
        position = 0
        n_compared = 0
        for span in engine.prompts.build(messages):
            if isinstance(span, TokenSpan):
                position += len(span.ids)
                last = position == len(arrays["input_ids"])
                context.append_tokens(span.ids, logits=last)
                continue
            image = rows[span.index]
            for golden, index in zip(
                arrays["inputs_embeds_rows"], arrays["inputs_embeds_row_index"], strict=True
            ):
                if position <= index < position + len(image):
                    scale = np.abs(golden).max()
                    np.testing.assert_allclose(
                        image[index - position], golden, rtol=0, atol=1e-4 * scale
                    )
                    n_compared += 1
            context.append_embeddings(image)
            position += len(image)
        logits = context.logits()

    assert n_compared > 0 or not case.images
    golden_logits = arrays["logits_last"]
    error = np.abs(logits[: len(golden_logits)] - golden_logits).max()
    assert error <= 1e-3 * np.ptp(golden_logits)


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
@pytest.mark.parametrize("case", golden_cases(), ids=str)
def test_greedy_answers_equal_the_published_ones(
    case: GoldenCase, load: Load, kv_type: str
) -> None:
    answer = load(case.model, kv_type=kv_type).ask(messages=conversation_of(case), max_tokens=16)
    assert list(answer.token_ids) == case.data["ids_until_stop"]
    assert answer.answer == case.data["text_until_stop"].strip()
    stopped = case.data["stop_index"] is not None
    assert answer.finish_reason == ("stop" if stopped else "length")
    assert answer.prompt_tokens == case.data["n_input_tokens"]
    assert answer.image_tokens == sum(i["n_image_tokens"] for i in case.data["per_image"])
    for used, golden in zip(answer.images, case.data["per_image"], strict=True):
        assert used.size == (golden["width"], golden["height"])
        assert used.resized == tuple(reversed(golden["resized_hw"]))
        assert used.tiling == tuple(golden["tiling"])
        assert used.crops == golden["n_crops"]


@pytest.mark.parametrize(("vision", "decoder"), [("fp16", "f16"), ("fp16", "bf16")])
def test_half_precision_keeps_most_greedy_tokens(
    load: Load, vision: str, decoder: str, record_property: Callable[[str, object], None]
) -> None:
    """Random weights have small gaps; what changes is reported rather than forbidden."""
    same = total = 0
    for case in golden_cases():
        vlm = load(case.model, vision, decoder, "f16")
        answer = vlm.ask(messages=conversation_of(case), max_tokens=16)
        golden = case.data["ids_until_stop"]
        first = next(
            (i for i, (a, b) in enumerate(zip(answer.token_ids, golden, strict=False)) if a != b),
            min(len(answer.token_ids), len(golden)),
        )
        same += first
        total += len(golden)
    record_property("greedy_tokens_before_the_first_difference", f"{same} of {total}")
    print(f"\n{vision} + {decoder}: {same} of {total} greedy tokens before the first difference")
    assert same >= 0.8 * total


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_extra_ids_are_never_generated(name: str, load: Load) -> None:
    """Even at a temperature at which every id is about as likely as any other."""
    vlm = load(name)
    for seed in range(5):
        answer = vlm.ask((), "Say anything.", temperature=100.0, seed=seed, max_tokens=100)
        assert max(answer.token_ids) < vlm.manifest.decoder.vocab_size


def test_a_seed_repeats_an_answer(load: Load) -> None:
    vlm = load("tiny-126-tied")
    options: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "min_p": 0.01, "max_tokens": 24}
    first = vlm.ask((), "Tell me.", seed=7, **options)
    assert vlm.ask((), "Tell me.", seed=7, **options).token_ids == first.token_ids
    others = {vlm.ask((), "Tell me.", seed=seed, **options).token_ids for seed in range(5)}
    assert len(others) > 1


def test_batch_size_does_not_change_the_answer(bundle: Bundle, golden: dict[str, Any]) -> None:
    case = golden["tiny-126-tied"].cases["image_chart"]
    for batch_size in (1, 7, 64):
        settings = MachineSettings(threads=1, batch_size=batch_size, alpha="drop")
        with EdgeVLM.load(bundle(case.model), settings=settings) as vlm:
            answer = vlm.ask(messages=conversation_of(case), max_tokens=16)
        assert list(answer.token_ids) == case.data["ids_until_stop"]


def test_json_form_has_every_counter(load: Load, golden: dict[str, Any]) -> None:
    case = golden["tiny-126-tied"].cases["image_chart"]
    answer = load(case.model).ask(list(case.images), "What is shown?", max_tokens=4)
    data = json.loads(json.dumps(answer.to_dict()))
    assert set(data) == {
        *("answer", "token_ids", "finish_reason", "prompt_tokens", "cached_tokens"),
        *("restored_tokens", "image_tokens", "images", "encoded_crops", "cached_crops"),
        *("timings", "kv_bytes", "peak_rss_bytes", "parsed", "choices"),
    }
    assert set(data["images"][0]) == {
        *("size", "resized", "tiling", "crops", "reduced", "used", "alpha", "crop"),
    }
    assert data["kv_bytes"] == 256 * load(case.model).manifest.decoder.kv_bytes_per_token(4.0)
    assert data["peak_rss_bytes"] > 10_000_000
    assert data["timings"]["vision"] > 0


def test_two_images_in_one_prompt(load: Load, golden: dict[str, Any]) -> None:
    """The answer depends on both pictures and on their order."""
    model = golden["tiny-126-tied"]
    vlm = load(model.name)
    chart, icon = (model.cases[name].images[0] for name in ("image_chart", "image_icon_rgba"))
    both = vlm.ask([chart, icon], "Compare.", max_tokens=16)
    swapped = vlm.ask([icon, chart], "Compare.", max_tokens=16)
    twice = vlm.ask([chart, chart], "Compare.", max_tokens=16)
    assert [image.crops for image in both.images] == [7, 2]
    assert both.image_tokens == swapped.image_tokens == 130 + 64
    assert len({both.token_ids, swapped.token_ids, twice.token_ids}) == 3


def test_max_tiles_limits_the_crops(load: Load, golden: dict[str, Any]) -> None:
    case = golden["tiny-378"].cases["image_page"]
    answer = load("tiny-378").ask(case.images[0], "What?", max_tiles=4, max_tokens=1)
    assert answer.images[0].tiling == (2, 2)
    assert answer.images[0].reduced
    assert answer.image_tokens == 814


def test_options_are_checked() -> None:
    from edge_vlm import PromptError

    for bad in (
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"min_p": -1},
        {"seed": -1},
        {"seed": 1 << 32},
        {"max_tiles": 0},
        {"max_tokens": True},
        {"max_tokens": 1.5},
    ):
        with pytest.raises(PromptError, match=next(iter(bad))):
            AskOptions(**bad)


def test_a_conversation_answers_one_turn_at_a_time(load: Load) -> None:
    from edge_vlm import DecoderError

    vlm = load("tiny-126-tied")
    assert vlm.engine is not None
    conversation = Conversation(vlm.engine)
    messages = parse_messages([{"role": "user", "content": "Hello"}])
    first = conversation.turn(messages, AskOptions(max_tokens=4))
    next(first)
    with pytest.raises(DecoderError, match="already answering"):
        next(conversation.turn(messages, AskOptions(max_tokens=4)))
    conversation.close()

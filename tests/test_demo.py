"""The demo model: its drawn pictures, its tokenizer, and that its bundle looks at the picture."""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from edge_vlm_export import export_checkpoint
from PIL import ImageFont
from tokenizers import Tokenizer

from edge_vlm import EdgeVLM, MachineSettings
from edge_vlm.bundle.find import embedded_bundle
from edge_vlm.bundle.manifest import DECODER_NAME, VISION_NAME, Bundle
from edge_vlm.families.jina_vlm.tiling import plan_picture
from edge_vlm.pictures.tower import OnnxTower
from models.demo.data import EVALUATION_SEEDS, TRAINING_MIXTURE, Picture, make_picture
from models.demo.drawing import PALETTE
from models.demo.fonts import font_files, load_font
from models.demo.language import LANGUAGES
from models.demo.questions import FAMILIES

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "models" / "demo" / "checkpoint"
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    seeds = [*range(60), *range(EVALUATION_SEEDS, EVALUATION_SEEDS + 60)]
    return [make_picture(seed) for seed in seeds]


def test_a_seed_is_a_picture(pictures: list[Picture]) -> None:
    again = make_picture(7)
    assert np.array_equal(again.pixels, pictures[7].pixels)
    assert again.questions == pictures[7].questions
    assert len({hashlib.sha256(p.pixels.tobytes()).digest() for p in pictures}) == len(pictures)


def test_fonts_for_evaluation_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    training, held_back = ({Path(f).name for f in font_files(side)} for side in (False, True))
    assert len(training) > 20
    assert len(held_back) > 5
    assert not training & held_back

    used: set[str] = set()
    real = ImageFont.truetype

    def opened(path: str, *args: Any, **options: Any) -> Any:
        used.add(Path(path).name)
        return real(path, *args, **options)

    monkeypatch.setattr(ImageFont, "truetype", opened)
    for first, side in ((0, training), (EVALUATION_SEEDS, held_back)):
        load_font.cache_clear()
        used.clear()
        for seed in range(first, first + 10):
            make_picture(seed, {"words": 1.0})
        assert used
        assert used <= side


def test_every_family_in_every_language(pictures: list[Picture]) -> None:
    asked = {(q.family, q.language) for picture in pictures for q in picture.questions}
    assert {family for family, _ in asked} == set(FAMILIES)
    assert {language for _, language in asked} == set(LANGUAGES)
    for question in (q for picture in pictures for q in picture.questions):
        assert question.answer == question.answer.strip() != ""
        assert "\n" not in question.text + question.answer
        if question.family == "count":
            assert 0 <= int(question.answer) <= 8
        elif question.family == "reading":
            assert 1 <= len(question.answer) <= 8


def test_a_question_has_one_answer(pictures: list[Picture]) -> None:
    for picture in pictures:
        answers: dict[str, set[str]] = {}
        for question in picture.questions:
            answers.setdefault(question.text, set()).add(question.answer)
        assert all(len(found) == 1 for found in answers.values())


def test_pictures_need_one_tile_or_several(pictures: list[Picture]) -> None:
    settings = Bundle.open(embedded_bundle()).manifest.image_processor
    crops = {plan_picture(*p.pixels.shape[1::-1], settings).n_crops for p in pictures}
    assert {2, 3, 5, 7} <= crops


def test_things_have_the_colour_that_the_answers_name() -> None:
    """Against the pixels, not against the record that answers are made from."""
    checked = 0
    for seed in range(60):
        picture = make_picture(seed, {"shapes": 1.0}, gentle=True)
        canvas, (height, width) = picture.canvas, picture.pixels.shape[:2]
        for thing in canvas.things:
            if thing.noun not in ("circle", "square", "diamond", "star", "heart"):
                continue
            y, x = thing.y / canvas.height * height, thing.x / canvas.width * width
            seen = picture.pixels[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].mean((0, 1))
            nearest = min(PALETTE, key=lambda name: math.dist(PALETTE[name], seen))
            checked += 1
            assert nearest == thing.colour, f"seed {seed}: {thing}"
    assert checked > 60


def test_the_tokenizer_gives_back_every_question_and_answer(pictures: list[Picture]) -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    for question in (q for picture in pictures for q in picture.questions):
        for text in (question.text, question.answer):
            ids = tokenizer.encode(f" {text}", add_special_tokens=False).ids
            assert tokenizer.decode(ids) == f" {unicodedata.normalize('NFC', text)}"
            assert len(ids) < 64


def test_training_also_sees_pages_of_print() -> None:
    page = make_picture(0, {"page": 1.0})
    assert page.questions == []
    assert len(page.canvas.glyphs) > 30
    assert "page" in TRAINING_MIXTURE


@pytest.mark.engine
def test_the_bundle_is_the_exported_checkpoint(tmp_path: Path) -> None:
    shipped = Bundle.open(embedded_bundle())
    manifest = shipped.manifest
    out = export_checkpoint(
        CHECKPOINT,
        tmp_path / "demo",
        vision=manifest.vision.precision,
        decoder=manifest.decoder.precision,
        name=manifest.model.name,
    )
    exported = Bundle.open(out)
    assert exported.manifest.files[DECODER_NAME] == manifest.files[DECODER_NAME]
    # What the error budget keeps in fp16 follows from what this processor's int8 kernels compute:
    # those without VNNI saturate. So weights are compared, a product stored in two ways by value.
    found, expected = (_weights(b.file(VISION_NAME)) for b in (exported, shipped))
    assert found.keys() == expected.keys()
    for name, (weight, step) in expected.items():
        ours, our_step = found[name]
        difference, step = np.abs(ours - weight), np.maximum(step, our_step)
        assert (difference <= 1.001 * step + 1e-5 * np.abs(weight).max()).all(), name
        assert (difference > 0.501 * step + 1e-5 * np.abs(weight).max()).mean() < 1e-3, name


def _weights(path: Path) -> dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Of each tensor its values as numbers, and the step they were rounded to."""
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    found = {}
    for name, values in stored.items():
        numbers, step = values.astype(np.float32), np.float32(0)
        if name.endswith(".int8"):
            step = stored[f"{name.removesuffix('.int8')}.scale"]
            numbers *= step
        elif values.dtype == np.float16:
            step = np.abs(numbers) * np.float32(2**-10)
        if not name.endswith(".scale"):
            base = name.removesuffix(".int8").removesuffix(".weight_t.fp16")
            found[base] = numbers, np.broadcast_to(step, numbers.shape)
    return found


class HalfBlind(OnnxTower):
    """Sees black instead of some crops."""

    def __init__(self, blank: slice) -> None:
        super().__init__(Bundle.open(embedded_bundle()))
        self.blank = blank

    def encode_parts(self, feed: Any, *args: Any, **options: Any) -> Any:
        crops = feed["crops"].copy()
        crops[self.blank] = -1
        return super().encode_parts({**feed, "crops": crops}, *args, **options)


@pytest.mark.engine
@pytest.mark.parametrize("blank", [slice(1, None), slice(0, 1)], ids=["tiles", "thumbnail"])
def test_both_views_of_a_picture_matter(blank: slice) -> None:
    """Many of the example questions are answered wrongly without tiles or thumbnail."""
    questions = json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))
    settings = MachineSettings(threads=1, cache=None, tile_memory=0)

    def n_right(vision: OnnxTower) -> int:
        with EdgeVLM.load("demo", settings=settings, vision=vision) as vlm:
            answers = [vlm.ask(EXAMPLES / q["image"], q["question"]).answer for q in questions]
        return sum(said == q["answer"] for said, q in zip(answers, questions, strict=True))

    whole = n_right(OnnxTower(Bundle.open(embedded_bundle())))
    assert whole > 0.9 * len(questions)
    assert n_right(HalfBlind(blank)) < 0.75 * whole

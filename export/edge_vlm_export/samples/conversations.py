"""Pictures with questions: what a quantized bundle is measured on, and calibrated with.

The built-in ones are drawn. A folder holds a user's own pictures, which always fit the purpose
better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_vlm.bundle.json_text import decode, parse_json, read_bounded
from edge_vlm.errors import InputError
from edge_vlm.prompt.messages import Message, Text, user_message
from edge_vlm_export.samples.drawn import drawn_conversations

BUILTIN = "builtin"
MAX_PICTURES = 64
MAX_TEXT_BYTES = 1 << 20
HELD_OUT = 4  # every fourth conversation is measured on, not calibrated with
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}

Turn = tuple[str, str | None]


@dataclass(frozen=True)
class Sample:
    """A picture (file, or (height, width, 3) uint8) and turns of question and answer."""

    picture: Path | npt.NDArray[np.uint8]
    turns: tuple[Turn, ...]

    @property
    def messages(self) -> list[Message]:
        """The conversation; it ends with the last answer that is known."""
        out: list[Message] = []
        for index, (question, answer) in enumerate(self.turns):
            out.append(user_message([] if index else [self.picture], question))
            if answer is None:
                break
            out.append(Message("assistant", (Text(answer),)))
        return out


@dataclass(frozen=True)
class Prompt:
    """One conversation; ``ids`` is (n,) int32, -1 where the next of ``rows`` stands.

    With M-RoPE, ``positions`` (n, 3) int32 are those of time, row and column.
    """

    ids: npt.NDArray[np.int32]
    rows: npt.NDArray[np.float32]  # (n_rows, hidden_size)
    positions: npt.NDArray[np.int32] | None = None

    @property
    def targets(self) -> npt.NDArray[np.int32]:
        """(n,) the id that follows each position; -1 where no text follows."""
        return np.append(self.ids[1:], np.int32(-1))


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Samples to calibrate with, and held-out ones to measure on (none of a single sample)."""
    held_out = [s for index, s in enumerate(samples) if index % HELD_OUT == HELD_OUT - 1]
    if not held_out and len(samples) > 1:
        held_out = [samples[-1]]
    chosen = {id(sample) for sample in held_out}
    return [sample for sample in samples if id(sample) not in chosen], held_out


def read_samples(source: str | Path) -> list[Sample]:
    """``builtin``, or the pictures of a folder.

    ``questions.json`` in the folder is a list of objects with ``image`` (a file name), ``question``
    and perhaps ``answer``; ``NAME.txt`` beside a picture has a question a line, perhaps followed by
    a tab and the answer. A picture without questions gets general ones.

    Raises:
        InputError: the folder has no picture, or a file of questions is malformed.
    """
    if str(source) == BUILTIN:
        return builtin_samples()
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of pictures (or {BUILTIN!r})")
    pictures = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    if not pictures:
        raise InputError(f"{folder}: has no pictures (JPEG, PNG, WebP, BMP or GIF)")
    if len(pictures) > MAX_PICTURES:
        raise InputError(f"{folder}: has {len(pictures)} pictures, at most {MAX_PICTURES} are used")
    listed = _listed_questions(folder / "questions.json", {path.name for path in pictures})
    samples = []
    for index, path in enumerate(pictures):
        turns = listed.get(path.name, []) + _lines(path.with_suffix(".txt"))
        general = _GENERAL[index % len(_GENERAL)]
        samples.append(Sample(path, tuple(turns) or ((general, None),)))
    return samples


def _listed_questions(path: Path, pictures: set[str]) -> dict[str, list[Turn]]:
    if not path.exists():
        return {}
    data = parse_json(_text(path), path, InputError)
    if not isinstance(data, list):
        raise InputError(f"{path}: must be a list of objects with image, question and answer")
    found: dict[str, list[Turn]] = {}
    for index, entry in enumerate(data):
        fields = entry if isinstance(entry, dict) else {}
        image, question, answer = (fields.get(key) for key in ("image", "question", "answer"))
        if not isinstance(image, str) or not isinstance(question, str) or not question.strip():
            raise InputError(f"{path}: entry {index} lacks image or question")
        if answer is not None and not isinstance(answer, str):
            raise InputError(f"{path}: the answer of entry {index} is no text")
        if image not in pictures:
            raise InputError(f"{path}: entry {index} names {image!r}, which is no picture there")
        found.setdefault(image, []).append((question, answer))
    return found


def _lines(path: Path) -> list[Turn]:
    if not path.exists():
        return []
    pairs = [line.partition("\t")[::2] for line in _text(path).splitlines()]
    return [
        (question.strip(), answer.strip() or None) for question, answer in pairs if question.strip()
    ]


def _text(path: Path) -> str:
    return decode(read_bounded(path, MAX_TEXT_BYTES, InputError), path, InputError)


_GENERAL = (
    "Describe this picture.",
    "Was ist auf diesem Bild zu sehen?",
    "¿Qué se ve en esta imagen?",
    "Que voit-on sur cette image ?",
    "这张图片里有什么？",
    "ماذا يوجد في هذه الصورة؟",
    "この画像には何が写っていますか。",
    "Что изображено на этой картинке?",
    "이 사진에 무엇이 있나요?",
    "Cosa si vede in questa immagine?",
)


def builtin_samples(rounds: int = 4) -> list[Sample]:
    """``rounds`` times each kind of picture, always the same ones."""
    return [
        Sample(picture, turns) for n in range(rounds) for picture, turns in drawn_conversations(n)
    ]

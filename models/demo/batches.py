"""From pictures with questions to batches: the runtime's tiling, prompts and training labels.

A picture's image tokens are one prefix; its questions are branches behind it. A branch sees the
prefix and itself, at the positions it would have alone, so that training several questions at once
is the same computation as asking each of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from edge_vlm.families.jina_vlm.tiling import JinaImageProcessor as ImageProcessor
from edge_vlm.families.jina_vlm.tiling import (
    TilingPlan,
    cut_tiles,
    patch_order,
    plan_picture,
    token_block,
)
from edge_vlm.prompt.template import ChatTemplate
from models.demo.data import Picture
from models.demo.drawing import PALETTE, Canvas
from models.demo.families.common import Question
from models.demo.language import LANGUAGES, NOUNS
from models.demo.questions import FAMILIES

STOP_TOKEN = "<|im_end|>"  # noqa: S105
IGNORE = -100

# Auxiliary labels: what each pooled vector should know about its 28 x 28 pixels.
CHARACTERS = "".join(map(chr, range(33, 127))) + "äöüßÄÖÜáéíóúñÁÉÍÓÚÑàâçèêëîïôùûÀÂÇÈÊËÎÏÔÙÛ"
N_SLOTS = 6  # characters in a cell, in reading order
N_PATCH_SLOTS = 2  # characters in a 14 x 14 patch
LEGIBLE = 9.0  # pixels of font size below which characters are not asked for
_CHARACTER_IDS = {char: index + 1 for index, char in enumerate(CHARACTERS)}
_NOUN_IDS = {noun: index + 1 for index, noun in enumerate(NOUNS)}
_COLOUR_IDS = {colour: index + 1 for index, colour in enumerate(PALETTE)}
AUXILIARY_SIZES = (*((len(CHARACTERS) + 1,) * N_SLOTS), len(NOUNS) + 1, len(PALETTE) + 1)

Int16 = npt.NDArray[np.int16]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Branch:
    """Token ids from the question on; the first `n_prompt` are given, the rest is the answer."""

    ids: list[int]
    n_prompt: int
    family: int
    language: int


@dataclass(frozen=True)
class Example:
    """One picture, ready to be put in a batch."""

    crops: npt.NDArray[np.uint8] | npt.NDArray[np.float32]  # (n_crops, n_patches, patch_values)
    prefix: list[int]
    order: Int64  # (n_crops * tokens_per_crop,) position in the prefix, or -1
    labels: Int16  # (n_crops, tokens_per_crop, len(AUXILIARY_SIZES))
    patch_labels: Int16  # (n_crops, n_patches, N_PATCH_SLOTS)
    branches: list[Branch]

    @property
    def length(self) -> int:
        return len(self.prefix) + sum(len(branch.ids) for branch in self.branches)


@dataclass
class Batch:
    """Examples side by side. Sizes: C crops, B pictures, L tokens, A answer tokens."""

    crops: Tensor  # (C, n_patches, patch_values) uint8 or float32
    is_last: Tensor  # (C,) float32
    labels: Tensor  # (C, tokens_per_crop, n_labels)
    patch_labels: Tensor  # (C, n_patches, N_PATCH_SLOTS)
    used: Tensor  # (F,) rows of the flattened features that are used
    rows: Tensor  # (F,)
    columns: Tensor  # (F,)
    ids: Tensor  # (B, L)
    positions: Tensor  # (B, L)
    mask: Tensor  # (B, 1, L, L) bool
    answer_rows: Tensor  # (A,) where the hidden state predicts an answer token
    answer_columns: Tensor  # (A,)
    targets: Tensor  # (A,)
    question: Tensor  # (A,) number of the question, counted over the batch
    family: Tensor  # (n_questions,)
    language: Tensor  # (n_questions,)

    def float_crops(self) -> Tensor:
        """Pixels in [-1, 1]."""
        if self.crops.dtype == torch.uint8:
            return self.crops.float().div_(127.5).sub_(1)
        return self.crops


class Preparer:
    """Turns pictures into examples with a checkpoint's settings and tokenizer."""

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        wanted = {name: settings[name] for name in ImageProcessor.model_fields if name in settings}
        self.settings = ImageProcessor.model_validate_json(json.dumps(wanted))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._template = ChatTemplate((folder / "chat_template.jinja").read_text("utf-8"))
        names = {"s": "<im_start>", "e": "<im_end>", "p": "<im_patch>", "c": "<im_col>"}
        self._block_ids = {code: self._token_id(name) for code, name in names.items()}
        self.first_id = self._token_id("<|endoftext|>")
        self.stop_id = self._token_id(STOP_TOKEN)
        before, _ = self._render("")
        self._before = [self.first_id, *self.encode(before)]

    def _token_id(self, text: str) -> int:
        number = self.tokenizer.token_to_id(text)
        if number is None:
            raise ValueError(f"the tokenizer has no token {text}")
        return int(number)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _render(self, question: str) -> tuple[str, str]:
        """The prompt's text before and after the picture."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self._template.render(
            messages=[{"role": "user", "content": content}],
            add_generation_prompt=True,
            always_start_with_space=True,
            image_prompt_token="<|image|>",  # noqa: S106
        )
        before, _, after = text.partition("<|image|>")
        return before, after

    def branch(self, question: Question) -> Branch:
        prompt = self.encode(self._render(question.text)[1])
        answer = [*self.encode(f" {question.answer}"), self.stop_id]
        family = FAMILIES.index(question.family)
        return Branch(prompt + answer, len(prompt), family, LANGUAGES.index(question.language))

    def prefix(self, plan: TilingPlan) -> tuple[list[int], Int64]:
        """Ids up to the end of the image block, and where each pooled vector goes."""
        block = [self._block_ids[code] for code in token_block(plan, self.settings)]
        ids = self._before + block
        patches = np.flatnonzero(np.array(ids) == self._block_ids["p"])
        order = patch_order(plan, self.settings).reshape(-1)
        return ids, np.where(order >= 0, patches[order], -1).astype(np.int64)

    def example(self, picture: Picture, exact: bool = False) -> Example:
        """Cut and label a picture; `exact` keeps float pixels, else they are stored in 8 bits."""
        tiles = cut_tiles(picture.pixels, self.settings)
        crops = tiles.crops
        if not exact:
            crops = np.rint((crops + 1) * 127.5).astype(np.uint8)
        prefix, order = self.prefix(tiles.plan)
        if picture.kind == "page":  # for vision alone: no prompt
            prefix, order = [], np.full_like(order, -1)
        return Example(
            crops,
            prefix,
            order,
            *self._labels(picture.canvas, tiles.plan),
            [self.branch(question) for question in picture.questions],
        )

    def _labels(self, canvas: Canvas, plan: TilingPlan) -> tuple[Int16, Int16]:
        """What lies in each cell and each patch; 0 is nothing, IGNORE is what cannot be told.

        Returns:
            (n_crops, tokens_per_crop, n_labels): characters in reading order, a thing, its colour.
            (n_crops, n_patches, N_PATCH_SLOTS): characters in reading order.
        """
        size = self.settings.base_input_size[0]
        cell = self.settings.patch_size * self.settings.pooling_h
        n = self.settings.token_length_h
        step = size - sum(self.settings.overlap_margins) * self.settings.patch_size
        rows, columns = plan.tiling
        tiled_h, tiled_w = plan.tiled_hw
        views = [(0, 0, size, size)]
        views += [
            (r * step, c * step, tiled_h, tiled_w) for r in range(rows) for c in range(columns)
        ]
        labels = np.zeros((len(views), n, n, len(AUXILIARY_SIZES)), np.int16)
        n_patches = size // self.settings.patch_size
        patches = np.zeros((len(views), n_patches, n_patches, N_PATCH_SLOTS), np.int16)
        for view, fine, place in zip(labels, patches, views, strict=True):
            top, left, height, width = place
            for glyph in canvas.glyphs:  # written line by line, each from left to right
                y, x = glyph.y * height - top, glyph.x * width - left
                if not (0 <= y < size and 0 <= x < size):
                    continue
                legible = glyph.height * height >= LEGIBLE
                label = _CHARACTER_IDS.get(glyph.char, IGNORE) if legible else IGNORE
                _fill_slot(view[int(y // cell), int(x // cell), :N_SLOTS], label)
                step_in = self.settings.patch_size
                _fill_slot(fine[int(y // step_in), int(x // step_in)], label)
            for thing in canvas.things:
                y = thing.y / canvas.height * height - top
                x = thing.x / canvas.width * width - left
                if not (0 <= y < size and 0 <= x < size):
                    continue
                target = view[int(y // cell), int(x // cell)]
                taken = target[N_SLOTS] != 0
                target[N_SLOTS] = IGNORE if taken else _NOUN_IDS[thing.noun]
                target[N_SLOTS + 1] = IGNORE if taken else _COLOUR_IDS[thing.colour]
        return (
            labels.reshape(len(views), n * n, -1),
            patches.reshape(len(views), n_patches * n_patches, -1),
        )


def _fill_slot(slots: Int16, label: int) -> None:
    """Put a character in the first free slot; a cell with too many is not to be judged."""
    free = np.flatnonzero(slots == 0)
    if label == IGNORE or len(free) == 0 or slots[0] == IGNORE:
        slots[:] = IGNORE
    else:
        slots[free[0]] = label


def collate(examples: Sequence[Example]) -> Batch:
    """Put examples side by side, padded to the longest."""
    n_batch = len(examples)
    length = max(1, *(example.length for example in examples))
    ids = np.zeros((n_batch, length), np.int64)
    positions = np.zeros((n_batch, length), np.int64)
    segment = np.full((n_batch, length), -1, np.int64)  # 0 the picture, 1.. its questions
    is_last, used, rows, columns = [], [], [], []
    answers: list[tuple[int, int, int, int]] = []  # row, column, target, question
    families: list[int] = []
    languages: list[int] = []
    n_features = 0
    for row, example in enumerate(examples):
        n_prefix = len(example.prefix)
        ids[row, :n_prefix] = example.prefix
        positions[row, :n_prefix] = np.arange(n_prefix)
        segment[row, :n_prefix] = 0
        start = n_prefix
        for number, branch in enumerate(example.branches):
            end = start + len(branch.ids)
            ids[row, start:end] = branch.ids
            positions[row, start:end] = np.arange(n_prefix, n_prefix + len(branch.ids))
            segment[row, start:end] = number + 1
            for offset in range(branch.n_prompt, len(branch.ids)):
                answers.append((row, start + offset - 1, branch.ids[offset], len(families)))
            families.append(branch.family)
            languages.append(branch.language)
            start = end
        flags = np.zeros(len(example.crops), np.float32)
        flags[-1] = 1
        is_last.append(flags)
        kept = np.flatnonzero(example.order >= 0)
        used.append(kept + n_features)
        rows.append(np.full(len(kept), row, np.int64))
        columns.append(example.order[kept])
        n_features += len(example.order)
    seg = torch.from_numpy(segment)
    same = (seg[:, None, :] == seg[:, :, None]) | ((seg[:, None, :] == 0) & (seg[:, :, None] > 0))
    mask = (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    found = torch.tensor(answers, dtype=torch.int64).reshape(-1, 4)
    return Batch(
        crops=torch.from_numpy(np.concatenate([example.crops for example in examples])),
        is_last=torch.from_numpy(np.concatenate(is_last)),
        labels=torch.from_numpy(np.concatenate([example.labels for example in examples])).long(),
        patch_labels=torch.from_numpy(
            np.concatenate([example.patch_labels for example in examples])
        ).long(),
        used=torch.from_numpy(np.concatenate(used)),
        rows=torch.from_numpy(np.concatenate(rows)),
        columns=torch.from_numpy(np.concatenate(columns)),
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        mask=mask,
        answer_rows=found[:, 0],
        answer_columns=found[:, 1],
        targets=found[:, 2],
        question=found[:, 3],
        family=torch.tensor(families, dtype=torch.int64),
        language=torch.tensor(languages, dtype=torch.int64),
    )


def plan_of(pixels: npt.NDArray[np.uint8], settings: ImageProcessor) -> TilingPlan:
    """How a picture would be cut."""
    return plan_picture(pixels.shape[1], pixels.shape[0], settings)

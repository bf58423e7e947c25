"""The checkpoint in PyTorch, answering questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from edge_vlm.families.jina_vlm.tiling import cut_tiles
from models.demo.batches import Preparer
from models.demo.data import Picture
from models.demo.families.common import Question
from models.demo.model import JinaVlm, KeyValue

MAX_ANSWER_TOKENS = 24


def set_threads(threads: int) -> None:
    """Threads of PyTorch; 0 leaves them as they are."""
    if threads:
        torch.set_num_threads(threads)


class TorchAnswerer:
    """The checkpoint in PyTorch, greedy, all questions of a picture at once.

    Args:
        folder: the checkpoint.
        blank: "tiles" or "thumbnail" to make those crops black, "" for the whole picture.
    """

    def __init__(self, folder: Path, blank: str = "", device: str = "cpu") -> None:
        self.preparer = Preparer(folder)
        self.device = torch.device(device)
        self.model = JinaVlm.load(folder).to(self.device)
        self.blank = blank

    @torch.no_grad()
    def answer(self, picture: Picture, questions: Sequence[Question]) -> list[str]:
        tiles = cut_tiles(picture.pixels, self.preparer.settings)
        crops = torch.from_numpy(tiles.crops)
        if self.blank == "tiles":
            crops[1:] = -1
        elif self.blank == "thumbnail":
            crops[:1] = -1
        is_last = torch.from_numpy(tiles.is_last.astype(np.float32))
        features = self.model.vision(crops.to(self.device), is_last.to(self.device)).flatten(0, 1)
        prefix, order = self.preparer.prefix(tiles.plan)
        kept = torch.from_numpy(np.flatnonzero(order >= 0)).to(self.device)
        columns = torch.from_numpy(order[order >= 0]).to(self.device)
        ids = torch.tensor([prefix], device=self.device)
        embeds = self.model.embed(ids, features[kept], torch.zeros_like(columns), columns)
        positions = torch.arange(len(prefix), device=self.device)[None]
        _, past = self.model.text(embeds, positions)
        return self._branches(questions, len(prefix), past)

    def _branches(
        self, questions: Sequence[Question], n_prefix: int, past: list[KeyValue]
    ) -> list[str]:
        """Decode all questions in one row: each sees the picture and itself alone."""
        prompts = []
        for question in questions:
            branch = self.preparer.branch(question)
            prompts.append(branch.ids[: branch.n_prompt])
        new = [token for prompt in prompts for token in prompt]
        segment = [n for n, prompt in enumerate(prompts) for _ in prompt]
        position = [n_prefix + k for prompt in prompts for k in range(len(prompt))]
        last = np.cumsum([len(prompt) for prompt in prompts]) - 1
        seen: list[int] = []
        lengths = [n_prefix + len(prompt) for prompt in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        for _ in range(MAX_ANSWER_TOKENS):
            seen += segment
            of_new = torch.tensor(segment)[:, None]
            of_all = torch.tensor(seen)[None, :]
            order = torch.arange(len(seen))
            own = (of_new == of_all) & (order[None, :] <= order[-len(segment) :, None])
            picture = torch.ones(len(segment), n_prefix, dtype=torch.bool)
            mask = torch.cat((picture, own), dim=1)[None, None].to(self.device)
            embeds = self.model.text.embedding(torch.tensor([new], device=self.device))
            at = torch.tensor([position], device=self.device)
            hidden, past = self.model.text(embeds, at, mask, past)
            best = self.model.logits(hidden[0, last]).argmax(-1).tolist()
            for number, token in enumerate(best):
                if number in running:
                    if token in (self.preparer.stop_id, self.preparer.first_id):
                        running.discard(number)
                    else:
                        answers[number].append(token)
            if not running:
                break
            new, segment = best, list(range(len(prompts)))
            position = lengths
            lengths = [length + 1 for length in lengths]
            last = np.arange(len(prompts))
        return [self.preparer.tokenizer.decode(tokens) for tokens in answers]

"""Train the demo model: `python -m models.demo.train --steps 6000`.

Runs on CPUs or one GPU, goes on from its last state in `--work`, and writes the averaged weights
as a checkpoint of the released layout. Vision first learns from labels that the generator knows
(which characters and things lie in each cell); these auxiliary heads are thrown away.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import queue
import random
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.demo.batches import (
    AUXILIARY_SIZES,
    IGNORE,
    N_PATCH_SLOTS,
    N_SLOTS,
    Batch,
    Example,
    Preparer,
    collate,
)
from models.demo.checkpoint import CHECKPOINT, model_config, save_weights, write_skeleton
from models.demo.data import TRAINING_MIXTURE, make_picture
from models.demo.model import JinaVlm
from models.demo.questions import FAMILIES

MOST_QUESTIONS = 12  # of one picture in one sequence


class AuxiliaryHeads(nn.Module):
    """Linear readers of what a patch and a pooled vector know; used in training only."""

    def __init__(self, patch_width: int, width: int) -> None:
        super().__init__()
        self.read_patch = nn.Linear(patch_width, N_PATCH_SLOTS * AUXILIARY_SIZES[0])
        self.read = nn.Linear(width, sum(AUXILIARY_SIZES))

    def patch_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over patches with characters and a tenth of the others."""
        labels = labels.flatten(0, 1)
        chosen = (labels[:, 0] > 0) | (torch.rand(len(labels), device=labels.device) < 0.1)
        scores = self.read_patch(states.flatten(0, 1)[chosen])
        return F.cross_entropy(
            scores.view(-1, AUXILIARY_SIZES[0]), labels[chosen].flatten(), ignore_index=IGNORE
        )

    def loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy, and the share of non-empty character slots that is right."""
        scores = self.read(features).flatten(0, 1).split(AUXILIARY_SIZES, dim=-1)
        labels = labels.flatten(0, 1)
        characters = torch.stack(scores[:N_SLOTS], dim=1).flatten(0, 1)
        wanted = labels[:, :N_SLOTS].flatten()
        # Most cells are empty: without a lower weight "nothing" is all that is learnt at first.
        weight = torch.ones(AUXILIARY_SIZES[0], device=features.device)
        weight[0] = 0.25
        total = F.cross_entropy(characters, wanted, weight, ignore_index=IGNORE)
        for index in (N_SLOTS, N_SLOTS + 1):
            weight = torch.ones(AUXILIARY_SIZES[index], device=features.device)
            weight[0] = 0.1
            total = total + F.cross_entropy(
                scores[index], labels[:, index], weight, ignore_index=IGNORE
            )
        written = wanted > 0
        right = (characters.argmax(-1) == wanted)[written].float().mean()
        return total, right


@dataclass(frozen=True)
class Options:
    """The command line."""

    work: Path
    output: Path
    steps: int
    warmup: int
    decay: float
    pretrain: int
    batch: int
    rate: float
    seed: int
    workers: int
    threads: int
    device: str
    minutes: float
    ramp: int
    repeats: int
    start: Path | None


def parse(arguments: list[str]) -> Options:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--work", type=Path, default=Path("build/demo-training"))
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=20000, help="steps in all")
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--decay", type=float, default=0.3, help="share of steps with falling rate")
    parser.add_argument("--pretrain", type=int, default=1500, help="first steps: vision alone")
    parser.add_argument("--batch", type=int, default=24, help="pictures a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch chooses")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=0, help="stop after this time, 0: never")
    parser.add_argument("--ramp", type=int, default=15000, help="pictures until full difficulty")
    parser.add_argument("--start", type=Path, help="checkpoint whose weights a new run begins with")
    parser.add_argument("--repeats", type=int, default=2, help="times a picture is shown, about")
    return Options(**vars(parser.parse_args(arguments)))


def draw_forever(
    folder: Path, start: int, step: int, ramp: int, out: mp.Queue[tuple[int, Example]]
) -> None:
    """Worker process: pictures of the seeds start, start + step, ... as examples."""
    torch.set_num_threads(1)
    preparer = Preparer(folder)
    seed = start
    while True:
        level = min(1.0, 0.2 + seed / ramp)
        picture = make_picture(seed, TRAINING_MIXTURE, level, gentle=level < 0.5, n_rounds=3)
        out.put((seed, preparer.example(picture)))
        seed += step


class Pictures:
    """Batches of drawn pictures; when drawing is slower than training, pictures come again."""

    def __init__(self, options: Options, first_seed: int) -> None:
        context = mp.get_context("spawn")
        self._queue: mp.Queue[tuple[int, Example]] = context.Queue(maxsize=256)
        self._random = random.Random(options.seed + first_seed)
        self._shown: deque[Example] = deque(maxlen=3000)
        self._ready: deque[list[Example]] = deque()
        self._size = options.batch
        self._repeats = options.repeats
        self.next_seed = first_seed
        self._processes = [
            context.Process(
                target=draw_forever,
                args=(
                    options.output,
                    first_seed + number,
                    options.workers,
                    options.ramp,
                    self._queue,
                ),
                daemon=True,
            )
            for number in range(options.workers)
        ]
        for process in self._processes:
            process.start()

    def batch(self) -> Batch:
        if not self._ready:
            self._refill()
        return collate(self._ready.popleft())

    def _refill(self) -> None:
        """Four batches at once, so that pictures of like length can be put together."""
        wanted = 4 * self._size
        fresh: list[Example] = []
        most = wanted if len(self._shown) < 1000 else wanted // self._repeats
        while len(fresh) < most:
            enough = len(self._shown) >= wanted
            try:
                seed, example = self._queue.get(timeout=0.2 if enough else 60)
            except queue.Empty:
                if enough:
                    break
                raise RuntimeError("no picture was drawn for a minute") from None
            self.next_seed = max(self.next_seed, seed + 1)
            fresh.append(example)
        again = self._random.sample(list(self._shown), wanted - len(fresh))
        self._shown.extend(fresh)
        chosen = [self._some_questions(example) for example in fresh + again]
        examples = sorted(chosen, key=lambda example: example.length)
        batches = [examples[n : n + self._size] for n in range(0, wanted, self._size)]
        self._random.shuffle(batches)
        self._ready.extend(batches)

    def _some_questions(self, example: Example) -> Example:
        """A picture that comes again is asked other things."""
        if len(example.branches) <= MOST_QUESTIONS:
            return example
        branches = self._random.sample(example.branches, MOST_QUESTIONS)
        return replace(example, branches=branches)

    def close(self) -> None:
        for process in self._processes:
            process.terminate()


def answer_scores(model: JinaVlm, batch: Batch, features: Tensor) -> Tensor:
    """(A, vocab_size): scores where each answer token is to be predicted."""
    used = features.flatten(0, 1)[batch.used]
    embeds = model.embed(batch.ids, used, batch.rows, batch.columns)
    hidden, _ = model.text(embeds, batch.positions, batch.mask)
    return model.logits(hidden[batch.answer_rows, batch.answer_columns])


def question_is_right(scores: Tensor, batch: Batch) -> Tensor:
    """(n_questions,) bool: every token of the answer, the stop token too, has the highest score.

    That is the same as a greedy answer being exactly right.
    """
    wrong = scores.argmax(-1) != batch.targets
    n_wrong = torch.zeros(len(batch.family), device=scores.device)
    return n_wrong.index_add(0, batch.question, wrong.float()) == 0


def split_parameters(model: JinaVlm) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices inside layers, for Muon; everything else, for AdamW."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = "layers." in name or "pooling" in name or "projector" in name
        (matrices if inside and parameter.dim() == 2 else others).append(parameter)
    return matrices, others


def rate_at(step: int, options: Options) -> float:
    """Warm-up, a plateau, and a straight way down to nearly zero."""
    rise = min(1.0, (step + 1) / options.warmup)
    falling = max(1.0, options.decay * options.steps)
    fall = min(1.0, max(0.01, (options.steps - step) / falling))
    return rise * fall


class Trainer:
    def __init__(self, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.device = torch.device(options.device)
        if not (options.output / "tokenizer.json").exists():
            write_skeleton(options.output)
        self.model = JinaVlm.from_json(model_config(), tied=True).to(self.device)
        self.heads = AuxiliaryHeads(
            self.model.vision.vl_connector.pad_embed.shape[1], self.model.text.config.hidden_size
        ).to(self.device)
        matrices, others = split_parameters(self.model)
        others += list(self.heads.parameters())
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=options.rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        if options.start is not None:
            self.model.load_state_dict(JinaVlm.load(options.start).state_dict())
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.step = 0
        self.next_seed = 0
        self._load()

    @property
    def _state_file(self) -> Path:
        return self.options.work / "state.pt"

    def _load(self) -> None:
        if not self._state_file.exists():
            return
        state: dict[str, Any] = torch.load(self._state_file, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.next_seed = state["step"], state["next_seed"]
        print(f"going on from step {self.step}", flush=True)

    def save(self) -> None:
        """The whole state for going on, and the averaged weights as a checkpoint."""
        self.options.work.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "next_seed": self.next_seed,
        }
        part = self._state_file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self._state_file)
        averaged = JinaVlm.from_json(model_config(), tied=True)
        averaged.load_state_dict(self.average)
        save_weights(averaged, self.options.output)

    def train_step(self, batch: Batch) -> dict[str, float]:
        options = self.options
        rate = options.rate * rate_at(self.step, options)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        use_bfloat16 = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=use_bfloat16):
            states = self.model.vision.encode(batch.float_crops())
            features = self.model.vision.vl_connector(states, batch.is_last)
            auxiliary, characters = self.heads.loss(features.float(), batch.labels)
            fine = self.heads.patch_loss(states.float(), batch.patch_labels)
            report = {
                "aux": auxiliary.detach(),
                "patch": fine.detach(),
                "chars": characters.detach(),
            }
            auxiliary = auxiliary + fine
            if self.step < options.pretrain or len(batch.targets) == 0:
                loss = auxiliary
            else:
                scores = answer_scores(self.model, batch, features)
                answer = F.cross_entropy(scores.float(), batch.targets)
                share = 0.5 if self.step < options.steps * (1 - options.decay) else 0.2
                loss = answer + share * auxiliary
                report["answer"] = answer.detach()
                right = question_is_right(scores, batch).float()
                for index, family in enumerate(FAMILIES):
                    here = batch.family == index
                    if here.any():
                        report[family] = right[here].mean()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        keep = min(0.998, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - keep)
        return {name: float(value) for name, value in report.items()}

    def to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        moved = {k: v.to(self.device, non_blocking=True) for k, v in vars(batch).items()}
        return Batch(**moved)

    def run(self) -> None:
        options = self.options
        pictures = Pictures(options, self.next_seed)
        started = saved = time.monotonic()
        smooth: dict[str, float] = {}
        first_step = self.step
        try:
            while self.step < options.steps:
                batch = self.to_device(pictures.batch())
                for name, value in self.train_step(batch).items():
                    if value == value:  # a batch may hold no character at all
                        smooth[name] = 0.97 * smooth.get(name, value) + 0.03 * value
                self.next_seed = pictures.next_seed
                now = time.monotonic()
                if self.step % 20 == 0:
                    pace = (self.step - first_step) / (now - started)
                    report = " ".join(f"{name} {value:.3f}" for name, value in smooth.items())
                    print(
                        f"step {self.step}/{options.steps} {pace:.2f}/s"
                        f" pictures {self.next_seed} {report}",
                        flush=True,
                    )
                if now - saved > 120:
                    self.save()
                    saved = now
                if options.minutes and now - started > options.minutes * 60:
                    break
        finally:
            pictures.close()
            self.save()


def main() -> None:
    options = parse(sys.argv[1:])
    if options.threads:
        torch.set_num_threads(options.threads)
    # Also in the background: end in order, with the state saved.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1))
    Trainer(options).run()


if __name__ == "__main__":
    main()

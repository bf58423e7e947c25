"""Short measurements that find the best engine settings of a bundle on this machine.

One setting after the other: the value in use and a candidate are measured in turns, so that what
else the machine does falls on both, and the candidate has to be faster by a margin. The margin is
wider where a candidate takes more memory, moves the logits or suffers beside other programs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edge_vlm.answering.trial import try_once
from edge_vlm.bundle.checksums import verify
from edge_vlm.bundle.manifest import Bundle, Manifest
from edge_vlm.machine.engine_settings import EngineSettings
from edge_vlm.machine.hardware import default_threads, usable_cores
from edge_vlm.machine.memory import can_forget
from edge_vlm.machine.settings import MachineSettings
from edge_vlm.measure.bench import now, versions
from edge_vlm.measure.worker import Worker
from edge_vlm.planning.speeds import Speeds
from edge_vlm.planning.tuning import Tuning, engines_for

Progress = Callable[[int, int], None]  # candidates done, candidates in total
Measure = Callable[[EngineSettings], float]  # seconds

# Positions measured for a candidate: enough for attention to have the part it has with a picture.
PROMPT, ANSWER = 768, 16
FINAL_PROMPT = 1024  # for the speeds that predictions use
PAIRS = 3  # measurements of each of two values, at most
HOPELESS = 1.15  # a candidate slower by so much after one pair is measured no more
# What a typical request consists of: a picture's tokens, and a short answer.
TYPICAL_PROMPT, TYPICAL_ANSWER = 1744, 100

MARGINS = {
    "repack": 0.05,  # memory that the system cannot take back
    "flash_attention": 0.05,  # memory, or logits that move
    "batch_size": 0.05,  # larger compute buffers
    "mmap": 0.1,  # the same
    "spinning": 0.15,  # several times slower beside another program
    "vision_streams": 0.05,  # a larger arena
    "tiles_per_call": 0.05,  # a larger arena
}
DEFAULT_MARGIN = 0.03


def tune(
    model: Path, settings: MachineSettings | None = None, *, progress: Progress | None = None
) -> Tuning:
    """Find the best settings; nothing is stored.

    Args:
        model: a bundle's folder.
        settings: what is given in them is not varied.
        progress: called with the number of candidates tried.

    Raises:
        BundleError: the bundle is damaged.
        EdgeVLMError: a measurement failed.
    """
    settings = settings or MachineSettings.from_environment()
    bundle = Bundle.open(model)
    verify(bundle)
    try_once(bundle, settings, engines_for(bundle.manifest, settings))
    with ExitStack() as stack:
        return _Search(bundle, settings, stack, progress).run()


class _Search:
    def __init__(
        self,
        bundle: Bundle,
        settings: MachineSettings,
        stack: ExitStack,
        progress: Progress | None,
    ) -> None:
        self._model = str(bundle.path)
        self._manifest = bundle.manifest
        self._kv_type = settings.kv_type
        self._fixed = settings.fixed_engine_settings()
        self._best = engines_for(bundle.manifest, settings)
        self._progress = progress or (lambda _done, _total: None)
        self._stack = stack
        self._workers: dict[bool, Worker] = {}  # by spinning, which a process cannot change
        self._prompt = min(PROMPT, self._manifest.decoder.max_sequence_length - 2 * ANSWER)

    def run(self) -> Tuning:
        steps = list(_steps(self._best, self._manifest, self._fixed))
        total = sum(len(candidates) for _, _, candidates in steps) + 1
        done = 0
        for name, stage, candidates in steps:
            measure = getattr(self, f"_{stage}")
            for value in candidates:
                self._progress(done, total)
                done += 1
                candidate = replace(self._best, **{name: value})
                if value == getattr(self._best, name):
                    continue
                if name == "repack" and "mmap" not in self._fixed:
                    candidate = self._best.with_repack(value)
                if name == "mmap" and candidate.mmap and candidate.repack and not can_forget():
                    continue  # two copies
                if _is_faster(measure, self._best, candidate, MARGINS.get(name, DEFAULT_MARGIN)):
                    self._best = candidate
                elif name in ("threads", "prefill_threads", "vision_threads", "tiles_per_call"):
                    done += len(candidates) - candidates.index(value) - 1
                    break  # what follows lies further in the same direction
        self._progress(total - 1, total)
        speeds = self._speeds()
        self._progress(total, total)
        return Tuning(self._best, speeds, versions(), now())

    def _worker(self, engines: EngineSettings) -> Worker:
        if engines.spinning not in self._workers:
            self._workers[engines.spinning] = self._stack.enter_context(Worker())
        return self._workers[engines.spinning]

    def _decode_once(
        self,
        engines: EngineSettings,
        prompt: int,
        answer: int = ANSWER,
        kv_type: str | None = None,
    ) -> dict[str, Any]:
        return self._worker(engines).measure(
            "decoder",
            model=self._model,
            engines=asdict(engines),
            kv_type=kv_type or self._kv_type,
            prompt=prompt,
            answer=answer,
        )

    def _prefill(self, engines: EngineSettings) -> float:
        return float(self._decode_once(engines, self._prompt, answer=1)["prefill"])

    def _decode(self, engines: EngineSettings) -> float:
        return float(self._decode_once(engines, prompt=8, answer=2 * ANSWER)["decode"])

    def _request(self, engines: EngineSettings) -> float:
        found = self._decode_once(engines, self._prompt)
        prefill, decode = found["prefill"] / self._prompt, found["decode"] / ANSWER
        return float(TYPICAL_PROMPT * prefill + TYPICAL_ANSWER * decode)

    def _vision(self, engines: EngineSettings, crops: int = 4) -> float:
        found = self._worker(engines).measure(
            "vision", model=self._model, engines=asdict(engines), crops=crops
        )
        return float(found["vision"]) / crops

    def _everything(self, engines: EngineSettings) -> float:
        crops = self._manifest.image_processor.max_tiles + 1
        return self._request(engines) + crops * self._vision(engines)

    def _speeds(self) -> Speeds:
        best, longest = self._best, self._manifest.decoder.max_sequence_length
        prompt = min(FINAL_PROMPT, longest - 2 * ANSWER)
        runs = [self._decode_once(best, prompt, 2 * ANSWER) for _ in range(3)]
        quantized = self._decode_once(best, prompt, 1, "q8_0")["prefill"]
        tiles = [self._vision(best) for _ in range(3)]
        with Worker() as fresh:
            load = fresh.measure("load", model=self._model, engines=asdict(best))["load"]
        return Speeds(
            load_seconds=load,
            vision_seconds_per_tile=statistics.median(tiles),
            prefill_tokens_per_second=prompt / statistics.median(run["prefill"] for run in runs),
            prefill_tokens=prompt,
            decode_tokens_per_second=2 * ANSWER / statistics.median(run["decode"] for run in runs),
            decode_positions=prompt + ANSWER,
            quantized_prefill_tokens_per_second=prompt / quantized,
        )


def _steps(
    start: EngineSettings, manifest: Manifest, fixed: set[str]
) -> Iterator[tuple[str, str, Sequence[Any]]]:
    """Name of a setting, what to measure, and values to try, the likeliest to be better first."""
    physical, logical = default_threads(), usable_cores()
    fewer = [n for n in dict.fromkeys((physical - 1, physical // 2)) if n > 0]
    steps: list[tuple[str, str, Sequence[Any]]] = [
        ("repack", "request", (not start.repack,)),
        ("flash_attention", "request", ("prefill", "off", "on")),
        ("batch_size", "prefill", (512, 256, 128, 64)),
        ("prefill_threads", "prefill", (logical,)),
        ("threads", "decode", fewer),
        ("mmap", "request", (not start.mmap,)),
        ("vision_threads", "vision", (logical,)),
        ("vision_streams", "vision", (2, 1, physical)),
        ("tiles_per_call", "vision", (2, 4)),
        ("spinning", "everything", (not start.spinning,)),
    ]
    for name, stage, candidates in steps:
        if name == "tiles_per_call" and manifest.vision.precision == "int8":
            continue  # tiles would share the range they are quantized in
        useful = [value for value in candidates if value != getattr(start, name)]
        if name not in fixed and useful:
            yield name, stage, useful


def _is_faster(
    measure: Measure, current: EngineSettings, candidate: EngineSettings, margin: float
) -> bool:
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(PAIRS):
        ours.append(measure(current))
        theirs.append(measure(candidate))
        if min(theirs) > HOPELESS * min(ours):
            return False
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios) < 1 - margin

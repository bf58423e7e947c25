"""Eight threads ask, cancel and close at random: no crash, no hang, right answers, flat memory.

    python -m tests.stress --minutes 20

In a round, a model is loaded and each thread asks 25 questions in an order of its own, with
``ask``, ``stream``, ``chat``, ``encode`` or in a loop of asyncio. Some are cancelled or closed on
the way, by another thread, and in every other round so is the model. What is answered all the same
has to be what was answered before, one question after the other and without a cache. Memory is that
of the process, looked at ten times a second; the median of its peaks in the last third of the
rounds may be 5 % over that in the first. A hang ends in the traces of all threads.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import gc
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from edge_vlm import (
    Answer,
    AsyncEdgeVLM,
    Cancelled,
    CancelToken,
    DecoderError,
    EdgeVLM,
    MachineSettings,
)
from edge_vlm.machine.memory import give_back_memory

IMAGES = Path(__file__).parents[1] / "examples" / "images"
N_THREADS, N_QUESTIONS, HANG_SECONDS = 8, 25, 240
GROWTH, MIN_ROUNDS = 1.05, 12  # peaks of fewer rounds say little: they differ by 20 %
Request = tuple[tuple[str, ...], str, dict[str, Any]]


def requests() -> list[Request]:
    """25 of them; some with a form, some with two pictures or none."""
    names = sorted(path.name for path in IMAGES.glob("*.png"))[:6]
    found: list[Request] = [
        ((name,), question, {})
        for name in names
        for question in ("What is it?", "What is the total?", "Which date is printed?")
    ]
    schema = {"type": "object", "properties": {"total": {"type": "number"}}, "required": ["total"]}
    found += [
        ((), "Hello", {"max_tokens": 40, "regex": "[a-z]{30}"}),
        ((), "What is a barometer?", {"max_tokens": 20}),
        ((names[0],), "Is it a receipt?", {"choices": ["yes", "no"]}),
        ((names[1],), "What is the total?", {"schema": schema, "max_tokens": 30}),
        ((names[0], names[1]), "What changed?", {"max_tokens": 20}),
        ((names[2],), "Describe it.", {"max_tokens": 60, "seed": 3, "temperature": 0.8}),
        ((names[3],), "Describe it.", {"max_tiles": 2}),
    ]
    return found[:N_QUESTIONS]


class Peak:
    """The largest memory of this process so far, in bytes."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.bytes = 0
        threading.Thread(target=self._look, daemon=True).start()

    @property
    def now(self) -> int:
        """Bytes."""
        return int(self._process.memory_info().rss)

    def _look(self) -> None:
        while True:
            self.bytes = max(self.bytes, self.now)
            time.sleep(0.1)


class Round:
    """One model and the threads that use it."""

    def __init__(
        self, model: EdgeVLM, expected: list[Answer], rng: random.Random, closes: bool
    ) -> None:
        self.model, self.expected, self.closes = model, expected, closes
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._seeds = [rng.random() for _ in range(N_THREADS)]
        self._delay = rng.uniform(0.2, 6)

    def run(self) -> None:
        """To the end of all threads; a timer closes the model, if it is closed."""
        threads = [threading.Thread(target=self._work, args=(seed,)) for seed in self._seeds]
        for thread in threads:
            thread.start()
        if self.closes:
            time.sleep(self._delay)
            self.model.close()
        for thread in threads:
            thread.join()
        self.model.close()

    def _work(self, seed: float) -> None:
        rng = random.Random(seed)
        order = list(enumerate(requests()))
        rng.shuffle(order)
        for number, request in order:
            way = rng.choice(WAYS)
            try:
                answer = way(self.model, request, rng)
            except Cancelled:
                self.outcomes["cancelled"] += 1
            except DecoderError as error:
                self.outcomes[str(error)] += 1
                if "was closed" not in str(error):
                    self.wrong.append(f"{way.__name__}: {error}")
            except BaseException as error:
                self.wrong.append(f"{way.__name__}: {error!r}")
            else:
                self.outcomes["answered"] += 1
                wanted = self.expected[number]
                if (answer.answer, answer.token_ids) != (wanted.answer, wanted.token_ids):
                    self.wrong.append(f"{way.__name__} {request}: {answer.answer!r}, {wanted!s}")


def pictures(request: Request) -> list[Any]:
    """The files."""
    return [IMAGES / name for name in request[0]]


@contextlib.contextmanager
def soon(action: Callable[[], None], rng: random.Random) -> Iterator[None]:
    """Another thread does it within half a second, or before the end."""
    timer = threading.Timer(rng.uniform(0, 0.5), action)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def ask(model: EdgeVLM, request: Request, rng: random.Random) -> Answer:
    """To the end."""
    return model.ask(pictures(request), request[1], **request[2])


def ask_and_cancel(model: EdgeVLM, request: Request, rng: random.Random) -> Answer:
    """From another thread."""
    cancel = CancelToken()
    with soon(cancel.set, rng):
        return model.ask(pictures(request), request[1], cancel=cancel, **request[2])


def stream_and_close(model: EdgeVLM, request: Request, rng: random.Random) -> Answer:
    """From another thread."""
    with model.stream(pictures(request), request[1], **request[2]) as stream:
        with soon(stream.close, rng):
            for _ in stream:
                time.sleep(0.002)
        return stream.answer


def leave_a_stream(model: EdgeVLM, request: Request, rng: random.Random) -> Answer:
    """After a piece; then to the end."""
    next(model.stream(pictures(request), request[1], **request[2]), None)
    return ask(model, request, rng)


def chat_twice(model: EdgeVLM, request: Request, rng: random.Random) -> Answer:
    """The same once more, as if it were the first time."""
    with model.chat(**request[2]) as chat:
        chat.ask(pictures(request), request[1])
        chat.undo()
        return chat.ask(pictures(request), request[1])


def chat_and_close(model: EdgeVLM, request: Request, rng: random.Random) -> Answer:
    """From another thread, which tries to change it, too."""
    chat = model.chat(**request[2])

    def meddle() -> None:
        for change in (chat.undo, chat.restart):
            with contextlib.suppress(DecoderError):  # it is answering
                change()
        chat.close()

    with soon(meddle, rng):
        return chat.ask(pictures(request), request[1])


def encode_first(model: EdgeVLM, request: Request, rng: random.Random) -> Answer:
    """Pictures by themselves."""
    options = {k: v for k, v in request[2].items() if k == "max_tiles"}
    seen = [model.encode(picture, **options) for picture in pictures(request)]
    return model.ask(seen, request[1], **request[2])


def in_a_loop(model: EdgeVLM, request: Request, rng: random.Random) -> Answer:
    """As a task, which may be cancelled."""

    async def main() -> Answer:
        work = AsyncEdgeVLM(model).ask(pictures(request), request[1], **request[2])
        try:
            return await asyncio.wait_for(work, rng.uniform(0.05, 3))
        except asyncio.TimeoutError:
            raise Cancelled("too late") from None

    return asyncio.run(main())


WAYS: list[Callable[[EdgeVLM, Request, random.Random], Answer]] = [
    *(ask, ask_and_cancel, stream_and_close, leave_a_stream),
    *(chat_twice, chat_and_close, encode_first, in_a_loop),
]


def stress(minutes: float, seed: int = 0, model: str = "demo") -> dict[str, Any]:
    """Rounds for so long, one at least; what was found.

    Returns:
        rounds, outcomes and how often, what was wrong, and peaks of memory in MB.
    """
    rng, peak = random.Random(seed), Peak()
    until = time.monotonic() + 60 * minutes
    with EdgeVLM.load(model, settings=MachineSettings(cache=None)) as alone:
        expected = [ask(alone, request, rng) for request in requests()]
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    peaks: list[float] = []
    rests: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        while not peaks or time.monotonic() < until:
            number = len(peaks)
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            settings = MachineSettings(
                cache=folder if number % 4 < 2 else None,
                residency="in-turns" if number % 3 == 2 else "together",
                tile_memory=rng.choice((0, 128 << 20)),
            )
            peak.bytes = 0
            loaded = EdgeVLM.load(model, settings=settings)
            one = Round(loaded, expected, rng, closes=number % 2 == 1)
            one.run()
            outcomes += one.outcomes
            wrong += one.wrong
            peaks.append(peak.bytes / 1e6)
            del loaded, one
            gc.collect()
            give_back_memory()
            rests.append(peak.now / 1e6)
            print(
                f"round {number}: peak {peaks[-1]:.0f} MB, then {rests[-1]:.0f} MB,"
                f" {dict(outcomes)}, {len(wrong)} wrong",
                file=sys.stderr,
            )
    faulthandler.cancel_dump_traceback_later()
    third = max(1, len(peaks) // 3)
    first, last = median(peaks[:third]), median(peaks[-third:])
    return {
        "rounds": len(peaks),
        "outcomes": dict(outcomes),
        "wrong": wrong,
        "largest_peak_mb": round(max(peaks), 1),
        "median_peak_mb_first_third": round(first, 1),
        "median_peak_mb_last_third": round(last, 1),
        "closed_mb_first_round": round(rests[0], 1),
        "closed_mb_last_round": round(rests[-1], 1),
        "memory_is_flat": last <= GROWTH * first if len(peaks) >= MIN_ROUNDS else None,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="demo")
    found = stress(**vars(parser.parse_args()))
    print(json.dumps(found, indent=2))
    raise SystemExit(bool(found["wrong"]) or found["memory_is_flat"] is False)


if __name__ == "__main__":
    main()

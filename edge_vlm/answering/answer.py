"""What comes back: the answer with its counters."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from edge_vlm.pictures.picture import ImageUse


@dataclass(frozen=True)
class Timings:
    """Seconds, and tokens per second."""

    load: float
    vision: float
    prefill: float
    decode: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass
class Clock:
    """Seconds of a turn's stages, gathered while it runs."""

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0

    def timings(self, load: float, n_prefilled: int, n_decoded: int) -> Timings:
        """With the seconds of loading, and the positions and tokens that were computed."""
        return Timings(
            load=load,
            vision=self.vision,
            prefill=self.prefill,
            decode=self.decode,
            prefill_tokens_per_second=_rate(n_prefilled, self.prefill),
            decode_tokens_per_second=_rate(n_decoded, self.decode),
        )


@dataclass(frozen=True)
class Answer:
    """An answer and what it took."""

    answer: str
    token_ids: tuple[int, ...]  # as generated, without the stop token
    finish_reason: str  # "stop", "length" (max_tokens or the KV budget was reached) or "cancelled"
    prompt_tokens: int  # positions of the prompt, image tokens included
    cached_tokens: int  # of them, those an earlier turn left in the KV cache, or kept on disk
    restored_tokens: int  # of those, the ones that came from disk
    image_tokens: int
    images: tuple[ImageUse, ...]
    encoded_crops: int  # computed for this answer
    cached_crops: int  # needed for it, but known from an earlier picture or process
    timings: Timings
    kv_bytes: int  # allocated for the KV cache
    peak_rss_bytes: int  # of this process so far
    parsed: Any = None  # with a schema: the value, or an instance of the pydantic model
    choices: dict[str, float] | None = None  # with choices: the probability of each

    def __str__(self) -> str:
        return self.answer

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``."""
        data = dataclasses.asdict(dataclasses.replace(self, parsed=None))
        if self.parsed is not None:
            from pydantic_core import to_jsonable_python

            data["parsed"] = to_jsonable_python(self.parsed)
        return data


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0

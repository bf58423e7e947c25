"""What one call wants, and what comes back: the answer with its counters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from edge_vlm.errors import PromptError
from edge_vlm.planning.budget import DEFAULT_MAX_TOKENS

if TYPE_CHECKING:
    from edge_vlm.engines import Decoder, VisionTower
    from edge_vlm.forms.structure import Form
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.pictures.picture import ImageUse
    from edge_vlm.progress import CancelToken, OnProgress


@dataclass(frozen=True)
class AskOptions:
    """Options of one answer.

    Raises:
        PromptError: a value is out of its range; the message names it.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS  # of the answer
    temperature: float = 0.0  # 0 takes the likeliest token each time (greedy)
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the likeliest
    seed: int | None = None  # of the sampler; None draws one
    max_tiles: int | None = None  # crops besides the thumbnail; None for the model's maximum
    crop: Any = None  # the part of each picture to look at, see pictures.sources.parse_crop
    within: float | None = None  # seconds to the first token; limits tiles, needs a tuning
    system: str | None = None  # a system message in front of the conversation
    loop_guard: bool = True  # end an answer that says the same over and over, unless it has a form
    # What the answer must be; at most one of them.
    schema: Any = None  # JSON Schema as plain data, or a pydantic model or other type
    choices: Sequence[str] | None = None  # one of these, with the probability of each
    regex: str | None = None  # a full match of this pattern of Python's re
    form: Form | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, (kind, low, high) in _RANGES.items():
            value, default = getattr(self, name), getattr(AskOptions, name)
            if value is not None or default is not None:
                _check(name, value, kind, low, high)
        if self.crop is not None:
            from edge_vlm.pictures.sources import parse_crop

            parse_crop(self.crop)
        if self.system is not None and not isinstance(self.system, str):
            raise PromptError("system: must be a string")
        if not isinstance(self.loop_guard, bool):
            raise PromptError(f"loop_guard: must be True or False, not {self.loop_guard!r}")
        wanted = [n for n in ("schema", "choices", "regex") if getattr(self, n) is not None]
        if len(wanted) > 1:
            raise PromptError(f"{wanted[0]} and {wanted[1]}: give one of them")
        if wanted:
            if self.choices is not None:
                from edge_vlm.forms.choices import check_choices

                object.__setattr__(self, "choices", check_choices(self.choices))
            else:
                from edge_vlm.forms.structure import form_of

                object.__setattr__(self, "form", form_of(self.schema, self.regex))


class AskKeywords(TypedDict, total=False):
    """Options of an answer as keywords; see ``AskOptions`` for what they mean."""

    max_tokens: int
    temperature: float
    top_p: float
    min_p: float
    seed: int | None
    max_tiles: int | None
    crop: Any
    within: float | None
    system: str | None
    loop_guard: bool
    schema: Any
    choices: Sequence[str] | None
    regex: str | None


class LoadKeywords(TypedDict, total=False):
    """How a bundle is loaded; see ``EdgeVLM.load``."""

    settings: MachineSettings | None
    progress: OnProgress | None
    vision: VisionTower | None
    decoder: Decoder | None


class TurnKeywords(AskKeywords, total=False):
    """And how the call is watched and stopped."""

    progress: OnProgress | None  # called after each tile, batch and token
    cancel: CancelToken | None  # set it from another thread to stop


class RequestKeywords(TurnKeywords, total=False):
    """And a whole conversation in OpenAI's form, instead of pictures and a question."""

    messages: Any


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
        done = (n_prefilled, self.prefill), (n_decoded, self.decode)
        rates = (n / seconds if seconds > 0 else 0.0 for n, seconds in done)
        return Timings(load, self.vision, self.prefill, self.decode, *rates)


@dataclass(frozen=True)
class Answer:
    """An answer and what it took."""

    answer: str
    token_ids: tuple[int, ...]  # as generated, without the stop token
    # "stop", "length" (max_tokens or the KV budget was reached), "cancelled", or "repetition" (it
    # said the same over and over: text and ids end before the first repeat)
    finish_reason: str
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


_WHOLE, _ANY = "a whole number", "a number"
_RANGES = {
    "max_tokens": (_WHOLE, 1, 1 << 20),
    "temperature": (_ANY, 0, 100),
    "top_p": (_ANY, 0, 1),
    "min_p": (_ANY, 0, 1),
    "seed": (_WHOLE, 0, (1 << 32) - 1),
    "max_tiles": (_WHOLE, 1, 1024),
    "within": (_ANY, 1e-3, 1e6),
}


def _check(name: str, value: Any, kind: str, low: float, high: float) -> None:
    is_kind = isinstance(value, int if kind == _WHOLE else (int, float))
    if not is_kind or isinstance(value, bool) or not low <= value <= high:  # a NaN is not, either
        raise PromptError(f"{name}: must be {kind} from {low} to {high}, not {value!r}")

"""``edge-vlm ask``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edge_vlm.cli.options import (
    FILE,
    answer_options,
    cached_image_options,
    crop_option,
    machine_settings,
    model_option,
    output_options,
)
from edge_vlm.cli.questions.words import AboutPictures, split_words
from edge_vlm.cli.session import session
from edge_vlm.cli.streams import say, write_answer, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge_vlm.answering.answer import Answer
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.progress import CancelToken, OnProgress


@click.command("ask", cls=AboutPictures)
@click.argument("words", nargs=-1, metavar="IMAGE... QUESTION")
@model_option
@click.option(
    "--messages",
    type=FILE,
    metavar="FILE.json",
    help="Answer a whole conversation in OpenAI's form instead ('-' reads stdin); a QUESTION"
    " continues it.",
)
@click.option(
    "--schema",
    type=FILE,
    metavar="FILE.json",
    help="Answer in JSON that is valid under this JSON Schema.",
)
@click.option(
    "--choices",
    metavar="A,B,...",
    help="Answer with the likeliest of these; --json and -v give the probability of each.",
)
@click.option(
    "--regex", metavar="PATTERN", help="Answer with a full match of this regular expression."
)
@crop_option
@answer_options
@cached_image_options
@output_options
def command(
    words: tuple[str, ...],
    model: str | None,
    messages: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer QUESTION about pictures; they come first, the question last.

    '-' reads a picture from stdin. Without a picture the question alone is answered. URLs are not
    fetched. 'report.pdf#page=3' is a page, '#page=1-3' are several, 'film.gif#frame=2' is a frame.

    \b
    edge-vlm ask receipt.jpg "What is the total?"
    edge-vlm ask before.png after.png "What changed?"
    edge-vlm ask --crop 50%,0%,50%,25% page.png "What is the date?"
    edge-vlm ask --json --max-tiles 4 page.png "Summarize this." | jq -r .answer
    """
    request = _request(words, messages)
    from edge_vlm.answering.answer import AskOptions
    from edge_vlm.cli.choose import LostDetail, pick_model

    settings, wanted = machine_settings(options)
    if "schema" in wanted:
        from edge_vlm.forms.structure import MAX_SCHEMA_BYTES
        from edge_vlm.prompt.transcript import read_json

        wanted["schema"] = read_json(wanted["schema"], MAX_SCHEMA_BYTES)
    if "choices" in wanted:
        wanted["choices"] = [choice.strip() for choice in wanted["choices"].split(",")]
    AskOptions(**wanted)  # says what is wrong before a model is loaded
    answer = _run(pick_model(model), settings, request | wanted, echo=not as_json)
    if as_json:
        write_json(answer.to_dict())
    else:
        write_answer("\n")
        if answer.finish_reason == "repetition":
            say("stopped: it said the same over and over; --no-loop-guard lets it go on")
    LostDetail().note(answer.images)
    if session().verbose:
        _report(answer)


def _request(words: tuple[str, ...], messages: str | None) -> dict[str, Any]:
    """Arguments for ``EdgeVLM.stream``."""
    if messages is not None:
        if len(words) > 1:
            raise click.UsageError("--messages replaces images and question; give one or the other")
        from edge_vlm.prompt.transcript import MAX_BYTES, read_json

        talk = read_json(messages, MAX_BYTES)
        if words:
            talk = talk.get("messages") if isinstance(talk, dict) else talk
            following = {"role": "user", "content": words[0]}
            talk = [*talk, following] if isinstance(talk, list) else talk
        return {"messages": talk}
    images, question = split_words(words)
    from edge_vlm.cli.choose import picture_source

    return {"images": [picture_source(image) for image in images], "question": question}


def _run(
    model: str | None, settings: MachineSettings, request: dict[str, Any], *, echo: bool
) -> Answer:
    from edge_vlm.cli.interrupt import run_interruptibly

    def work(cancel: CancelToken, progress: OnProgress) -> Iterator[str | Answer]:
        from edge_vlm.answering.model import EdgeVLM

        with (
            EdgeVLM.load(model, settings=settings, progress=progress) as vlm,
            vlm.stream(**request, progress=progress, cancel=cancel) as stream,
        ):
            yield from stream
            yield stream.answer

    for event in run_interruptibly(work):
        if not isinstance(event, str):
            answer: Answer = event
        elif echo:
            write_answer(event)
    return answer


def _report(answer: Answer) -> None:
    for choice, probability in (answer.choices or {}).items():
        say(f"{probability:.4f} {choice}")
    for image in answer.images:
        size = f"{image.size[0]}x{image.size[1]}"
        reduced = ", reduced" if image.reduced else ""
        hidden = {"white": ", white behind hidden pixels", "drop": ", hidden pixels as stored"}
        reduced += hidden.get(image.alpha or "", "")
        say(
            f"image {size}: used at {image.resized[0]}x{image.resized[1]}{reduced}, tiling"
            f" {image.tiling[0]}x{image.tiling[1]}, {image.crops} crops"
        )
    times = answer.timings
    say(
        f"prompt {answer.prompt_tokens} tokens ({answer.image_tokens} of images),"
        f" answer {len(answer.token_ids)} tokens ({answer.finish_reason})\n"
        f"cache: {answer.restored_tokens} tokens of the prompt,"
        f" {answer.cached_crops} of {answer.cached_crops + answer.encoded_crops} crops needed\n"
        f"load {times.load:.2f} s, vision {times.vision:.2f} s,"
        f" prefill {times.prefill:.2f} s ({times.prefill_tokens_per_second:.0f} tokens/s),"
        f" decode {times.decode:.2f} s ({times.decode_tokens_per_second:.1f} tokens/s)\n"
        f"KV cache {answer.kv_bytes / 1e6:.1f} MB,"
        f" peak memory {answer.peak_rss_bytes / 1e6:.0f} MB"
    )

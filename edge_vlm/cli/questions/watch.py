"""``edge-vlm watch``."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_vlm.cli.options import (
    UserPath,
    answer_options,
    cached_image_options,
    crop_option,
    machine_settings,
    model_option,
    verbose_option,
)
from edge_vlm.cli.questions.words import AboutPictures
from edge_vlm.cli.streams import say, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.pictures.frames import Source
    from edge_vlm.progress import CancelToken, OnProgress


@click.command("watch", cls=AboutPictures)
@click.argument("question")
@click.option(
    "--dir",
    "folder",
    type=UserPath(path_type=Path),
    metavar="FOLDER",
    help="Answer for each picture that appears or changes in a folder.",
)
@click.option(
    "--camera",
    type=click.IntRange(0, 1000),
    metavar="N",
    help="Look through a camera; 0 is the first.",
)
@click.option(
    "--command",
    "program",
    metavar="COMMAND",
    help="Run a program, which writes a picture to stdout, for each frame. No shell is used.",
)
@click.option(
    "--every",
    type=click.FloatRange(0, 86400),
    default=1.0,
    metavar="SECONDS",
    help="Time between two frames, or two looks into the folder (default 1).",
)
@click.option("--existing", is_flag=True, help="Begin with the pictures already in the folder.")
@click.option(
    "--when-changed", is_flag=True, help="Say nothing about a frame like the last one answered."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 255),
    default=0.0,
    metavar="LEVELS",
    help="Grey levels by which a part of 16x16 pixels may differ and still be like it"
    " (default 0: no pixel differs). A camera's noise needs 2 or 3.",
)
@click.option("--count", type=click.IntRange(1), help="Stop after so many lines.")
@model_option
@crop_option
@answer_options
@cached_image_options
@verbose_option
def command(
    question: str,
    folder: Path | None,
    camera: int | None,
    program: str | None,
    every: float,
    existing: bool,
    count: int | None,
    when_changed: bool,
    tolerance: float,
    model: str | None,
    **options: Any,
) -> None:
    """Answer QUESTION about each new picture, one line of JSON for each.

    Only tiles that were not in an earlier frame are encoded; answers are those that 'edge-vlm ask'
    gives. Nothing is kept on disk. Ctrl-C ends it.

    \b
    edge-vlm watch --dir /srv/door "Is a person to be seen?" | jq -r .answer
    edge-vlm watch --camera 0 --every 10 --when-changed --tolerance 3 "What changed?"
    edge-vlm watch --command "grim -t png -" --every 5 "Is there an error message?"
    """
    if sum(source is not None for source in (folder, camera, program)) != 1:
        raise click.UsageError("give one of --dir, --camera and --command")
    if not question.strip():
        raise click.UsageError("the question is empty")
    if existing and folder is None:
        raise click.UsageError("--existing goes with --dir")
    from edge_vlm.answering.answer import AskOptions
    from edge_vlm.cli.choose import pick_model
    from edge_vlm.pictures.frames import Camera, Command, Folder

    settings, wanted = machine_settings(options)
    settings = dataclasses.replace(settings, cache=None)
    AskOptions(**wanted)  # says what is wrong before a model is loaded
    source: Source
    if folder is not None:
        how: dict[str, Any] = {"skipped": say}
        source = Folder(folder, every=every, existing=existing, settings=settings, **how)
    elif camera is not None:
        source = Camera(camera, every=every)
    else:
        source = Command(str(program), every=every, settings=settings)
    wanted |= {"when_changed": when_changed, "tolerance": tolerance}
    _run(pick_model(model), settings, source, question, count, wanted)


def _run(
    model: str | None,
    settings: MachineSettings,
    source: Source,
    question: str,
    count: int | None,
    wanted: dict[str, Any],
) -> None:
    from edge_vlm.cli.choose import LostDetail
    from edge_vlm.cli.interrupt import run_interruptibly
    from edge_vlm.pictures.picture import ImageUse

    def work(cancel: CancelToken, progress: OnProgress) -> Iterator[dict[str, Any]]:
        from edge_vlm.answering.model import EdgeVLM
        from edge_vlm.answering.watch import watch

        with (
            EdgeVLM.load(model, settings=settings, progress=progress) as vlm,
            contextlib.closing(
                watch(vlm, source, question, cancel=cancel, progress=progress, **wanted)
            ) as lines,
        ):
            yield from itertools.islice(lines, count)

    lost_detail = LostDetail()
    for line in run_interruptibly(work):
        lost_detail.note(ImageUse(**use) for use in line.get("images", ()))
        write_json(line)

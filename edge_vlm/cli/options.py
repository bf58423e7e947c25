"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from edge_vlm.cli.session import Session
from edge_vlm.machine.engine_settings import KV_TYPES
from edge_vlm.machine.folders import user_path
from edge_vlm.machine.providers import PROVIDER_CHOICES, parse_gpu_layers
from edge_vlm.machine.settings import ALPHA, RESIDENCIES, MachineSettings, parse_size

F = TypeVar("F", bound=Callable[..., Any])


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic only in newer clicks
    """What a function makes of the text; its ValueError says what is wrong with that."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse text; what is not text passes."""
        try:
            return self._parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


class UserPath(click.Path):
    """A path in which ``~`` is the user's home also where no shell saw it, as in a variable."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A ``Path``, or text if ``path_type`` says so."""
        has_home = os.fspath(value).startswith("~")
        return super().convert(user_path(value) if has_home else value, param, ctx)


FILE = UserPath(path_type=str)
SIZE = Parsed("size", parse_size)  # bytes, such as 530MB or 0.5GiB


def together(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """Several options as one decorator; help lists them in this order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _listen(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.call_on_close(ctx.ensure_object(Session).finish)
    ctx.ensure_object(Session).listen(value)


def _without_loop_guard(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.params["loop_guard"] = False


model_option = click.option(
    "--model",
    "-m",
    envvar="EDGE_VLM_MODEL",
    metavar="PATH_OR_NAME",
    help="Bundle to use (EDGE_VLM_MODEL); by default the one chosen with 'edge-vlm use', else"
    " the built-in demo.",
)
max_tiles_option = click.option(
    "--max-tiles",
    type=click.IntRange(1, 1024),
    help="Cut a picture into at most this many tiles, besides the thumbnail.",
)
crop_option = click.option(
    "--crop",
    metavar="X,Y,W,H",
    help="Look at this part of each picture, at full resolution: pixels, or per cent such as"
    " 10%,20%,50%,30%.",
)
max_tokens_option = click.option(
    "--max-tokens", type=click.IntRange(1, 1 << 20), help="Longest answer (default 512)."
)
ram_option = click.option(
    "--ram",
    type=SIZE,
    help="Stay below this much memory, such as 2GB: what makes that possible is chosen, and"
    " said (EDGE_VLM_RAM).",
)
within_option = click.option(
    "--within",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Use the most tiles that let the answer begin in this time; needs 'edge-vlm tune' once.",
)
no_cache_option = click.option(
    "--no-cache", is_flag=True, help="Compute everything anew and keep nothing on disk."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object for programs."
)
verbose_option = click.option(  # the command finds it as session().verbose
    "--verbose",
    "-v",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_listen,
    help="Say more on stderr, and more about errors.",
)
engine_options = together(
    click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads (EDGE_VLM_THREADS)."),
    click.option(
        "--kv-type",
        type=click.Choice(list(KV_TYPES)),
        help="Numbers of the KV cache (EDGE_VLM_KV_TYPE; default f16).",
    ),
    click.option(
        "--residency",
        type=click.Choice(RESIDENCIES),
        help="Vision tower and decoder in memory together, or one after the other, which loads"
        " the decoder for each picture (EDGE_VLM_RESIDENCY; default auto: in turns where memory"
        " is short).",
    ),
    ram_option,
)
output_options = together(json_option, verbose_option)
# What pictures are read.
image_options = together(
    click.option(
        "--allow-format",
        multiple=True,
        type=click.Choice(["TIFF", "AVIF"], case_sensitive=False),
        help="Read this format too; JPEG, PNG, WebP, BMP and GIF are read always.",
    ),
    click.option(
        "--alpha",
        type=click.Choice(ALPHA),
        help="Hidden pixels: white paper behind them, or drop their opacity and take the colours"
        " that are stored, as published (EDGE_VLM_ALPHA; default white).",
    ),
    click.option(
        "--dpi",
        type=click.IntRange(10, 1200),
        help="Resolution of a PDF's pages (EDGE_VLM_DPI; default 150).",
    ),
    click.option(
        "--max-pixels",
        type=SIZE,
        help="Refuse pictures with more pixels (EDGE_VLM_MAX_PIXELS; default 100M).",
    ),
)
cached_image_options = together(image_options, no_cache_option)
hardware_options = together(
    click.option(
        "--gpu-layers",
        type=Parsed("n|auto|all", parse_gpu_layers),
        help="Decoder layers on a GPU (EDGE_VLM_GPU_LAYERS; default auto: all, if llama.cpp"
        " was built for one).",
    ),
    click.option(
        "--provider",
        type=click.Choice(PROVIDER_CHOICES, case_sensitive=False),
        help="Where onnxruntime runs the vision tower (EDGE_VLM_PROVIDER; default auto).",
    ),
)
# How questions are answered, and with how much of the machine.
answer_options = together(
    click.option("--system", metavar="TEXT", help="System message before the conversation."),
    max_tokens_option,
    click.option(
        "--no-loop-guard",
        is_flag=True,
        expose_value=False,
        callback=_without_loop_guard,
        help="Let an answer go on that says the same over and over.",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(0, 100),
        help="Randomness; 0, the default, always takes the likeliest token.",
    ),
    click.option("--top-p", type=click.FloatRange(0, 1), help="Nucleus sampling (default 1: off)."),
    click.option(
        "--min-p",
        type=click.FloatRange(0, 1),
        help="Drop tokens less likely than this fraction of the likeliest (default 0: off).",
    ),
    click.option("--seed", type=click.IntRange(0, (1 << 32) - 1), help="Make sampling repeatable."),
    max_tiles_option,
    within_option,
    click.option(
        "--kv-budget", type=SIZE, help="Largest KV cache (EDGE_VLM_KV_BUDGET; default 530MB)."
    ),
    engine_options,
    hardware_options,
)


def machine_settings(options: dict[str, Any]) -> tuple[MachineSettings, dict[str, Any]]:
    """The machine's settings from a command's options, and what else was given.

    They are those of ``answer_options`` and ``cached_image_options``.

    Raises:
        InputError: one of them, or a variable of the environment, is out of its range.
    """
    engines = ("kv_type", "residency", "ram", "threads")
    others = ("kv_budget", "provider", "gpu_layers", "max_pixels", "alpha", "dpi")
    no_cache = options.pop("no_cache")
    settings = MachineSettings.from_environment(
        os.environ | ({"EDGE_VLM_CACHE": "off"} if no_cache else {}),
        **{name: options.pop(name) for name in (*engines, *others)},
        image_formats=options.pop("allow_format") or None,
    )
    if no_cache:
        settings = settings.without_cache()
    return settings, {name: value for name, value in options.items() if value is not None}

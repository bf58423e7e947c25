"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edge_vlm.cli.session import Session

if TYPE_CHECKING:
    from edge_vlm.machine.settings import MachineSettings

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only in newer clicks
    """Bytes, such as 530MB or 0.5GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse text; numbers pass."""
        from edge_vlm.machine.settings import parse_size

        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def model_option(function: F) -> F:
    """``--model``."""
    return click.option(
        "--model",
        "-m",
        envvar="EDGE_VLM_MODEL",
        metavar="PATH_OR_NAME",
        help="Bundle to use (EDGE_VLM_MODEL); by default the one chosen with 'edge-vlm use', else"
        " the built-in demo.",
    )(function)


def max_tiles_option(function: F) -> F:
    """``--max-tiles``."""
    return click.option(
        "--max-tiles",
        type=click.IntRange(1, 1024),
        help="Cut a picture into at most this many tiles, besides the thumbnail.",
    )(function)


def image_options(function: F) -> F:
    """What pictures are read."""
    for option in (
        click.option(
            "--max-pixels",
            type=Size(),
            help="Refuse pictures with more pixels (EDGE_VLM_MAX_PIXELS; default 100M).",
        ),
        click.option(
            "--allow-format",
            multiple=True,
            type=click.Choice(["TIFF", "AVIF"], case_sensitive=False),
            help="Read this format too; JPEG, PNG, WebP, BMP and GIF are read always.",
        ),
    ):
        function = option(function)
    return function


def kv_budget_option(function: F) -> F:
    """``--kv-budget``."""
    return click.option(
        "--kv-budget",
        type=Size(),
        help="Largest KV cache (EDGE_VLM_KV_BUDGET; default 530MB).",
    )(function)


class GpuLayers(click.ParamType):  # type: ignore[type-arg]  # generic only in newer clicks
    """A number of layers, auto or all."""

    name = "n|auto|all"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | int:
        """Parse text."""
        from edge_vlm.machine.providers import parse_gpu_layers

        try:
            return parse_gpu_layers(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def hardware_options(function: F) -> F:
    """``--provider`` and ``--gpu-layers``."""
    from edge_vlm.machine.providers import PROVIDER_CHOICES

    for option in (
        click.option(
            "--provider",
            type=click.Choice(PROVIDER_CHOICES, case_sensitive=False),
            help="Where onnxruntime runs the vision tower (EDGE_VLM_PROVIDER; default auto).",
        ),
        click.option(
            "--gpu-layers",
            type=GpuLayers(),
            help="Decoder layers on a GPU (EDGE_VLM_GPU_LAYERS; default auto: all, if llama.cpp"
            " was built for one).",
        ),
    ):
        function = option(function)
    return function


def no_cache_option(function: F) -> F:
    """``--no-cache``."""
    return click.option(
        "--no-cache", is_flag=True, help="Compute everything anew and keep nothing on disk."
    )(function)


def ram_option(function: F) -> F:
    """``--ram``."""
    return click.option(
        "--ram",
        type=Size(),
        help="Stay below this much memory, such as 2GB: what makes that possible is chosen, and"
        " said (EDGE_VLM_RAM).",
    )(function)


def within_option(function: F) -> F:
    """``--within``."""
    return click.option(
        "--within",
        type=click.FloatRange(0, min_open=True),
        metavar="SECONDS",
        help="Use the most tiles that let the answer begin in this time; needs 'edge-vlm tune'"
        " once.",
    )(function)


ENGINE_OPTIONS = ("kv_type", "residency", "ram")


def engine_options(function: F) -> F:
    """``--threads`` and those in ``ENGINE_OPTIONS``."""
    for option in (
        ram_option,
        click.option(
            "--residency",
            type=click.Choice(["auto", "together", "in-turns"]),
            help="Vision tower and decoder in memory together, or one after the other, which loads"
            " the decoder for each picture (EDGE_VLM_RESIDENCY; default auto: in turns where memory"
            " is short).",
        ),
        click.option(
            "--kv-type",
            type=click.Choice(["f32", "f16", "q8_0", "q4_0"]),
            help="Numbers of the KV cache (EDGE_VLM_KV_TYPE; default f16).",
        ),
        click.option(
            "--threads", type=click.IntRange(1, 1024), help="CPU threads (EDGE_VLM_THREADS)."
        ),
    ):
        function = option(function)
    return function


def answer_options(function: F) -> F:
    """How questions are answered, and with how much of the machine."""
    for option in (
        engine_options,
        kv_budget_option,
        within_option,
        max_tiles_option,
        click.option(
            "--seed", type=click.IntRange(0, (1 << 32) - 1), help="Make sampling repeatable."
        ),
        click.option(
            "--min-p",
            type=click.FloatRange(0, 1),
            help="Drop tokens less likely than this fraction of the likeliest (default 0: off).",
        ),
        click.option(
            "--top-p", type=click.FloatRange(0, 1), help="Nucleus sampling (default 1: off)."
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(0, 100),
            help="Randomness; 0, the default, always takes the likeliest token.",
        ),
        click.option(
            "--max-tokens", type=click.IntRange(1, 1 << 20), help="Longest answer (default 512)."
        ),
        click.option("--system", metavar="TEXT", help="System message before the conversation."),
    ):
        function = option(function)
    return function


def json_option(function: F) -> F:
    """``--json``."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object for programs."
    )(function)


def verbose_option(function: F) -> F:
    """``-v``, which the command finds as ``session().verbose``."""

    def callback(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(Session).be_verbose()

    return click.option(
        "--verbose",
        "-v",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=callback,
        help="Say more on stderr, and more about errors.",
    )(function)


def machine_settings(options: dict[str, Any]) -> MachineSettings:
    """The machine's settings from a command's options, which are taken out of ``options``.

    They are those of ``answer_options``, ``hardware_options``, ``image_options`` and
    ``no_cache_option``.

    Raises:
        InputError: one of them, or a variable of the environment, is out of its range.
    """
    from edge_vlm.machine.settings import MachineSettings

    given = ("kv_budget", "threads", "provider", "gpu_layers", "max_pixels")
    settings = MachineSettings.from_environment(
        **{name: options.pop(name) for name in (*ENGINE_OPTIONS, *given)},
        image_formats=options.pop("allow_format") or None,
    )
    return settings.without_cache() if options.pop("no_cache") else settings

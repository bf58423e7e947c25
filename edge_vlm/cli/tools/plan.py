"""``edge-vlm plan``."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_vlm.cli.options import (
    image_options,
    json_option,
    max_tiles_option,
    model_option,
    ram_option,
    verbose_option,
    within_option,
)
from edge_vlm.cli.session import session

if TYPE_CHECKING:
    from edge_vlm.machine.engine_settings import EngineSettings
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.planning.profiles import DeviceProfile
    from edge_vlm.planning.request import Memory, ModelSizes, RequestPlan, RequestSettings
    from edge_vlm.planning.speeds import Speeds
    from edge_vlm.planning.tuning import Tuning

DEVICES = ("raspberry-pi-5-8gb", "raspberry-pi-5-4gb", "jetson-orin-nano-8gb", "laptop-4core")
KV_TYPES = ("f32", "f16", "q8_0", "q4_0")
VISION = ("fp32", "fp16", "int8", "int8-static", "int4")
DECODER = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs")


@click.command("plan")
@click.argument("image", metavar="IMAGE_OR_WxH", required=False)
@model_option
@max_tiles_option
@click.option("--device", type=click.Choice(DEVICES), help="Predict for this machine instead.")
@click.option("--kv-type", type=click.Choice(KV_TYPES), help="KV-cache element (default f16).")
@click.option(
    "--residency",
    type=click.Choice(["together", "in-turns"]),
    help="Keep vision and decoder in memory together (default), or one after the other.",
)
@click.option(
    "--question-tokens",
    type=click.IntRange(1, 1 << 20),
    help="Tokens of the prompt besides the picture (default 32).",
)
@click.option("--max-tokens", type=click.IntRange(1, 1 << 20), help="Longest answer (default 512).")
@ram_option
@within_option
@click.option("--vision", type=click.Choice(VISION), help="With jina-vlm: its precision.")
@click.option("--decoder", type=click.Choice(DECODER), help="With jina-vlm: its precision.")
@click.option("--compare", is_flag=True, help="Beside other models, for the same picture.")
@click.option("--paper", is_flag=True, help="The published efficiency table, computed again.")
@image_options
@json_option
@verbose_option
def command(
    image: str | None,
    model: str | None,
    max_tiles: int | None,
    device: str | None,
    ram: int | None,
    within: float | None,
    vision: str | None,
    decoder: str | None,
    compare: bool,
    paper: bool,
    max_pixels: int | None,
    allow_format: tuple[str, ...],
    as_json: bool,
    **request: Any,
) -> None:
    """Show how a picture is tiled and what it costs, without running a model.

    '--model jina-vlm' plans with the released settings and needs no weights. Seconds are shown
    where they were measured on this machine, or as estimates of a '--device'.

    \b
    edge-vlm plan photo.jpg
    edge-vlm plan 2728x2046 --model jina-vlm --device raspberry-pi-5-8gb
    edge-vlm plan 2728x2046 --model jina-vlm --ram 1.8GB
    edge-vlm plan 2728x2046 --model jina-vlm --compare
    edge-vlm plan --paper
    """
    if paper:
        _paper(as_json)
        return
    if image is None:
        raise click.UsageError("no picture; give a file or a size such as 2728x2046")
    from edge_vlm.planning.limits import tiles_within
    from edge_vlm.planning.profiles import PROFILES
    from edge_vlm.planning.request import plan_request
    from edge_vlm.planning.tuning import load_tuning

    name, sizes, manifest = _model(model, vision, decoder)
    width, height = _size(image, max_pixels, allow_format)
    if compare:
        _compare(sizes, width, height, name, max_tiles, as_json)
        return
    profile = PROFILES[device] if device else None
    tuning = load_tuning(manifest) if manifest and not profile else None
    machine, engines = _machine(sizes, profile, request, ram, max_tiles, tuning)
    speeds, source = _speeds(sizes, machine.kv_type, profile, tuning)
    max_tiles = machine.max_tiles
    if within is not None:
        max_tiles = tiles_within(within, [(width, height)], sizes, machine, engines, speeds)
    settings = _settings(machine, engines, profile, request)
    plan = plan_request(sizes, width, height, settings, max_tiles=max_tiles, speeds=speeds)
    if as_json:
        data = plan.to_dict() | ({"device": dataclasses.asdict(profile)} if profile else {})
        click.echo(json.dumps({**data, "seconds_from": source}))
    else:
        _show(plan, sizes, settings, source, profile)


def _model(
    model: str | None, vision: str | None, decoder: str | None
) -> tuple[str, ModelSizes, Any]:
    """Name, sizes and, of a bundle, the manifest."""
    from edge_vlm.bundle.find import find_bundle
    from edge_vlm.bundle.manifest import Bundle
    from edge_vlm.planning.models import model_sizes, released_models
    from edge_vlm.planning.request import ModelSizes

    if model in released_models():
        return model, model_sizes(vision or "fp16", decoder or "q4_k_m", name=model), None
    if vision or decoder:
        names = " or ".join(f"'--model {name}'" for name in released_models())
        raise click.UsageError(f"--vision and --decoder go with {names}")
    bundle = Bundle.open(find_bundle(model))
    return bundle.name, ModelSizes.of(bundle.manifest), bundle.manifest


def _size(image: str, max_pixels: int | None, allow_format: tuple[str, ...]) -> tuple[int, int]:
    """Width and height of a picture, or those that were typed."""
    from edge_vlm.errors import ImageError
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.pictures.image import load_image

    size = re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", image)
    if not size or Path(image).exists():
        limit = MachineSettings.from_environment(max_pixels=max_pixels).max_pixels
        pixels = load_image(image, max_pixels=limit, extra_formats=allow_format)
        return pixels.shape[1], pixels.shape[0]
    width, height = int(size[1]), int(size[2])
    if not width or not height:
        raise ImageError(f"{image}: a picture has at least one pixel on each side")
    return width, height


def _machine(
    sizes: ModelSizes,
    profile: DeviceProfile | None,
    request: dict[str, Any],
    ram: int | None,
    max_tiles: int | None,
    tuning: Tuning | None,
) -> tuple[MachineSettings, EngineSettings]:
    """Settings of this machine, or of another, with which the model fits in its memory.

    What they take of ``request`` leaves it.
    """
    from edge_vlm.machine.engine_settings import untuned
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.planning.limits import within_memory

    given = {"kv_type": request.pop("kv_type"), "residency": request.pop("residency")}
    machine = MachineSettings.from_environment(ram=ram, max_tiles=max_tiles, **given)
    if machine.ram is None and machine.residency == "auto":
        machine = dataclasses.replace(machine, residency="together")
    precision = sizes.decoder.precision
    if profile:
        family = profile.processor_family
        there = machine.engine_settings(untuned(precision, arm=family == "arm"))
        return within_memory(machine, there, sizes, processor_family=family)
    tuned = tuning.settings if tuning else None
    return within_memory(machine, machine.engine_settings(tuned, precision=precision), sizes)


def _settings(
    machine: MachineSettings,
    engines: EngineSettings,
    profile: DeviceProfile | None,
    request: dict[str, Any],
) -> RequestSettings:
    """What follows from the machine's, and what was given."""
    from edge_vlm.planning.limits import request_settings

    request["answer_tokens"] = request.pop("max_tokens")
    family = profile.processor_family if profile else None
    return dataclasses.replace(
        request_settings(machine, engines, processor_family=family),
        **{key: value for key, value in request.items() if value is not None},
    )


def _speeds(
    sizes: ModelSizes, kv_type: str, profile: DeviceProfile | None, tuning: Tuning | None
) -> tuple[Speeds | None, str | None]:
    """Speeds, and where they come from; None if nobody knows them."""
    if profile:
        return profile.speeds(sizes, kv_type), f"estimated for {profile.name}"
    if tuning:
        return tuning.speeds, "measured on this machine"
    return None, None


def _show(
    plan: RequestPlan,
    sizes: ModelSizes,
    settings: RequestSettings,
    source: str | None,
    profile: DeviceProfile | None,
) -> None:
    image, memory, flops = plan.image, plan.memory, plan.flops
    reduced = ", reduced" if image.reduced else ""
    turns = "" if memory.residency == "together" else "; vision and decoder take turns"
    lines = [
        ("size", f"{image.size[0]}x{image.size[1]}"),
        ("used at", f"{image.resized[0]}x{image.resized[1]}{reduced}"),
        ("tiling", f"{image.tiling[0]}x{image.tiling[1]}"),
        ("crops", f"{image.crops} (the thumbnail included)"),
        ("image tokens", f"{image.image_tokens}"),
        (
            "KV cache",
            f"{memory.kv_cache / 1e6:.1f} MB ({settings.kv_type}), {plan.context} positions: the"
            f" prompt's {plan.prompt_tokens} and up to {settings.answer_tokens} of the answer",
        ),
        (
            "work",
            f"vision {_flops(flops.vision + flops.connector)}, prefill {_flops(flops.prefill)},"
            f" then {_flops(flops.decode)} a token",
        ),
        ("precision", f"vision {sizes.vision.precision}, decoder {sizes.decoder.precision}"),
        ("memory", f"{_bytes(memory.peak)} at the peak, not all of this at once{turns}"),
        *((f"  {name}", _bytes(size)) for name, size in _components(memory) if size),
    ]
    if profile:
        share = memory.peak / profile.memory
        verdict = "fits" if share < 0.85 else "tight" if share < 1 else "does not fit"
        lines.append(("device", f"{profile.title}: {verdict}, {share:.0%} of its memory"))
    if plan.seconds:
        seconds = plan.seconds
        lines.append(
            (
                "seconds",
                f"load {seconds.load:.3g}, vision {seconds.vision:.3g},"
                f" prefill {seconds.prefill:.3g}, first token after {seconds.first_token:.3g},"
                f" then {1 / seconds.per_token:.3g} tokens/s ({source})",
            )
        )
    else:
        lines.append(("seconds", f"not measured here; --device estimates: {', '.join(DEVICES)}"))
    for label, value in lines:
        click.echo(f"{label:<13} {value}")
    if profile and session().verbose:
        for line in profile.sources:
            click.echo(f"estimated from {line}", err=True)


def _components(memory: Memory) -> tuple[tuple[str, int], ...]:
    return (
        ("vision", memory.vision_weights),
        ("onnxruntime", memory.onnxruntime_arena),
        ("decoder", memory.decoder_weights),
        ("repacked", memory.repacked_weights),
        ("KV cache", memory.kv_cache),
        ("prompt's own", memory.prompt_kv_cache),
        ("buffers", memory.compute_buffers),
        ("picture", memory.picture),
        ("Python", memory.python),
    )


def _compare(
    sizes: ModelSizes, width: int, height: int, name: str, max_tiles: int | None, as_json: bool
) -> None:
    from edge_vlm.cli.table import format_table
    from edge_vlm.planning.compare import compare

    found = compare(sizes, width, height, name=name, max_tiles=max_tiles)
    if as_json:
        models = [dataclasses.asdict(one) for one in found]
        click.echo(json.dumps({"size": [width, height], "models": models}))
        return
    rows = [
        (
            one.name,
            str(one.image_tokens),
            _bytes(one.kv_bytes),
            f"{one.prefill_flops / 1e12:.2f} TFLOPs",
            _bytes(one.weights_bytes),
        )
        for one in found
    ]
    header = ("model", "image tokens", "KV cache f16", "prefill", "weights q4_k_m")
    click.echo(format_table(header, rows))


def _paper(as_json: bool) -> None:
    from edge_vlm.cli.table import format_table
    from edge_vlm.families.base import DEFAULT, find_family

    figures = find_family(DEFAULT).published()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(figure) for figure in figures]))
        return
    rows = [
        (
            f"{figure.name}{', ' + figure.unit if figure.unit else ''}",
            f"{figure.published:g}",
            f"{figure.computed:.4g}",
            f"{figure.deviation:+.1%}",
            "" if figure.runtime is None else f"{figure.runtime:.4g}",
        )
        for figure in figures
    ]
    click.echo(format_table(("", "published", "computed", "differs", "edge-vlm"), rows))


def _bytes(n: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.2f} {unit}" if unit == "GB" else f"{n / size:.1f} {unit}"
    return f"{n / 1e3:.1f} kB"


def _flops(n: int) -> str:
    for unit, size in (("TFLOPs", 1e12), ("GFLOPs", 1e9)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n / 1e6:.1f} MFLOPs"

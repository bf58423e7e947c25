"""``edge-vlm plan``."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_vlm.cli.options import (
    crop_option,
    image_options,
    max_tiles_option,
    max_tokens_option,
    model_option,
    output_options,
    ram_option,
    within_option,
)
from edge_vlm.cli.session import session
from edge_vlm.cli.streams import say, write, write_json
from edge_vlm.cli.table import echo_lines, format_table
from edge_vlm.machine.engine_settings import KV_TYPES

if TYPE_CHECKING:
    from edge_vlm.bundle.manifest import Manifest
    from edge_vlm.machine.engine_settings import EngineSettings
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.planning.profiles import DeviceProfile
    from edge_vlm.planning.request import Memory, ModelSizes, RequestPlan, RequestSettings
    from edge_vlm.planning.tuning import Tuning

DEVICES = ("raspberry-pi-5-8gb", "raspberry-pi-5-4gb", "jetson-orin-nano-8gb", "laptop-4core")
VISION = ("fp32", "fp16", "int8", "int8-static", "int4")
DECODER = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs")


@click.command("plan")
@click.argument("image", metavar="IMAGE_OR_WxH", required=False)
@model_option
@max_tiles_option
@click.option("--device", type=click.Choice(DEVICES), help="Predict for this machine instead.")
@click.option(
    "--kv-type", type=click.Choice(list(KV_TYPES)), help="KV-cache element (default f16)."
)
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
@max_tokens_option
@ram_option
@within_option
@click.option("--vision", type=click.Choice(VISION), help="With jina-vlm: its precision.")
@click.option("--decoder", type=click.Choice(DECODER), help="With jina-vlm: its precision.")
@click.option("--compare", is_flag=True, help="Beside other models, for the same picture.")
@click.option("--paper", is_flag=True, help="The published efficiency table, computed again.")
@crop_option
@image_options
@output_options
def command(
    image: str | None,
    model: str | None,
    max_tiles: int | None,
    device: str | None,
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
    reading = {name: request.pop(name) for name in ("crop", "alpha", "dpi")}
    width, height = _size(image, max_pixels, allow_format, **reading)
    if compare:
        _compare(sizes, width, height, name, max_tiles, as_json)
        return
    profile = PROFILES[device] if device else None
    tuning = load_tuning(manifest) if manifest and not profile else None
    machine, engines, settings = _settings(sizes, profile, tuning, max_tiles, **request)
    speeds, source = tuning.speeds if tuning else None, "measured on this machine"
    if profile:
        speeds, source = profile.speeds(sizes, machine.kv_type), f"estimated for {profile.name}"
    max_tiles = machine.max_tiles
    if within is not None:
        max_tiles = tiles_within(within, [(width, height)], sizes, machine, engines, speeds)
    plan = plan_request(sizes, width, height, settings, max_tiles=max_tiles, speeds=speeds)
    if as_json:
        data = plan.to_dict() | ({"device": dataclasses.asdict(profile)} if profile else {})
        write_json({**data, "seconds_from": source if speeds else None})
    else:
        _show(plan, sizes, settings, source, profile)


def _model(
    model: str | None, vision: str | None, decoder: str | None
) -> tuple[str, ModelSizes, Manifest | None]:
    """Name, sizes and, of a bundle, the manifest."""
    from edge_vlm.cli.choose import open_bundle
    from edge_vlm.planning.models import model_sizes, released_models
    from edge_vlm.planning.request import ModelSizes

    if model in released_models():
        return model, model_sizes(vision or "fp16", decoder or "q4_k_m", name=model), None
    if vision or decoder:
        names = " or ".join(f"'--model {name}'" for name in released_models())
        raise click.UsageError(f"--vision and --decoder go with {names}")
    bundle = open_bundle(model)
    return bundle.name, ModelSizes.of(bundle.manifest), bundle.manifest


def _size(
    image: str, max_pixels: int | None, allow_format: tuple[str, ...], **reading: Any
) -> tuple[int, int]:
    """Width and height of a picture, or those that were typed."""
    from edge_vlm.cli.choose import picture_source, read_picture
    from edge_vlm.errors import ImageError

    size = re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", image)
    if not size or Path(image).exists():
        pixels = read_picture(picture_source(image), max_pixels, allow_format, **reading)
        return pixels.shape[1], pixels.shape[0]
    width, height = int(size[1]), int(size[2])
    if not width or not height:
        raise ImageError(f"{image}: a picture has at least one pixel on each side")
    if reading["crop"] is not None:
        from edge_vlm.pictures.sources import crop_box

        _, _, width, height = crop_box(reading["crop"], width, height)
    return width, height


def _settings(
    sizes: ModelSizes,
    profile: DeviceProfile | None,
    tuning: Tuning | None,
    max_tiles: int | None,
    *,
    question_tokens: int | None,
    max_tokens: int | None,
    **given: Any,
) -> tuple[MachineSettings, EngineSettings, RequestSettings]:
    """Those of this machine, or of another, with which the model fits in its memory."""
    from edge_vlm.machine.engine_settings import untuned
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.planning.limits import request_settings, within_memory

    machine = MachineSettings.from_environment(max_tiles=max_tiles, **given)
    if machine.ram is None and machine.residency == "auto":
        machine = dataclasses.replace(machine, residency="together")
    precision = sizes.decoder.precision
    family = profile.processor_family if profile else None
    tuned = tuning.settings if tuning else None
    if profile:
        tuned = untuned(precision, arm=family == "arm")
    engines = machine.engine_settings(tuned, precision=precision)
    machine, engines = within_memory(machine, engines, sizes, processor_family=family)
    request = request_settings(machine, engines, processor_family=family)
    tokens = {"question_tokens": question_tokens, "answer_tokens": max_tokens}
    wanted: dict[str, Any] = {name: n for name, n in tokens.items() if n is not None}
    return machine, engines, dataclasses.replace(request, **wanted)


def _show(
    plan: RequestPlan,
    sizes: ModelSizes,
    settings: RequestSettings,
    source: str,
    profile: DeviceProfile | None,
) -> None:
    image, memory, flops = plan.image, plan.memory, plan.flops
    reduced = ", reduced" if image.reduced else ""
    turns = "" if memory.residency == "together" else "; vision and decoder take turns"
    lines = {
        "size": f"{image.size[0]}x{image.size[1]}",
        "used at": f"{image.resized[0]}x{image.resized[1]}{reduced}",
        "tiling": f"{image.tiling[0]}x{image.tiling[1]}",
        "crops": "1 (the picture as a whole)"
        if sizes.processor.any_size
        else f"{image.crops} (the thumbnail included)",
        "image tokens": f"{image.image_tokens}",
        "KV cache": f"{memory.kv_cache / 1e6:.1f} MB ({settings.kv_type}), {plan.context}"
        f" positions: the prompt's {plan.prompt_tokens} and up to {settings.answer_tokens} of the"
        " answer",
        "work": f"vision {_flops(flops.vision + flops.connector)},"
        f" prefill {_flops(flops.prefill)}, then {_flops(flops.decode)} a token",
        "precision": f"vision {sizes.vision.precision}, decoder {sizes.decoder.precision}",
        "memory": f"{_bytes(memory.peak)} at the peak, not all of this at once{turns}",
        **{f"  {name}": _bytes(size) for name, size in _components(memory).items() if size},
    }
    if profile:
        share = memory.peak / profile.memory
        verdict = "fits" if share < 0.85 else "tight" if share < 1 else "does not fit"
        lines["device"] = f"{profile.title}: {verdict}, {share:.0%} of its memory"
    lines["seconds"] = f"not measured here; --device estimates: {', '.join(DEVICES)}"
    if seconds := plan.seconds:
        lines["seconds"] = (
            f"load {seconds.load:.3g}, vision {seconds.vision:.3g}, prefill {seconds.prefill:.3g},"
            f" first token after {seconds.first_token:.3g},"
            f" then {1 / seconds.per_token:.3g} tokens/s ({source})"
        )
    echo_lines(lines, 13)
    if profile and session().verbose:
        for line in profile.sources:
            say(f"estimated from {line}")


def _components(memory: Memory) -> dict[str, int]:
    return {
        "vision": memory.vision_weights,
        "onnxruntime": memory.onnxruntime_arena,
        "decoder": memory.decoder_weights,
        "repacked": memory.repacked_weights,
        "KV cache": memory.kv_cache,
        "prompt's own": memory.prompt_kv_cache,
        "buffers": memory.compute_buffers,
        "picture": memory.picture,
        "Python": memory.python,
    }


def _compare(
    sizes: ModelSizes, width: int, height: int, name: str, max_tiles: int | None, as_json: bool
) -> None:
    from edge_vlm.planning.compare import compare

    found = compare(sizes, width, height, name=name, max_tiles=max_tiles)
    if as_json:
        models = [dataclasses.asdict(one) for one in found]
        write_json({"size": [width, height], "models": models})
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
    write(format_table(header, rows))


def _paper(as_json: bool) -> None:
    from edge_vlm.families.base import DEFAULT, find_family

    figures = find_family(DEFAULT).published()
    if as_json:
        write_json([dataclasses.asdict(figure) for figure in figures])
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
    write(format_table(("", "published", "computed", "differs", "edge-vlm"), rows))


def _bytes(n: int) -> str:
    if n >= 1e9:
        return f"{n / 1e9:.2f} GB"
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"


def _flops(n: int) -> str:
    if n >= 1e12:
        return f"{n / 1e12:.2f} TFLOPs"
    return f"{n / 1e9:.2f} GFLOPs" if n >= 1e9 else f"{n / 1e6:.1f} MFLOPs"

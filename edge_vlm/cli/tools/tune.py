"""``edge-vlm tune``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from edge_vlm.cli.options import model_option, output_options
from edge_vlm.cli.streams import say, write_json
from edge_vlm.cli.table import echo_lines

if TYPE_CHECKING:
    from edge_vlm.planning.tuning import Tuning


@click.command("tune")
@model_option
@click.option("--show", is_flag=True, help="Show what was found earlier, and measure nothing.")
@click.option("--reset", is_flag=True, help="Forget what was found earlier.")
@output_options
def command(model: str | None, show: bool, reset: bool, as_json: bool) -> None:
    """Find the settings that are fastest for a model on this machine, and keep them.

    Takes some minutes for a model of full size; close other programs first. The result is used
    whenever the model is loaded, and by 'edge-vlm plan' to predict seconds. Options and EDGE_VLM_*
    variables go before it; those that are set now are not varied.

    \b
    edge-vlm tune
    edge-vlm tune --show
    """
    if show and reset:
        raise click.UsageError("give either --show or --reset")
    from edge_vlm.cli.choose import open_bundle
    from edge_vlm.planning.tuning import load_tuning, store_tuning, tuning_file

    bundle = open_bundle(model)
    manifest = bundle.manifest
    if reset:
        tuning_file(manifest).unlink(missing_ok=True)
        return
    if show:
        found = load_tuning(manifest)
        if found is None and not as_json:
            say("not tuned; 'edge-vlm tune' does it")
        _print(found, as_json)
        return
    from edge_vlm.cli.display import Steps
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.measure.tune import tune

    with Steps() as steps:
        tuning = tune(
            bundle.path,
            MachineSettings.from_environment(),
            progress=lambda done, total: steps.show("tuning", done, total),
        )
    stored = store_tuning(manifest, tuning)
    _print(tuning, as_json)
    say(f"kept in {stored}")


def _print(tuning: Tuning | None, as_json: bool) -> None:
    if as_json:
        write_json(asdict(tuning) if tuning else None)
    elif tuning:
        echo_lines(_lines(tuning), 16)


def _lines(tuning: Tuning) -> dict[str, str]:
    from edge_vlm.planning.tuning import setting_words

    speeds = tuning.speeds
    engines = ", ".join(f"{name} {version}" for name, version in tuning.measured_with.items())
    prefill = f"{speeds.prefill_tokens_per_second:.4g} tokens/s"
    decode = f"{speeds.decode_tokens_per_second:.3g} tokens/s"
    return {
        **setting_words(tuning.settings),
        "vision": f"{speeds.vision_seconds_per_tile:.3g} s a tile",
        "prefill": f"{prefill}, {speeds.prefill_tokens} tokens",
        "decode": f"{decode} behind {speeds.decode_positions}",
        "load": f"{speeds.load_seconds:.3g} s",
        "measured": f"{tuning.date} with {engines}",
    }

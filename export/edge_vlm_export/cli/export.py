"""``edge-vlm export``."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import click

from edge_vlm.cli.options import FILE, UserPath, verbose_option
from edge_vlm.cli.streams import say, write

# Modules of the export extra.
EXTRA = ("gguf", "huggingface_hub", "ml_dtypes", "onnx")

_shown = partial(click.option, show_default=True)

DECODERS = ["q4_k_m", "q4_0", "q5_k_m", "q6_k", "q8_0", "iq4_xs", "f16", "bf16", "f32"]
TENSORS = ["q4_0", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_xs", "f16", "bf16", "f32"]


def _recipe(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """Make a recipe's choices the defaults; what is given explicitly still wins."""
    if value is None:
        return
    from edge_vlm_export.steps.recipes import listing, read_recipe

    if value == "list":
        write(listing())
        ctx.exit()
    ctx.default_map = {**(ctx.default_map or {}), **read_recipe(value).options()}


def _families(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    """List what ``families/`` and other packages add."""
    if not wanted:
        return
    from edge_vlm_export.families.registry import families

    for name, family in families().items():
        write(f"{name}: {family.summary} (model_type {', '.join(family.model_types)})")
    ctx.exit()


@click.command("export")
@click.argument("checkpoint")
@click.option("--out", required=True, type=UserPath(path_type=Path), help="Folder to write.")
@_shown(
    "--vision",
    type=click.Choice(["int8", "int8-static", "int4", "fp16", "fp32"]),
    default="int8",
    help="Precision of the vision tower; int4 and fp16 are of its weights alone.",
)
@_shown(
    "--target",
    type=click.Choice(["cpu", "portable"]),
    default="cpu",
    help="Layout of vision.onnx: onnxruntime's fused operators, or standard ones alone.",
)
@click.option(
    "--static-shapes",
    is_flag=True,
    help="Fix the batch of vision.onnx to one crop, for engines without open shapes.",
)
@_shown(
    "--min-cosine",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.995,
    help="Keep matrix products of the vision tower in higher precision until its output has this"
    " mean cosine.",
)
@_shown(
    "--decoder",
    type=click.Choice(DECODERS),
    default="q4_k_m",
    help="Type of the decoder's weights; all but f16, bf16 and f32 are llama.cpp's mixtures.",
)
@click.option(
    "--decoder-head",
    type=click.Choice(TENSORS),
    help="Type of the output head; by default q6_k, with q8_0 q8_0.",
)
@click.option(
    "--decoder-embedding",
    type=click.Choice(TENSORS),
    help="Type of the token table; by default the mixture's main type.",
)
@click.option(
    "--recipe",
    callback=_recipe,
    is_eager=True,
    expose_value=False,
    type=FILE,
    metavar="NAME|FILE|list",
    help="Choose the other options for a device: pi-4gb, pi-8gb, jetson-orin-nano, laptop, best, or"
    " a .toml file. `list` shows what they choose and why.",
)
@click.option(
    "--list-families",
    callback=_families,
    is_flag=True,
    is_eager=True,
    expose_value=False,
    help="Show the families of models that can be exported.",
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Merge the LoRA adapter in this folder into the checkpoint.",
)
@click.option("--offline", is_flag=True, help="Download nothing: use an earlier download.")
@click.option(
    "--calibrate",
    type=FILE,
    metavar="FOLDER|builtin",
    help="Calibrate with pictures and questions: those of a folder, or built-in ones.",
)
@click.option(
    "--measure/--no-measure",
    default=None,
    help="Compare the result with the checkpoint; by default what is quantized.",
)
@_shown(
    "--max-divergence",
    type=click.FloatRange(0, min_open=True),
    default=0.2,
    help="Fail if the decoder's mean divergence from the checkpoint is larger, in nats.",
)
@click.option("--allow-loss", is_flag=True, help="Write the bundle whatever the report says.")
@click.option("--name", help="Name of the model in the manifest.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists, once the new one is whole.")
@verbose_option
def command(checkpoint: str, out: Path, offline: bool, force: bool, **options: Any) -> None:
    """Turn a CHECKPOINT into a bundle.

    CHECKPOINT is a folder, or the name of a model on the Hugging Face Hub, OWNER/MODEL[@REVISION],
    which is downloaded into the hub's own cache; HF_TOKEN or `hf auth login` give access to private
    ones. An existing folder of that name wins. Its config.json tells which family of models it is
    of; --list-families shows those that are known.

    Reads config, tokenizer, chat template and safetensors; writes vision.onnx, decoder.gguf and
    bundle.json. OUT appears only when it is complete and verified.

    \b
    edge-vlm export jinaai/jina-vlm --out ./jina-vlm-bundle
    edge-vlm export ./jina-vlm --out ./jina-vlm-bundle
    """
    require_extra("export")
    from edge_vlm.cli.display import Steps
    from edge_vlm_export import export_checkpoint
    from edge_vlm_export.checkpoint.hub import HubName, fetch, parse_source
    from edge_vlm_export.checkpoint.new_folder import check_target
    from edge_vlm_export.families.registry import download_files
    from edge_vlm_export.steps.export import estimated_bytes

    check_target(out, force)  # before gigabytes are downloaded
    with Steps() as steps:
        source = parse_source(checkpoint)
        if isinstance(source, HubName):
            source = fetch(
                source,
                download_files,
                offline=offline,
                progress=steps.show,
                notice=steps.say,
                then=(
                    out.parent,
                    lambda folder: estimated_bytes(folder, options["vision"], options["decoder"]),
                ),
            )
        written = export_checkpoint(
            source,
            out,
            **options,
            overwrite=force,
            progress=steps.show,
            notice=steps.say,
            on_report=lambda report: steps.say(report.text()),
        )
    size = sum(path.stat().st_size for path in written.iterdir())
    say(f"{written}: {size / 1e6:.1f} MB")


def require_extra(what: str) -> None:
    """Refuse to go on without the libraries of the export extra.

    Raises:
        click.UsageError: one is missing.
    """
    missing = [module for module in EXTRA if importlib.util.find_spec(module) is None]
    if missing:
        raise click.UsageError(
            f"{what} needs {', '.join(missing)}; install with: pip install 'edge-vlm[export]'"
        )

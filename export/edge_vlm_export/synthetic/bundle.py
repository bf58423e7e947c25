"""A random bundle, to measure a device before the released checkpoint is downloaded."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.bundle.manifest import Bundle
from edge_vlm.errors import BundleError, InputError
from edge_vlm.machine.folders import cache_folder
from edge_vlm_export.checkpoint.new_folder import check_space, check_target, scratch_folder
from edge_vlm_export.families.opened import Description
from edge_vlm_export.steps.export import export_checkpoint
from edge_vlm_export.steps.recipes import read_recipe
from edge_vlm_export.synthetic.checkpoint import (
    BYTES_PER_VALUE,
    config_folder,
    configs,
    synthesize,
)

if TYPE_CHECKING:
    from edge_vlm_export.counted import Progress


def synthetic_bundle(
    config: str | Path,
    recipe: str,
    out: Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Path:
    """Write a bundle of random weights to the new folder ``out``.

    A random checkpoint is written beside ``out``, exported with the recipe's options and removed.
    How much the bundle loses against it is not measured: its answers mean nothing.

    Args:
        config: See ``synthesize``, also for ``out`` and ``seed``.
        recipe: Name of a recipe, see ``recipes.py``.
        out: Folder to create.
        seed: Of the random numbers.
        progress: See ``export_checkpoint``; the first stage is "weights".
        notice: Called with a line about what the export will need.

    Raises:
        InputError: ``out`` exists, the disk lacks room, or there is no such recipe or config.
        EdgeVLMError: writing failed.
    """
    chosen, out = read_recipe(recipe), Path(out)
    check_target(out, overwrite=False)
    source = config_folder(config)
    n_values = sum(math.prod(shape) for shape in Description(source).shapes().values())
    # The checkpoint, the decoder before it is quantized, and what becomes of both.
    check_space(out.parent, 3 * BYTES_PER_VALUE * n_values)
    with scratch_folder(out) as scratch:
        checkpoint = synthesize(source, scratch / "checkpoint", seed=seed, progress=progress)
        bundle = export_checkpoint(
            checkpoint,
            scratch / "bundle",
            name=f"random-{config if config in configs() else source.name}",
            progress=progress,
            notice=notice,
            measure=False,
            allow_loss=True,
            **chosen.options(),
        )
        return bundle.rename(out)


def cached_synthetic_bundle(
    config: str,
    recipe: str,
    *,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Path:
    """The bundle of ``synthetic_bundle`` in the cache folder, made when it is not there yet.

    Raises:
        InputError, EdgeVLMError: see ``synthetic_bundle``; a config or recipe is none of the named.
    """
    if config not in configs():
        raise InputError(f"synthetic: {config!r} is none of {', '.join(configs())}")
    if not re.fullmatch(r"[\w-]+", recipe):
        raise InputError(f"recipe: {recipe!r} is not the name of one")
    out = cache_folder() / "synthetic" / f"{config}-{recipe}"
    try:
        return Bundle.open(out).path
    except BundleError:
        shutil.rmtree(out, ignore_errors=True)  # of an older format, or damaged
    out.parent.mkdir(parents=True, exist_ok=True)
    return synthetic_bundle(config, recipe, out, progress=progress, notice=notice)

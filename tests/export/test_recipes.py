"""The recipes that come with the exporter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from edge_vlm_export.cli.export import command as export
from edge_vlm_export.steps.recipes import (
    PICTURE,
    Expected,
    Recipe,
    read_recipe,
    recipe_names,
)

from edge_vlm.bundle.manifest import Bundle
from edge_vlm.cli.main import group
from edge_vlm.cli.questions.ask import command as ask
from edge_vlm.errors import InputError
from edge_vlm.machine.engine_settings import untuned
from edge_vlm.machine.settings import MachineSettings
from edge_vlm.planning.limits import request_settings
from edge_vlm.planning.models import model_sizes
from edge_vlm.planning.request import plan_request
from tests.conftest import GOLDEN

pytestmark = pytest.mark.engine  # it exports models

NAMES = ("best", "jetson-orin-nano", "laptop", "pi-4gb", "pi-8gb")
GIGABYTES = {"pi-4gb": 4, "pi-8gb": 8, "jetson-orin-nano": 8, "laptop": 8, "best": 8}


def test_the_promised_recipes_are_there() -> None:
    assert tuple(recipe_names()) == NAMES


def expected(recipe: Recipe) -> Expected:
    """What the released model takes, computed from its sizes; norms and biases are left out."""
    model = model_sizes(recipe.vision, recipe.decoder)
    on_gpu = recipe.ask.gpu_layers is not None
    if on_gpu:  # keeps fp16 as it is: the planner's copies are those of the CPU
        seeing = model.vision.model_copy(update={"precision": "as stored"})
        model = replace(model, vision=seeing)
    family = recipe.expected.processor
    machine = MachineSettings(
        kv_type=recipe.ask.kv_type or "f16", residency=recipe.ask.residency or "together"
    )
    engines = untuned(model.decoder.precision, arm=family == "arm")
    settings = request_settings(machine, engines, processor_family=family)
    plan = plan_request(model, *PICTURE, settings, max_tiles=recipe.ask.max_tiles)
    return Expected(
        processor=recipe.expected.processor,
        vision_mb=round(model.vision_bytes / 1e6),
        decoder_mb=round(model.decoder_bytes / 1e6),
        memory_mb=round(plan.memory.peak / 1e6),
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_what_the_architecture_gives(name: str) -> None:
    recipe = read_recipe(name)
    computed = expected(recipe)
    for field in ("vision_mb", "decoder_mb", "memory_mb"):
        told = getattr(recipe.expected, field)
        assert told == pytest.approx(getattr(computed, field), rel=0.02), field
    assert recipe.expected.memory_mb < 0.9 * 1000 * GIGABYTES[name]


@pytest.mark.parametrize("name", NAMES)
def test_its_options_exist(name: str) -> None:
    recipe = read_recipe(name)
    for command, chosen in (
        (export, recipe.options()),
        (ask, recipe.ask.model_dump(exclude_none=True)),
    ):
        parameters = {parameter.name: parameter for parameter in command.params}
        for option, value in chosen.items():
            assert option in parameters, option
            kind = parameters[option].type
            assert kind.convert(value, parameters[option], click.Context(command)) == value


def test_a_recipe_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    text = (Path(__file__).parents[2] / "models/recipes/laptop.toml").read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    assert read_recipe(str(path)) == read_recipe("laptop")
    for damage, message in (
        ('speed = "fast"\n' + text, "speed"),
        (text.replace('"int8"', '"int3"'), "vision"),
        (text.replace("[expected]", "[expected"), "not valid TOML"),
        (text + "#" * 70_000, "larger than"),
    ):
        path.write_text(damage, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_recipe(str(path))
    with pytest.raises(InputError, match="none of best, jetson-orin-nano"):
        read_recipe("toaster")
    with pytest.raises(InputError, match="is missing"):
        read_recipe(str(tmp_path / "none.toml"))


def test_listing() -> None:
    result = CliRunner().invoke(group, ["export", "--recipe", "list"])
    assert result.exit_code == 0, result.output
    for name in NAMES:
        assert read_recipe(name).title in result.stdout
    assert "edge-vlm ask --max-tiles 6" in result.stdout


def test_explicit_options_win(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    checkpoint = str(GOLDEN / "tiny-126-tied" / "checkpoint")
    arguments = ["export", checkpoint, "--out", str(out), "--recipe", "best", "--vision", "fp16"]
    result = CliRunner().invoke(group, [*arguments, "--allow-loss"])
    assert result.exit_code == 0, result.output
    manifest = Bundle.open(out).manifest
    assert manifest.vision.precision == "fp16"  # given
    assert manifest.decoder.precision == "q8_0"  # the recipe's


def test_options_are_only_what_was_chosen() -> None:
    recipe = read_recipe("best")
    assert isinstance(recipe, Recipe)
    assert recipe.options() == {"vision": "fp32", "target": "cpu", "decoder": "q8_0"}

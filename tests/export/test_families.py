"""The seam between the exporter and its families, and what they share."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from edge_vlm_export.checkpoint.tensors import Checkpoint, stacked
from edge_vlm_export.cli.export import command
from edge_vlm_export.decoder.gguf_file import plan_decoder, write_decoder
from edge_vlm_export.families.llama_like import usual_layer
from edge_vlm_export.families.opened import Model
from edge_vlm_export.families.registry import download_files, families, family_of
from edge_vlm_export.families.vit import BlockTensors, PatchEmbedding, Vit
from edge_vlm_export.graph.architecture import AttentionSizes
from edge_vlm_export.graph.layers import Layers
from edge_vlm_export.graph.precision import Recipe
from edge_vlm_export.proof.fidelity import compare
from edge_vlm_export.samples.conversations import builtin_samples
from edge_vlm_export.samples.prompts import PromptMaker
from edge_vlm_export.vision.stagewise import session
from safetensors.numpy import save_file

from edge_vlm.bundle.manifest import Bundle
from edge_vlm.errors import CheckpointError
from edge_vlm.families.base import find_family
from tests.conftest import GOLDEN
from tests.export_helpers import copy_checkpoint, refused, set_key

pytestmark = pytest.mark.engine  # it exports models

TINY = GOLDEN / "tiny-126-tied" / "checkpoint"
Floats = npt.NDArray[np.float32]


def test_every_family_has_its_other_half() -> None:
    assert list(families()) == [
        "jina-vlm",
        "llava-1.5",
        "llava-next",
        "internvl",
        "llava-onevision",
        "pixtral",
        "qwen2.5-vl",
    ]
    for name, family in families().items():
        assert family.name == name
        assert family.runtime is find_family(name)
    result = CliRunner().invoke(command, ["--list-families"])
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == list(families())


def test_a_checkpoint_tells_its_family(tmp_path: Path) -> None:
    assert family_of(TINY).name == "jina-vlm"
    for name in ("llava-1.5", "llava-next", "llava-onevision", "pixtral", "qwen2.5-vl"):
        assert family_of(GOLDEN / name / "checkpoint").name == name
    for layout in ("internvl", "internvl-chat"):
        assert family_of(GOLDEN / layout / "checkpoint").name == "internvl"
    required, optional = download_files(TINY)
    assert required[0] == "config.json"
    assert "tokenizer.json" in required
    assert {"chat_template.jinja", "LICENSE"} <= set(optional)
    checkpoint = copy_checkpoint("tiny-378", tmp_path / "checkpoint", link_weights=True)
    set_key(checkpoint / "config.json", "model_type", "chameleon")
    refused(
        checkpoint,
        'config.json: model_type is "chameleon"',
        "jvlm (jina-vlm)",
        "internvl, internvl_chat (internvl)",
        "llava_onevision (llava-onevision)",
    )


def test_another_package_adds_a_family(tmp_path: Path) -> None:
    info = tmp_path / "other-1.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text("[edge_vlm_export.families]\nother = other:FAMILY\n")
    (tmp_path / "other.py").write_text(
        "from edge_vlm_export.families.jina_vlm.family import JinaVLM\n"
        "class Other(JinaVLM):\n"
        "    name, model_types = 'other', ('other',)\n"
        "FAMILY = Other()\n"
    )
    code = "from edge_vlm_export.families.registry import families; print(*families())"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    assert set(result.stdout.split()) == {"other", *families()}


@pytest.fixture
def numbers(tmp_path: Path) -> Callable[..., Checkpoint]:
    """``numbers(name=array, ...)``: a checkpoint of these tensors."""

    def write(**tensors: Any) -> Checkpoint:
        arrays = {name.replace("__", "."): np.float32(array) for name, array in tensors.items()}
        save_file(arrays, tmp_path / "model.safetensors")
        return Checkpoint.open(tmp_path)

    return write


def test_stored_names_become_those_of_the_family(
    tmp_path: Path, numbers: Callable[..., Checkpoint]
) -> None:
    numbers(model__a=[1, 2], b=[3], position_ids=[0])

    def rename(name: str) -> str | None:
        return None if name == "position_ids" else name.removeprefix("model.")

    opened = Checkpoint.open(tmp_path, rename)
    assert set(opened.tensors) == {"a", "b"}
    assert opened["a"].name == "model.a"  # errors name what is in the file
    with pytest.raises(CheckpointError, match=r'"model\.a" of shape .* not part of the model'):
        opened.check({"b": (1,)}, {})
    numbers(model__a=[1, 2], a=[3])
    with pytest.raises(CheckpointError, match="are one and the same"):
        Checkpoint.open(tmp_path, rename)


def test_values_are_views_of_tensors(numbers: Callable[..., Checkpoint]) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 8, 6), np.float32)
    kernel = rng.standard_normal((4, 3, 2, 2), np.float32)
    tensors = numbers(a=a, b=b, kernel=kernel, scale=np.arange(8))
    whole = stacked(tensors.values("a", 2, 5), tensors.values("b"))
    assert whole.shape == (11, 6)
    assert np.array_equal(whole.read(), np.vstack([a[2:5], b]))
    assert np.array_equal(tensors.values("kernel").flat().read(), kernel.reshape(4, 12))
    scaled = tensors.values("a").scaled(tensors.values("scale"))
    assert np.array_equal(scaled.read(), a * np.arange(8, dtype=np.float32)[:, None])
    # Two heads of four: rows 0 1 2 3 rotate as (0, 2), (1, 3); llama.cpp wants neighbours.
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    assert np.array_equal(tensors.values("a").interleaved(2).read(), a[order])


HIDDEN, HEADS, FFN, PATCHES = 16, 2, 24, 5


def block_tensors(index: int) -> BlockTensors:
    names = {part: f"blocks.{index}.{part}" for part in ("norm1", "out", "norm2", "up", "down")}
    weights, biases = (tuple(f"blocks.{index}.{part}.{kind}" for part in "qkv") for kind in "wb")
    scales = {f"scale{half}": f"blocks.{index}.scale{half}" for half in (1, 2)}
    return BlockTensors(qkv=(weights, biases), **names, **scales)


def small_vit(activation: Any) -> Vit:
    return Vit(
        n_patches=PATCHES,
        patch_values=12,
        n_layers=1,
        hidden_size=HIDDEN,
        attention=AttentionSizes(HEADS, HEADS, HIDDEN // HEADS),
        ffn_size=FFN,
        eps=1e-5,
        activation=activation,
        embedding=PatchEmbedding(
            weight="patch.weight",
            stored=(3, 2, 2),
            positions="positions",
            class_token="class",  # noqa: S106 - a tensor's name
            norm="pre",
            ones=1,
        ),
        tensors=block_tensors,
    )


def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu_pytorch_tanh": lambda x: (
        x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    ),
}


def by_hand(t: dict[str, Any], crop: Any, activation: str) -> Any:
    """The block in float64: class token, norm in front, LayerScale."""
    patches = crop @ t["patch.weight"].reshape(HIDDEN, -1).T
    x = np.vstack([t["class"].reshape(1, -1), patches]) + t["positions"][0]
    x = layer_norm(x, t["pre.weight"], t["pre.bias"])
    at = {name.removeprefix("blocks.0."): value for name, value in t.items()}
    h = layer_norm(x, at["norm1.weight"], at["norm1.bias"])
    q, k, v = ((h @ at[f"{p}.w"].T + at[f"{p}.b"]).reshape(-1, HEADS, 8) for p in "qkv")
    scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hij,jhd->ihd", weights, v).reshape(-1, HIDDEN)
    x = x + at["scale1"] * (mixed @ at["out.weight"].T + at["out.bias"])
    h = layer_norm(x, at["norm2.weight"], at["norm2.bias"])
    h = ACTIVATIONS[activation](h @ at["up.weight"].T + at["up.bias"])
    return x + at["scale2"] * (h @ at["down.weight"].T + at["down.bias"])


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_vision_transformer_equals_its_formulas(
    activation: str, target: str, numbers: Callable[..., Checkpoint]
) -> None:
    vit = small_vit(activation)
    stages, linears, shapes, _unused = vit.parts(1)
    for linear in linears.values():
        shapes |= linear.shapes()
    assert shapes["positions"] == (1, PATCHES + 1, HIDDEN)
    assert shapes["class"] == (1, 1, HIDDEN)
    assert shapes["patch.weight"] == (HIDDEN, 3, 2, 2)
    rng = np.random.default_rng(1)
    drawn = {name: rng.standard_normal(shape, np.float32) / 2 for name, shape in shapes.items()}
    tensors = numbers(**{name.replace(".", "__"): array for name, array in drawn.items()})
    layers = Layers(linears, tensors, Recipe("fp32", target))
    layers.input("crops", (PATCHES, 12))
    for stage in stages:
        stage.add(layers)
    layers.graph.output("layers.0.output", None)
    crops = rng.standard_normal((2, PATCHES, 12), np.float32)
    found = session(layers.graph.in_memory()).run(None, {"crops": crops})[0]
    exact = {name: array.astype(np.float64) for name, array in drawn.items()}
    for index in range(2):
        expected = by_hand(exact, crops[index].astype(np.float64), activation)
        assert np.abs(found[index] - expected).max() < 2e-5


def test_llama_s_rotation_of_neighbours_is_that_of_halves_reordered(
    tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    """jina-vlm's weights as a plain Llama, in llama.cpp and in the reference."""
    model = Model(TINY)
    parts = model.decoder.layer
    norms = ("attn_q_norm.weight", "attn_k_norm.weight")

    def layer(index: int) -> Any:
        return {part: rows for part, rows in parts(index).items() if part not in norms}

    model.decoder = replace(model.decoder, architecture="llama", layer=layer, interleaved=True)
    path = tmp_path / "decoder.gguf"
    write_decoder(path, model, plan_decoder(model, "f32"), precision="f32", name="plain")
    with PromptMaker(Bundle.open(bundle("tiny-126-tied")), 1) as maker:
        prompts = [maker.make(builtin_samples(1)[0])]
    found = compare(path, model, prompts, threads=1)
    assert found.divergence.max() < 1e-4
    model.decoder = replace(model.decoder, interleaved=False)
    write_decoder(path, model, plan_decoder(model, "f32"), precision="f32", name="plain")
    assert compare(path, model, prompts, threads=1).divergence.max() > 1e-3


def test_the_usual_names() -> None:
    names = usual_layer("model.layers.", biases=True)(3)
    assert names["attn_q.bias"].tensor == "model.layers.3.self_attn.q_proj.bias"
    assert names["ffn_norm.weight"].tensor == "model.layers.3.post_attention_layernorm.weight"
    assert "attn_q_norm.weight" not in names
    normed = usual_layer("layers.", qk_norms=True)(0)
    assert normed["attn_k_norm.weight"].tensor == "layers.0.self_attn.k_norm.weight"
    assert "attn_q.bias" not in normed

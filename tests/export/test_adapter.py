"""LoRA adapters: merged as numpy merges them, and every other kind refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from edge_vlm_export import export_checkpoint
from edge_vlm_export.checkpoint import tensors as tensors_module
from edge_vlm_export.families.opened import Model
from safetensors.numpy import load_file, save_file

from edge_vlm.bundle.manifest import Bundle
from edge_vlm.errors import CheckpointError
from tests.conftest import GOLDEN, Run, assert_one_line
from tests.export_helpers import copy_checkpoint, edit_json, refused, set_key

Float32 = npt.NDArray[np.float32]
Arrays = dict[str, Float32]

JINA, LLAVA = "tiny-126-tied", "llava-onevision"
PREFIX = "base_model.model."
BLOCK = "model.language_model.layers."
# Modules as PEFT calls them, and the tensor each is of.
MODULES = {
    JINA: {
        f"{BLOCK}0.attn.qkv_w": f"{BLOCK}0.attn.qkv_w.weight",
        f"{BLOCK}1.ffn.down": f"{BLOCK}1.ffn.down.weight",
        "model.vision_model.layers.1.ffn.up": "model.vision_model.layers.1.ffn.up.weight",
    },
    LLAVA: {
        # As transformers 4.52 and later call a module, and as earlier ones did.
        "model.language_model.layers.0.self_attn.q_proj": (
            "language_model.layers.0.self_attn.q_proj.weight"
        ),
        "language_model.model.layers.1.mlp.down_proj": (
            "language_model.layers.1.mlp.down_proj.weight"
        ),
        "model.multi_modal_projector.linear_1": "multi_modal_projector.linear_1.weight",
    },
}
CONFIG = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "owner/base",
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.18.0",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "qkv_w"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def make_adapter(folder: Path, name: str, rank: int = 4, **config: Any) -> tuple[Path, Arrays]:
    """An adapter of random numbers, and its tensors."""
    random, arrays, base = np.random.default_rng(7), Arrays(), Model(GOLDEN / name / "checkpoint")
    for module, tensor in MODULES[name].items():
        n_out, n_in = base.tensors[tensor].shape
        for half, shape in (("A", (rank, n_in)), ("B", (n_out, rank))):
            values = random.standard_normal(shape).astype(np.float32) * 0.1
            arrays[f"{PREFIX}{module}.lora_{half}.weight"] = values
    folder.mkdir()
    save_file(arrays, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")
    return folder, arrays


def by_numpy(name: str, arrays: Arrays, scale: float) -> Arrays:
    """The merged tensors in double precision, rounded at the end."""
    base = Model(GOLDEN / name / "checkpoint").tensors
    merged = {}
    for module, tensor in MODULES[name].items():
        a, b = (arrays[f"{PREFIX}{module}.lora_{half}.weight"].astype(np.float64) for half in "AB")
        merged[tensor] = (base[tensor].read() + scale * (b @ a)).astype(np.float32)
    return merged


def rewrite(folder: Path, **more: Float32 | None) -> None:
    """Add tensors to an adapter, or with None take them away."""
    path = folder / "adapter_model.safetensors"
    arrays = load_file(path) | more
    save_file({name: value for name, value in arrays.items() if value is not None}, path)


@pytest.fixture(params=[JINA, LLAVA])
def name(request: pytest.FixtureRequest) -> str:
    """Of a checkpoint of each family."""
    return str(request.param)


@pytest.mark.parametrize(
    ("rank", "config", "scale"),
    [
        (4, {}, 4.0),
        (4, {"use_rslora": True}, 8.0),
        (4, {"lora_alpha": 2}, 0.5),
        (2, {"rank_pattern": {"q_proj": 2}}, 8.0),
        (1, {"r": 1, "target_modules": "all-linear"}, 16.0),
    ],
)
def test_it_is_merged_as_numpy_merges_it(
    name: str, rank: int, config: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    folder, arrays = make_adapter(tmp_path / "adapter", name, rank, **config)
    base, merged = GOLDEN / name / "checkpoint", by_numpy(name, arrays, scale)
    model, plain = Model(base, folder), Model(base)
    for tensor, expected in merged.items():
        np.testing.assert_allclose(model.tensors[tensor].read(), expected, rtol=1e-5, atol=1e-6)
        assert np.abs(expected - plain.tensors[tensor].read()).max() > 0.01
    others = plain.tensors.tensors.keys() - merged.keys()
    assert all(model.tensors[other] is not None for other in others)
    assert all(model.tensors[other] == plain.tensors[other] for other in others)
    assert len(others) == len(plain.tensors.tensors) - 3


def test_a_part_of_a_tensor_at_a_time(name: str, tmp_path: Path) -> None:
    folder, arrays = make_adapter(tmp_path / "adapter", name)
    model = Model(GOLDEN / name / "checkpoint", folder)
    tensor, expected = next(iter(by_numpy(name, arrays, 4.0).items()))
    blocks = list(model.tensors[tensor].blocks(3, 40, n_values=1000))
    assert len(blocks) > 4
    assert max(map(np.size, blocks)) <= 1000
    np.testing.assert_allclose(np.concatenate(blocks), expected[3:40], rtol=1e-5, atol=1e-6)
    assert tensors_module.BLOCK_VALUES <= 1 << 24


@pytest.mark.engine
def test_the_bundle_is_that_of_the_merged_checkpoint(tmp_path: Path) -> None:
    folder, arrays = make_adapter(tmp_path / "adapter", LLAVA)
    merged = copy_checkpoint(LLAVA, tmp_path / "merged")
    stored, by_name = load_file(merged / "model.safetensors"), by_numpy(LLAVA, arrays, 4.0)
    family = Model(merged).family
    stored = {key: by_name.get(str(family.rename(key)), value) for key, value in stored.items()}
    save_file(stored, merged / "model.safetensors")
    base, tensors = GOLDEN / LLAVA / "checkpoint", []
    for source, adapter in ((base, folder), (merged, None), (base, None)):
        out = tmp_path / f"bundle{len(tensors)}"
        export_checkpoint(source, out, adapter=adapter, vision="fp32", decoder="f32")
        reader = gguf.GGUFReader(out / "decoder.gguf")
        tensors.append({tensor.name: np.array(tensor.data) for tensor in reader.tensors})
    for tensor, values in tensors[0].items():
        np.testing.assert_allclose(values, tensors[1][tensor], rtol=1e-5, atol=1e-6)
    assert (
        np.abs(tensors[0]["blk.0.attn_q.weight"] - tensors[2]["blk.0.attn_q.weight"]).max() > 0.01
    )
    told = Bundle.open(tmp_path / "bundle0").manifest.model
    assert told.source.startswith("checkpoint with adapter adapter (sha256 ")
    assert told.name == told.source


def test_the_command_merges_and_measures(run: Run, tmp_path: Path) -> None:
    folder, _ = make_adapter(tmp_path / "adapter", JINA)
    base, out = GOLDEN / JINA / "checkpoint", tmp_path / "bundle"
    done = run("export", base, "--adapter", folder, "--out", out, "--decoder", "f32", "--measure")
    assert done.returncode == 0, done.stderr
    assert b"the adapter says that its base is owner/base" in done.stderr
    assert b"with adapter adapter (sha256 " in run("info", out).stdout
    measured = run("verify", out, "--against", base, "--adapter", folder)
    assert measured.returncode == 0, measured.stderr
    assert run("verify", out, "--against", base).returncode == 1  # the base is another model
    assert_one_line(run("verify", out, "--adapter", folder), 2, "--adapter is for --against")


def test_an_adapter_beside_its_base(name: str, tmp_path: Path) -> None:
    checkpoint = copy_checkpoint(name, tmp_path / "checkpoint", link_weights=True)
    folder, arrays = make_adapter(tmp_path / "adapter", name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / file).rename(checkpoint / file)
        refused(checkpoint, f"{file}: a LoRA adapter lies beside the model", "--adapter")
        (tmp_path / "outputs").rmdir()
        (checkpoint / file).rename(folder / file)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / file).rename(checkpoint / file)
    model = Model(checkpoint, checkpoint)
    tensor, expected = next(iter(by_numpy(name, arrays, 4.0).items()))
    np.testing.assert_allclose(model.tensors[tensor].read(), expected, rtol=1e-5, atol=1e-6)


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    folder, _ = make_adapter(tmp_path / "adapter", JINA)
    refused(folder, 'is a LoRA adapter of "owner/base" and no model', "--adapter")


def test_an_adapter_beside_another_one_s_base(tmp_path: Path) -> None:
    checkpoint = copy_checkpoint(JINA, tmp_path / "checkpoint", link_weights=True)
    folder, _ = make_adapter(tmp_path / "adapter", JINA)
    (checkpoint / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="lies beside the model"):
        Model(checkpoint, folder)


@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("peft_type", "LOHA", 'peft_type is "LOHA", which cannot be merged: only "LORA" can'),
        ("peft_type", "IA3", '"IA3"'),
        ("use_dora", True, "use_dora is true"),
        ("fan_in_fan_out", True, "fan_in_fan_out is true"),
        ("bias", "all", 'bias is "all"'),
        ("lora_bias", True, "lora_bias is true"),
        ("init_lora_weights", "pissa_niter_4", 'init_lora_weights is "pissa_niter_4"'),
        ("init_lora_weights", "loftq", 'init_lora_weights is "loftq"'),
        ("alpha_pattern", {"q_proj": 32}, "alpha_pattern is"),
        ("layer_replication", [[0, 4]], "layer_replication is"),
        ("trainable_token_indices", [1, 2], "merge_and_unload()"),
        ("target_parameters", ["experts.w"], "target_parameters is"),
        ("loftq_config", {"loftq_bits": 4}, "loftq_config is"),
        ("use_qalora", True, "use_qalora is true"),
        ("alora_invocation_tokens", [1], "alora_invocation_tokens is"),
        ("something_new", "on", 'something_new is "on"'),
        ("r", 0, "r is 0"),
        ("r", None, "r is missing"),
        ("lora_alpha", "16", "lora_alpha"),
        ("lora_alpha", None, "lora_alpha is missing"),
    ],
)
def test_another_kind_of_adapter_is_refused(
    key: str, value: Any, fragment: str, tmp_path: Path
) -> None:
    folder, _ = make_adapter(tmp_path / "adapter", JINA)
    set_key(folder / "adapter_config.json", key, value)
    with pytest.raises(CheckpointError) as caught:
        Model(GOLDEN / JINA / "checkpoint", folder)
    assert "adapter_config.json: " in str(caught.value)
    assert fragment in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


LAYER = f"{PREFIX}{BLOCK}0."
ONES = np.ones((4, 4), np.float32)


@pytest.mark.parametrize(
    ("tensors", "fragment"),
    [
        ({f"{LAYER}attn.qkv_w.lora_magnitude_vector.weight": ONES}, "is of DoRA"),
        ({f"{PREFIX}model.embed.lora_embedding_A": ONES}, "is of an adapter of embeddings"),
        ({f"{LAYER}attn.qkv_w.lora_B.bias": ONES}, "is of an adapter with biases"),
        (
            {f"{PREFIX}model.language_model.layers.9.attn.qkv_w.lora_A.weight": ONES},
            "belongs to no",
        ),
        ({f"{LAYER}attn.out.lora_A.weight": ONES}, "has no other half"),
        (
            {f"{LAYER}attn.out.lora_A.weight": ONES, f"{LAYER}attn.out.lora_B.weight": ONES},
            "it is of another base",
        ),
        (
            {f"{LAYER}attn_lnorm.lora_A.weight": ONES, f"{LAYER}attn_lnorm.lora_B.weight": ONES},
            "fit",
        ),
        ({f"{LAYER}attn_lnorm.weight": np.ones(128, np.float32)}, "modules_to_save does not name"),
        ({f"{LAYER}attn.qkv_w.lora_A.weight": None}, "has no other half"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tensors: dict[str, Float32 | None], fragment: str, tmp_path: Path
) -> None:
    folder, _ = make_adapter(tmp_path / "adapter", JINA)
    rewrite(folder, **tensors)
    with pytest.raises(CheckpointError) as caught:
        Model(GOLDEN / JINA / "checkpoint", folder)
    assert "adapter_model.safetensors: tensor " in str(caught.value)
    assert fragment in str(caught.value)


def test_a_rank_that_the_settings_do_not_say(tmp_path: Path) -> None:
    folder, _ = make_adapter(tmp_path / "adapter", JINA, rank=2)
    with pytest.raises(CheckpointError, match=r"has rank 2, adapter_config\.json says 4"):
        Model(GOLDEN / JINA / "checkpoint", folder)


def test_modules_that_were_saved_whole(tmp_path: Path) -> None:
    folder, _ = make_adapter(tmp_path / "adapter", JINA, modules_to_save=["ln_f"])
    norm = np.full(128, 0.5, np.float32)
    rewrite(folder, **{f"{PREFIX}model.language_model.ln_f.weight": norm})
    base = GOLDEN / JINA / "checkpoint"
    name = "model.language_model.ln_f.weight"
    np.testing.assert_array_equal(Model(base, folder).tensors[name].read(), norm)
    rewrite(folder, **{f"{PREFIX}model.language_model.ln_f.weight": norm[:5]})
    with pytest.raises(CheckpointError, match=r"has shape \[5\], the base's has \[128\]"):
        Model(base, folder)


def test_a_table_that_the_head_shares_is_not_replaced(tmp_path: Path) -> None:
    folder, _ = make_adapter(tmp_path / "adapter", JINA, modules_to_save=["embedding"])
    base, name = GOLDEN / JINA / "checkpoint", "model.language_model.embedding.embedding"
    rewrite(folder, **{f"{PREFIX}{name}": Model(base).tensors[name].read()})
    with pytest.raises(CheckpointError, match="in common with its output head"):
        Model(base, folder)


def test_a_table_is_no_linear_layer(tmp_path: Path) -> None:
    folder, _ = make_adapter(tmp_path / "adapter", LLAVA)
    table = f"{PREFIX}model.language_model.embed_tokens.lora_"
    halves = {"A": np.ones((4, 128), np.float32), "B": np.ones((704, 4), np.float32)}
    rewrite(folder, **{f"{table}{half}.weight": values for half, values in halves.items()})
    with pytest.raises(CheckpointError, match="is a table and no linear layer"):
        Model(GOLDEN / LLAVA / "checkpoint", folder)


def test_files_of_an_adapter_that_are_not_there(tmp_path: Path) -> None:
    base = GOLDEN / JINA / "checkpoint"
    with pytest.raises(CheckpointError, match="no such adapter folder"):
        Model(base, tmp_path / "nothing")
    folder, _ = make_adapter(tmp_path / "adapter", JINA)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Model(base, folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: a program runs when"):
        Model(base, folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: is missing"):
        Model(base, folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: is missing"):
        Model(base, folder)


def test_an_adapter_without_adapters(tmp_path: Path) -> None:
    folder, arrays = make_adapter(tmp_path / "adapter", JINA, modules_to_save=["ln_f"])
    norm = {f"{PREFIX}model.language_model.ln_f.weight": np.ones(128, np.float32)}
    rewrite(folder, **dict.fromkeys(arrays), **norm)
    with pytest.raises(CheckpointError, match="has no lora_A and lora_B"):
        Model(GOLDEN / JINA / "checkpoint", folder)
    edit_json(folder / "adapter_config.json", lambda data: data.pop("peft_type"))
    with pytest.raises(CheckpointError, match="peft_type is missing"):
        Model(GOLDEN / JINA / "checkpoint", folder)

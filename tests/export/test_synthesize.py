"""Random checkpoints in the released layout."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from edge_vlm_export import export_checkpoint
from edge_vlm_export.checkpoint.tensors import Checkpoint
from edge_vlm_export.cli.tools import group
from edge_vlm_export.families.jina_vlm.config import read_settings
from edge_vlm_export.families.jina_vlm.family import FAMILY, TEXT_TOKENS, made_up_tokens
from edge_vlm_export.families.opened import Description, Model
from edge_vlm_export.synthetic.bundle import cached_synthetic_bundle, synthetic_bundle
from edge_vlm_export.synthetic.checkpoint import config_folder, synthesize
from edge_vlm_export.synthetic.tokenizer import tokenizer_files
from safetensors import safe_open
from tokenizers import Tokenizer

from edge_vlm import EdgeVLM, MachineSettings
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.errors import CheckpointError, InputError
from edge_vlm.families.jina_vlm.released import DECODER, IMAGE_PROCESSOR
from tests.conftest import GOLDEN, GOLDEN_NAMES
from tests.export_helpers import copy_checkpoint, set_key

pytestmark = pytest.mark.engine  # it exports models


def test_the_released_config_has_the_released_sizes() -> None:
    settings = read_settings(config_folder("jina-vlm"))
    text, vision = settings.text, settings.vision
    assert settings.image_processor == IMAGE_PROCESSOR
    assert (text.n_layers, text.hidden_size, text.ffn_size) == (28, 2048, 6144)
    assert (text.attention.n_heads, text.attention.n_kv_heads) == (16, 8)
    assert (text.vocab_size, text.additional_vocab_size) == (151936, 128)
    assert text.max_sequence_length == DECODER.max_sequence_length
    assert (vision.n_layers, vision.hidden_size, vision.ffn_size) == (27, 1152, 4304)
    assert vision.used_states == (24, 18)
    assert settings.stop_ids == (151643, 151645)
    shapes = Description(config_folder("jina-vlm")).shapes()
    assert shapes["model.vision_model.layers.26.attn.qkv_w.weight"] == (3456, 1152)
    assert shapes["model.vision_model.vl_connector.projector.up.weight"] == (12288, 1152)
    assert shapes["model.language_model.layers.27.ffn.up.weight"] == (12288, 2048)
    assert shapes["lm_head.weight"] == (151936, 2048)
    assert sum(map(math.prod, shapes.values())) == pytest.approx(2.48e9, rel=0.01)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_tensors_are_those_of_a_published_checkpoint(name: str, tmp_path: Path) -> None:
    source = GOLDEN / name / "checkpoint"
    out = synthesize(source, tmp_path / "random")
    original, random = Checkpoint.open(source), Checkpoint.open(out)
    assert {n: t.shape for n, t in random.tensors.items()} == {
        n: t.shape for n, t in original.tensors.items()
    }
    assert {tensor.dtype for tensor in random.tensors.values()} == {"BF16"}
    with safe_open(out / "model.safetensors", "np") as file:  # the format's own reader agrees
        assert set(file.keys()) == set(original.tensors)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_it_answers_and_its_output_is_not_degenerate(tmp_path: Path) -> None:
    checkpoint = synthesize("demo", tmp_path / "random", seed=3)
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle", vision="fp32", decoder="f32")
    picture = np.random.default_rng(0).integers(0, 256, (200, 260, 3), np.uint8)
    with EdgeVLM.load(bundle, settings=MachineSettings(threads=1)) as vlm:
        first = vlm.ask([picture], "What?", max_tokens=12).answer
        second = vlm.ask([picture], "Where is the number?", max_tokens=12).answer
    assert len(set(first)) > 3
    assert first != second


def test_values_have_the_intended_spread_and_depend_on_the_seed(tmp_path: Path) -> None:
    one, same, other = (
        Checkpoint.open(synthesize("demo", tmp_path / str(index), seed=seed))
        for index, seed in enumerate((1, 1, 2))
    )
    text = "model.language_model."
    for name, std in {
        f"{text}layers.0.attn.qkv_w.weight": 1 / 16,
        f"{text}layers.0.attn.out.weight": 1 / 16 / math.sqrt(6),
        f"{text}embedding.embedding": 1 / 64,
    }.items():
        values = one[name].read()
        assert values.std() == pytest.approx(std, rel=0.03)
        assert abs(values.mean()) < 0.05 * std
        assert np.array_equal(values, same[name].read())
        assert not np.array_equal(values, other[name].read())
    assert one[f"{text}ln_f.weight"].read().mean() == pytest.approx(1, abs=0.05)
    assert not one[f"{text}layers.0.attn.q_b"].read().any()


def test_fewer_layers(tmp_path: Path) -> None:
    out = synthesize("demo", tmp_path / "small", layers=1, vision_layers=3)
    settings = read_settings(out)
    assert (settings.text.n_layers, settings.vision.n_layers) == (1, 3)
    Model(out)
    with pytest.raises(CheckpointError, match="vit_layers"):
        synthesize("demo", tmp_path / "none", vision_layers=1)
    assert {path.name for path in tmp_path.iterdir()} == {"small"}


def test_shards_have_an_index(tmp_path: Path) -> None:
    out = synthesize("demo", tmp_path / "random", shard_bytes=1_000_000)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    tensors = Model(out).tensors
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        2 * math.prod(t.shape) for t in tensors.tensors.values()
    )


def test_the_synthetic_vocabulary_has_the_released_ids(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(config_folder("jina-vlm"), folder)
    for name, content in tokenizer_files(made_up_tokens(151936, 151643)).items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    tokenizer = FAMILY.read_tokenizer(folder, read_settings(folder))
    assert len(tokenizer.tokens) == 152064
    assert len(tokenizer.merges) == 151643 - 256
    assert tokenizer.bos == 151643
    names = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>", "<im_slice>")
    assert [tokenizer.special[name] for name in names] == list(range(151936, 151942))
    assert [tokenizer.special[name] for name in TEXT_TOKENS] == [151643, 151644, 151645]
    published = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = " User: What does the sign say in Z\u00fcrich? \u732b"
    ids = published.encode(text).ids
    assert published.decode(ids) == text
    assert len(ids) < 0.7 * len(text)


def test_impossible_vocabularies() -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        tokenizer_files(made_up_tokens(300, 200))
    with pytest.raises(InputError, match="no tokenizer"):
        tokenizer_files(made_up_tokens(1000, 999))
    with pytest.raises(InputError, match="no tokenizer"):
        tokenizer_files(made_up_tokens(10_000_000, 9_999_000))


def test_stopping_leaves_nothing(tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize("demo", tmp_path / "random", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(InputError, match="are needed"):
        synthesize("demo", tmp_path / "random")
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path: Path) -> None:
    out = tmp_path / "random"
    arguments = ["synthesize", "--config", "demo", "--layers", "1", "--out", str(out)]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    assert "MB" in result.stderr
    assert result.stdout == ""
    again = CliRunner().invoke(group, arguments)
    assert isinstance(again.exception, InputError)
    assert "already exists" in str(again.exception)
    unknown = CliRunner().invoke(group, ["synthesize", "--config", "nothing", "--out", "x"])
    names = "neither jina-vlm nor demo nor internvl2.5-1b nor qwen2.5-vl-3b nor qwen2.5-vl-7b"
    assert f"{names} nor a folder" in str(unknown.exception)


def test_a_config_folder_that_lacks_a_file(tmp_path: Path) -> None:
    folder = copy_checkpoint("tiny-126-tied", tmp_path / "checkpoint")
    (folder / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"processor_config\.json: is missing"):
        synthesize(folder, tmp_path / "random")


def test_without_a_tokenizer_one_is_made_up(tmp_path: Path) -> None:
    folder = copy_checkpoint("tiny-378", tmp_path / "checkpoint")
    (folder / "tokenizer.json").unlink()
    set_key(folder / "generation_config.json", "bos_token_id", 700)
    out = synthesize(folder, tmp_path / "random")
    tokenizer = FAMILY.read_tokenizer(out, read_settings(out))
    assert tokenizer.bos == 700
    assert tokenizer.special["<im_start>"] == 768


def test_a_random_bundle_of_a_recipe_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_VLM_CACHE", str(tmp_path / "cache"))
    stages: list[str] = []
    out = cached_synthetic_bundle("demo", "best", progress=lambda stage, *_: stages.append(stage))
    manifest = Bundle.open(out).manifest
    assert out.is_relative_to(tmp_path / "cache")
    assert manifest.model.name == "random-demo"
    assert (manifest.vision.precision, manifest.decoder.precision) == ("fp32", "q8_0")
    assert stages[0] == "weights"
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # no checkpoint is left
    stages.clear()
    assert cached_synthetic_bundle("demo", "best") == out
    assert stages == []
    for config, recipe in (("elsewhere", "best"), ("demo", "../best"), ("demo", "toaster")):
        with pytest.raises(InputError):
            cached_synthetic_bundle(config, recipe)


def test_a_stopped_bundle_leaves_nothing(tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "decoder":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic_bundle("demo", "best", tmp_path / "bundle", progress=stop)
    assert list(tmp_path.iterdir()) == []

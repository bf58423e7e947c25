"""``edge-vlm verify``: hashes, a picture through both engines, and the measurement again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from edge_vlm_export import export_checkpoint
from edge_vlm_export.steps.description import record_files

from edge_vlm.bundle.manifest import Bundle
from edge_vlm.cli.main import group
from edge_vlm.cli.models.verify import command
from edge_vlm.errors import BundleError, CheckpointError, DecoderError, EdgeVLMError, VisionError
from tests.conftest import GOLDEN

CHECKPOINT = GOLDEN / "tiny-126-tied" / "checkpoint"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int8 and q8_0, with its report."""
    out = tmp_path_factory.mktemp("verify") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_VLM_THREADS", "1")
        return export_checkpoint(CHECKPOINT, out, decoder="q8_0", min_cosine=0.9)


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def verify(*arguments: str | Path) -> Result:
    return CliRunner(env={"EDGE_VLM_THREADS": "1"}).invoke(
        command, list(map(str, arguments)), catch_exceptions=True
    )


def record(folder: Path) -> None:
    """Write the manifest for files that were changed."""
    manifest = Bundle(folder, Bundle.open(folder.parent / "good").manifest).manifest
    files = record_files([folder / name for name in manifest.files])
    text = manifest.model_copy(update={"files": files}).to_json()
    (folder / "bundle.json").write_text(text, encoding="utf-8")


@pytest.mark.engine
def test_an_intact_bundle_shows_its_report(exported: Path) -> None:
    result = verify(exported)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{exported}: intact, and it computes"
    assert "as exported" in lines
    assert any(line.startswith("  same token") for line in lines)
    assert "measured now" not in lines


@pytest.mark.engine
def test_measured_again_it_is_as_good_as_reported(exported: Path) -> None:
    result = verify(exported, "--against", CHECKPOINT, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["intact"]
    assert data["failures"] == []
    before, now = data["report"], data["measured"]
    assert now["decoder_file"] == before["decoder_file"]
    for part in ("decoder", "vision"):
        for key, value in before[part].items():
            near = pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value
            assert now[part][key] == near, (part, key)


def test_a_bundle_that_lost_too_much_fails(bundle: Callable[..., Path]) -> None:
    """This one was exported without measuring, so nothing held it back."""
    result = verify(bundle("tiny-126-tied", decoder="q4_0"), "--against", CHECKPOINT)
    assert isinstance(result.exception, EdgeVLMError)
    assert result.exception.exit_code == 1
    assert "mean divergence" in str(result.exception)
    assert "measured now" in result.stdout


@pytest.mark.engine
def test_another_checkpoint_is_refused(exported: Path) -> None:
    result = verify(exported, "--against", GOLDEN / "tiny-378" / "checkpoint")
    assert isinstance(result.exception, CheckpointError)
    assert "another model" in str(result.exception)


@pytest.mark.engine
def test_damage_is_found(folder: Path) -> None:
    data = bytearray((folder / "decoder.gguf").read_bytes())
    data[-1] ^= 1
    (folder / "decoder.gguf").write_bytes(data)
    result = verify(folder)
    assert isinstance(result.exception, BundleError)
    assert "SHA-256" in str(result.exception)


@pytest.mark.engine
def test_a_decoder_of_nothing_is_found(folder: Path) -> None:
    """Intact by its hash, loadable, and useless."""
    shutil.copytree(folder, folder.parent / "good")
    reader = gguf.GGUFReader(folder / "decoder.gguf", "r+")
    next(t for t in reader.tensors if t.name == "output_norm.weight").data[:] = 0
    del reader
    record(folder)
    assert isinstance(verify(folder).exception, DecoderError)


@pytest.mark.parametrize("value", [np.nan, 0])
def test_a_vision_tower_of_nothing_is_found(
    value: float, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundle("tiny-126-tied", target="portable"), tmp_path / "bundle"))
    shutil.copytree(folder, tmp_path / "good")
    model = onnx.load(folder / "vision.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor)
            filled = np.full_like(values, value)
            tensor.CopyFrom(onnx.numpy_helper.from_array(filled, tensor.name))
    onnx.save(model, folder / "vision.onnx")
    record(folder)
    result = verify(folder)
    assert isinstance(result.exception, VisionError), result.output


@pytest.mark.engine
def test_the_demo_bundle_passes() -> None:
    result = verify("demo")
    assert result.exit_code == 0, result.output


def test_samples_need_a_checkpoint() -> None:
    result = CliRunner().invoke(group, ["verify", "demo", "--samples", "builtin"])
    assert result.exit_code == 2
    assert "--samples is for --against" in result.output

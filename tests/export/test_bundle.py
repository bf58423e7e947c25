"""An export as a whole: the bundle it gives, and that it leaves nothing behind when it fails."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from edge_vlm_export.checkpoint.new_folder import SPARE_BYTES
from edge_vlm_export.proof import open_check
from edge_vlm_export.steps.export import estimated_bytes
from edge_vlm_export.synthetic.checkpoint import config_folder

from edge_vlm.bundle.manifest import Bundle
from edge_vlm.errors import CheckpointError, EdgeVLMError, InputError
from tests.conftest import GOLDEN, GOLDEN_NAMES
from tests.export_helpers import copy_checkpoint, export_exact, set_key

pytestmark = pytest.mark.engine  # it exports models

CHECKPOINT = GOLDEN / "tiny-126-tied" / "checkpoint"
Steps = list[tuple[str, int, int]]


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An earlier bundle at the output path, in a folder of its own."""
    (tmp_path / "outputs").mkdir()
    return export_exact(CHECKPOINT, tmp_path / "outputs" / "bundle", name="old")


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_bundle_opens_and_its_files_have_the_recorded_hashes(
    name: str, bundle: Callable[..., Path]
) -> None:
    folder = bundle(name)
    manifest = Bundle.open(folder).manifest
    assert {path.name for path in folder.iterdir()} == {"bundle.json", *manifest.files}
    for file, record in manifest.files.items():
        data = (folder / file).read_bytes()
        assert len(data) == record.size
        assert hashlib.sha256(data).hexdigest() == record.sha256


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_manifest_tells_the_checkpoint_s_settings(
    name: str, bundle: Callable[..., Path]
) -> None:
    manifest = Bundle.open(bundle(name, vision="fp16", decoder="bf16")).manifest
    folder = GOLDEN / name / "checkpoint"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    images = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    found = manifest.image_processor.model_dump(mode="json")
    assert found == {key: images.get(key, 3) for key in found}
    assert (manifest.vision.precision, manifest.decoder.precision) == ("fp16", "bf16")
    assert manifest.decoder.tied_head is config["tie_word_embeddings"]
    assert (
        manifest.decoder.n_kv_heads
        == (config["text_config"]["block_config"]["attn_config"]["n_kv_heads"])
    )
    assert manifest.decoder.vocab_size == config["text_config"]["vocab_size"]
    assert manifest.tokens.bos == config["bos_token_id"]
    assert manifest.tokens.im_patch == images["patch_token_id"]
    assert manifest.tokens.im_col == images["column_token_id"]
    assert manifest.tokens.im_start == images["start_token_id"]
    assert manifest.tokens.im_end == images["end_token_id"]
    assert manifest.tokens.special["<|image|>"] == manifest.tokens.image
    assert len(manifest.tokens.special) == {"tiny-378": 34, "tiny-126-tied": 16}[name]
    assert manifest.prompt.normalizer == "NFC"
    assert manifest.prompt.always_start_with_space
    writers = {"python", "edge-vlm", "gguf", "llama-cpp-python", "numpy", "onnx"}
    assert set(manifest.created_with) == writers


def test_name_licence_and_origin(tmp_path: Path) -> None:
    def identity(checkpoint: Path, **options: Any) -> tuple[str, str, str, str | None]:
        out = tmp_path / f"bundle-{len(list(tmp_path.iterdir()))}"
        model = Bundle.open(export_exact(checkpoint, out, **options)).manifest.model
        return model.name, model.license, model.source, model.revision

    plain = copy_checkpoint("tiny-126-tied", tmp_path / "my-model")
    assert identity(plain) == ("my-model", "unknown", "my-model", None)
    assert identity(plain, name="Mine") == ("Mine", "unknown", "my-model", None)
    (plain / "LICENSE").write_text("\n# Some License 1.0\n\nText.\n")
    assert identity(plain)[1] == "Some License 1.0"
    (plain / "README.md").write_text("---\nlanguage: en\nlicense: cc-by-nc-4.0\n---\n# Model\n")
    assert identity(plain)[1] == "cc-by-nc-4.0"
    (plain / "README.md").write_text("---\nlicense: other\nlicense_name: 'own'\n---\n")
    assert identity(plain)[1] == "own"
    (plain / "README.md").write_text("No front matter.\nlicense: mit\n")
    assert identity(plain)[1] == "Some License 1.0"
    set_key(plain / "config.json", "_name_or_path", "/home/someone/secret-project")
    assert identity(plain)[0] == "my-model"
    set_key(plain / "config.json", "_name_or_path", "owner/model")
    assert identity(plain)[:3:2] == ("owner/model", "owner/model")
    revision = "0123456789" * 4
    cached = tmp_path / "models--jinaai--jina-vlm" / "snapshots"
    cached.mkdir(parents=True)
    plain.rename(cached / revision)
    assert identity(cached / revision)[0] == "jinaai/jina-vlm"
    assert identity(cached / revision)[2:] == ("jinaai/jina-vlm", revision)


def test_progress_counts_every_stage_to_its_end(tmp_path: Path) -> None:
    steps: Steps = []
    export_exact(CHECKPOINT, tmp_path / "bundle", progress=lambda *step: steps.append(step))
    assert list(dict.fromkeys(stage for stage, _, _ in steps)) == [
        "vision",
        "decoder",
        "hash",
        "verify",
    ]
    for name in ("vision", "decoder", "hash", "verify"):
        done = [n for stage, n, _ in steps if stage == name]
        totals = {total for stage, _, total in steps if stage == name}
        assert done[0] == 0
        assert done == sorted(done)
        assert {done[-1]} == totals
    assert len(steps) > 60


@pytest.mark.parametrize("overwrite", [False, True])
def test_stopping_at_any_moment_leaves_nothing(tmp_path: Path, old: Path, overwrite: bool) -> None:
    out = old if overwrite else old.parent / "new"
    before = snapshot(old.parent)
    steps: Steps = []
    export_exact(CHECKPOINT, tmp_path / "x", progress=lambda *step: steps.append(step))
    for last in (0, 1, len(steps) // 3, len(steps) // 2, len(steps) - 3, len(steps) - 1):
        seen = 0

        def stop(*step: Any, last: int = last) -> None:
            nonlocal seen
            if seen == last:
                assert any(".partial-" in path.name for path in out.parent.iterdir()) or not last
                raise KeyboardInterrupt
            seen += 1

        with pytest.raises(KeyboardInterrupt):
            export_exact(CHECKPOINT, out, progress=stop, overwrite=overwrite)
        assert snapshot(old.parent) == before
        assert [path.name for path in old.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("step", ["vision", "decoder", "hash", "write_text", "verify", "fsync"])
def test_a_failure_at_any_step_leaves_nothing(
    old: Path, step: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def reached(stage: str, done: int, total: int) -> None:
        if stage == step and done:
            fail()

    if step == "write_text":
        monkeypatch.setattr(Path, step, fail)
    elif step == "fsync":
        monkeypatch.setattr(os, step, fail)
    out = old if overwrite else old.parent / "new"
    before = snapshot(old.parent)
    with pytest.raises(EdgeVLMError, match=r"^(.*vision\.onnx: )?No space left on device$"):
        export_exact(CHECKPOINT, out, overwrite=overwrite, progress=reached)
    assert snapshot(old.parent) == before
    assert [path.name for path in old.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_restores_the_old_bundle(
    old: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename, calls = snapshot(old.parent), Path.rename, 0

    def fail_once(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(EdgeVLMError, match="Permission denied"):
        export_exact(CHECKPOINT, old, name="new", overwrite=True)
    assert calls >= failing
    assert snapshot(old.parent) == before


def test_an_old_bundle_is_kept_unless_asked(old: Path) -> None:
    before = snapshot(old.parent)
    with pytest.raises(InputError, match="already exists"):
        export_exact(CHECKPOINT, old)
    assert snapshot(old.parent) == before
    export_exact(CHECKPOINT, old, name="new", overwrite=True)
    assert Bundle.open(old).name == "new"
    assert [path.name for path in old.parent.iterdir()] == ["bundle"]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "bundle"

    def make(stage: str, done: int, total: int) -> None:
        if stage == "hash" and not out.exists():
            out.mkdir()
            (out / "precious").write_text("x")

    with pytest.raises(InputError, match="already exists"):
        export_exact(CHECKPOINT, out, progress=make)
    assert snapshot(tmp_path) == {"bundle/precious": b"x"}


def test_only_a_bundle_is_overwritten(tmp_path: Path, bundle: Callable[..., Path]) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    link = tmp_path / "link"
    link.symlink_to(bundle("tiny-126-tied"), target_is_directory=True)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    for out in (folder, folder / "thesis.txt", link, dangling):
        with pytest.raises(InputError, match="is not a bundle folder"):
            export_exact(CHECKPOINT, out, overwrite=True)
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "documents", "link"]


def test_the_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    checkpoint = copy_checkpoint("tiny-126-tied", tmp_path / "checkpoint")
    (checkpoint / "bundle.json").write_text("{}")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="the checkpoint itself"):
        export_exact(checkpoint, checkpoint, overwrite=True)
    assert snapshot(tmp_path) == before


def test_the_output_s_parent_has_to_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        export_exact(CHECKPOINT, tmp_path / "a" / "b")
    with pytest.raises(InputError, match="no name for a new folder"):
        export_exact(CHECKPOINT, tmp_path / "..")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [{"vision": "int7"}, {"decoder": "q4_1"}, {"name": ""}])
def test_options_are_checked(tmp_path: Path, option: dict[str, str]) -> None:
    with pytest.raises(InputError, match=next(iter(option))):
        export_exact(CHECKPOINT, tmp_path / "bundle", **option)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=SPARE_BYTES))
    stages: Steps = []
    with pytest.raises(InputError, match=r"[0-9.]+ MB are needed, 67\.1 MB are free"):
        export_exact(CHECKPOINT, tmp_path / "bundle", progress=lambda *step: stages.append(step))
    assert stages == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("vision", "decoder", "announced"),
    [("int8", "q4_k_m", 6.51e9), ("int8", "q4_0", 6.45e9), ("fp32", "q4_k_m", 7.43e9)],
)
def test_the_room_is_estimated_from_the_settings_alone(
    vision: str, decoder: str, announced: float
) -> None:
    """Beside what exports of a full-size checkpoint announced, from all its tensors."""
    found = estimated_bytes(config_folder("jina-vlm"), vision, decoder)
    assert found == pytest.approx(announced, rel=0.03)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("vision.onnx", lambda data: data[:-1000], "onnxruntime cannot load"),
        ("vision.onnx", lambda data: data.replace(b"n_crops", b"m_crops"), "expected"),
        ("decoder.gguf", lambda data: data[:1000], "llama.cpp cannot load"),
        ("decoder.gguf", lambda data: data.replace(b"<im_col>", b"<im_c0l>"), "does not give id"),
    ],
)
def test_a_bundle_that_does_not_work_is_noticed(
    tmp_path: Path,
    file: str,
    damage: Callable[[bytes], bytes],
    message: str,
) -> None:
    def spoil(stage: str, done: int, total: int) -> None:
        if stage == "hash" and not done:
            (path,) = tmp_path.glob(f".bundle.partial-*/{file}")
            path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(EdgeVLMError, match=f"the written bundle does not work: .*{message}"):
        export_exact(CHECKPOINT, tmp_path / "bundle", progress=spoil)
    assert list(tmp_path.iterdir()) == []


def test_verifying_gives_llama_s_log_back(bundle: Callable[..., Path]) -> None:
    import ctypes

    lines: list[bytes] = []
    log = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text))
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(log, ctypes.c_void_p())
    try:
        open_check.verify_bundle(bundle("tiny-126-tied"))
        assert lines == []
        params = llama_cpp.llama_model_default_params()
        assert not llama_cpp.llama_model_load_from_file(b"/nowhere.gguf", params)
        assert lines
    finally:
        llama_cpp.llama_log_set(before, data)


def test_tensors_are_read_one_at_a_time_while_writing(tmp_path: Path) -> None:
    """A value that is wrong is found only then, and also leaves nothing."""
    checkpoint = copy_checkpoint("tiny-126-tied", tmp_path / "checkpoint")
    path = checkpoint / "model-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = b"\x80\x7f"  # infinity in bfloat16
    path.write_bytes(data)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(CheckpointError, match="infinite"):
        export_exact(checkpoint, tmp_path / "outputs" / "bundle")
    assert list((tmp_path / "outputs").iterdir()) == []


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )


def test_importing_the_exporter_loads_no_heavy_module() -> None:
    heavy = ["onnx", "gguf", "onnxruntime", "llama_cpp", "torch", "transformers", "safetensors"]
    code = f"import sys, edge_vlm_export; print([m for m in {heavy} if m in sys.modules])"
    result = python(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_an_export_prints_nothing_and_loads_no_torch(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from edge_vlm_export import export_checkpoint
export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), vision="fp32", decoder="f16")
assert not {"torch", "transformers", "tensorflow", "jax"} & set(sys.modules)
"""
    result = python(code, str(CHECKPOINT), str(tmp_path / "bundle"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    Bundle.open(tmp_path / "bundle")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from edge_vlm_export import export_checkpoint
def wait(stage, done, total):
    if stage == "decoder":
        print("ready", flush=True)
        time.sleep(60)
export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), vision="fp32", decoder="f16", progress=wait)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(CHECKPOINT), str(tmp_path / "bundle")],
        # Background jobs of a shell start with SIGINT ignored, and hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert any(".partial-" in path.name for path in tmp_path.iterdir())
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
    finally:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 5
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []

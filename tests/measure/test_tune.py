"""``edge-vlm tune``: the search, what it stores, who uses it; and budgets of time and memory."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from edge_vlm import BudgetError, EdgeVLM, MachineSettings
from edge_vlm.bundle.find import embedded_bundle
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.families.jina_vlm.released import DECODER, IMAGE_PROCESSOR, VISION
from edge_vlm.machine.engine_settings import EngineSettings, untuned
from edge_vlm.measure.tune import _is_faster, _steps
from edge_vlm.planning.budget import limit_tiles
from edge_vlm.planning.limits import largest_picture, tiles_within, within_memory
from edge_vlm.planning.request import ModelSizes, plan_image
from edge_vlm.planning.speeds import Speeds
from edge_vlm.planning.tuning import Tuning, load_tuning, store_tuning, tuning_file
from tests.conftest import Run, assert_one_line

PICTURE = Path(__file__).parents[2] / "examples" / "images" / "receipt-1.png"
SPEEDS = Speeds(
    load_seconds=1.0,
    vision_seconds_per_tile=1.0,
    prefill_tokens_per_second=100.0,
    prefill_tokens=512,
    decode_tokens_per_second=20.0,
    decode_positions=512,
)
TUNING = Tuning(replace(untuned(), batch_size=96, vision_threads=1), SPEEDS, {"x": "1"}, "today")


@pytest.fixture
def manifest() -> Any:
    return Bundle.open(embedded_bundle()).manifest


@pytest.fixture
def released(manifest: Any) -> Any:
    """A manifest of the released architecture, with the files' sizes of int8 and q4_k_m."""
    sizes = {"vision.onnx": 430_000_000, "decoder.gguf": 1_280_000_000}
    files = {name: manifest.files[name].model_copy(update={"size": sizes[name]}) for name in sizes}
    return manifest.model_copy(
        update={
            "image_processor": IMAGE_PROCESSOR,
            "vision": VISION.model_copy(update={"precision": "int8"}),
            "decoder": DECODER.model_copy(update={"precision": "q4_k_m"}),
            "files": files,
        }
    )


def test_a_tuning_comes_back(manifest: Any) -> None:
    assert load_tuning(manifest) is None
    path = store_tuning(manifest, TUNING)
    assert load_tuning(manifest) == TUNING
    assert path == tuning_file(manifest)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_tuning_belongs_to_the_files(manifest: Any) -> None:
    record = manifest.files["decoder.gguf"].model_copy(update={"sha256": "0" * 64})
    files = {**manifest.files, "decoder.gguf": record}
    assert tuning_file(manifest.model_copy(update={"files": files})) != tuning_file(manifest)


def _changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    data = {"format_version": 1, "model": "demo", **asdict(TUNING)}
    change(data)
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"[" * 30_000,
        b"\xff",
        _changed(lambda d: d.pop("speeds")),
        _changed(lambda d: d.update(format_version=2)),
        _changed(lambda d: d.update(date=3)),
        _changed(lambda d: d.update(measured_with={"a": "\x1b[2J"})),
        _changed(lambda d: d["settings"].update(threads=0)),
        _changed(lambda d: d["settings"].update(repack="yes")),
        _changed(lambda d: d["speeds"].update(load_seconds=-1)),
    ],
)
def test_a_file_that_is_wrong_is_ignored_with_a_line(
    manifest: Any, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tuning_file(manifest)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert load_tuning(manifest) is None
    assert len(caplog.messages) == 1
    assert "ignored" in caplog.messages[0]
    assert caplog.messages[0].isprintable()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_in_its_place_is_not_waited_for(
    manifest: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tuning_file(manifest)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert load_tuning(manifest) is None
    assert "no regular file" in caplog.text


@pytest.mark.engine
def test_the_tuning_is_used_and_settings_win(manifest: Any) -> None:
    store_tuning(manifest, TUNING)
    with EdgeVLM.load("demo", settings=MachineSettings(threads=1)) as vlm:
        engines = vlm.engine.engines
        assert (engines.batch_size, engines.threads) == (96, 1)
    with EdgeVLM.load("demo", settings=MachineSettings(threads=1, batch_size=32)) as vlm:
        assert vlm.engine.engines.batch_size == 32


def test_a_candidate_has_to_be_faster_by_the_margin() -> None:
    now, other = untuned(), replace(untuned(), batch_size=64)
    calls: list[EngineSettings] = []

    def measure(seconds: float) -> Callable[[EngineSettings], float]:
        def one(engines: EngineSettings) -> float:
            calls.append(engines)
            return 1.0 if engines == now else seconds

        return one

    assert _is_faster(measure(0.9), now, other, 0.05)
    assert calls == [now, other] * 3
    assert not _is_faster(measure(0.97), now, other, 0.05)
    calls.clear()
    assert not _is_faster(measure(2.0), now, other, 0.05)
    assert len(calls) == 2  # hopeless


def test_what_is_given_is_not_varied(manifest: Any) -> None:
    names = {name for name, _, _ in _steps(untuned(), manifest, set())}
    assert {"repack", "flash_attention", "batch_size", "mmap", "spinning"} <= names
    assert "tiles_per_call" not in names  # int8 quantizes the tiles of a call in one range
    vision = manifest.vision.model_copy(update={"precision": "fp32"})
    float32 = manifest.model_copy(update={"vision": vision})
    assert names | {"tiles_per_call"} == {name for name, _, _ in _steps(untuned(), float32, set())}
    fixed = {"repack", "spinning"}
    assert {name for name, _, _ in _steps(untuned(), manifest, fixed)} == names - fixed


def test_the_command_tunes_shows_and_forgets(run: Run, tmp_path: Path) -> None:
    own = {
        "EDGE_VLM_MODEL": "demo",
        "EDGE_VLM_CONFIG": str(tmp_path / "config"),
        "EDGE_VLM_REPACK": "0",
        "EDGE_VLM_MMAP": "1",
        "EDGE_VLM_SPINNING": "0",
        "EDGE_VLM_TILES_PER_CALL": "1",
    }
    result = run("tune", "--json", **own)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["settings"]["threads"] == 1  # EDGE_VLM_THREADS
    assert not found["settings"]["repack"]
    assert found["speeds"]["vision_seconds_per_tile"] > 0
    assert json.loads(run("tune", "--show", "--json", **own).stdout) == found
    assert json.loads(run("info", "--json", **own).stdout)["tuning"] == found
    assert b"batch size" in run("info", **own).stdout
    plan = json.loads(run("plan", "640x480", "--json", **own).stdout)
    assert plan["seconds_from"] == "measured on this machine"
    said = run("ask", PICTURE, "What is the total?", "--within", "1000", **own)
    assert said.stdout
    assert b"at most 6 tiles" in said.stderr
    assert run("tune", "--reset", **own).returncode == 0
    assert b"not tuned" in run("tune", "--show", **own).stderr
    assert_one_line(run("tune", "--show", "--reset", **own), 2, "--reset")
    assert_one_line(run("ask", PICTURE, "?", "--within", "1", **own), 2, "edge-vlm tune")


def test_time_decides_on_tiles(released: Any) -> None:
    args = ([(2728, 2046)], ModelSizes.of(released), MachineSettings(), untuned(), SPEEDS)
    most = tiles_within(1e5, *args)
    assert most == 12
    found = [tiles_within(seconds, *args) for seconds in (10, 15, 20, 25, 30)]
    assert found == sorted(found)
    assert 1 <= found[0] < found[-1]
    with pytest.raises(BudgetError, match="one tile"):
        tiles_within(0.5, *args)
    with pytest.raises(BudgetError, match="edge-vlm tune"):
        tiles_within(10, [(300, 300)], ModelSizes.of(released), MachineSettings(), untuned(), None)


def test_memory_decides_on_everything_else(released: Any) -> None:
    def fit(megabytes: int, **given: Any) -> tuple[MachineSettings, EngineSettings]:
        settings = MachineSettings(ram=megabytes * 10**6, **given)
        return within_memory(settings, settings.engine_settings(), ModelSizes.of(released))

    settings, engines = fit(8000)
    assert (settings.residency, settings.kv_type) == ("together", "f16")
    assert engines == untuned()
    seen = []
    for megabytes in range(3000, 1450, -50):
        settings, engines = fit(megabytes)
        seen.append((settings.residency, settings.kv_type, settings.max_tiles))
        assert settings.kv_budget <= megabytes * 10**6
    with pytest.raises(BudgetError, match="too little by"):
        fit(1300)
    assert {"together", "in-turns"} == {residency for residency, _, _ in seen}
    assert {"f16", "q8_0"} <= {kv_type for _, kv_type, _ in seen}
    assert [one[0] for one in seen] == sorted((one[0] for one in seen), reverse=True)
    with pytest.raises(BudgetError):
        fit(1500, residency="together")


def test_short_memory_takes_turns(released: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, expected in ((16e9, "together"), (1e9, "in-turns")):
        memory = types.SimpleNamespace(available=int(free))
        monkeypatch.setattr("psutil.virtual_memory", lambda memory=memory: memory)
        settings, _ = within_memory(MachineSettings(), untuned(), ModelSizes.of(released))
        assert settings.residency == expected


def test_no_picture_has_more_tokens_than_the_largest() -> None:
    for limit in (1, 4, 12):
        processor = limit_tiles(IMAGE_PROCESSOR, limit)
        most = plan_image(*largest_picture(processor), processor, DECODER).image_tokens
        for size in ((2728, 2046), (300, 4000), (4000, 300), (9999, 9999), (640, 480), (100, 9000)):
            assert plan_image(*size, processor, DECODER).image_tokens <= most
    assert most == 2074


def test_ram_reaches_the_engines(run: Run) -> None:
    result = run("ask", PICTURE, "What is the total?", "--ram", "107MB", EDGE_VLM_MODEL="demo")
    assert result.returncode == 0, result.stderr
    assert b"107 MB: " in result.stderr
    assert_one_line(
        run("ask", PICTURE, "?", "--ram", "9MB", EDGE_VLM_MODEL="demo"), 2, "too little by"
    )

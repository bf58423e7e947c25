"""``edge-vlm bench``: what is measured, in child processes, with the demo model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_vlm import EdgeVLMError, MachineSettings
from edge_vlm.bundle.find import embedded_bundle
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.errors import InputError
from edge_vlm.measure.bench import Variant, bench
from edge_vlm.measure.worker import Worker
from edge_vlm.planning.request import plan_image
from tests.conftest import Run, assert_one_line

SIZES = ((640, 480),)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_VLM_CONFIG", str(tmp_path_factory.mktemp("config")))
        q8 = Variant("small", embedded_bundle(), MachineSettings(threads=1, kv_type="q8_0"))
        own = Variant("own", embedded_bundle(), MachineSettings(threads=1, residency="in-turns"))
        return bench([own, q8], SIZES, runs=2, tokens=4)


@pytest.mark.engine
def test_counts_are_the_planners(report: dict[str, Any]) -> None:
    manifest = Bundle.open(embedded_bundle()).manifest
    for result in report["results"].values():
        for entry in result["sizes"]:
            plan = plan_image(*entry["size"], manifest.image_processor, manifest.decoder)
            assert entry["median"]["image_tokens"] == plan.image_tokens
            assert entry["median"]["crops"] == plan.crops


@pytest.mark.engine
def test_every_run_is_measured_for_itself(report: dict[str, Any]) -> None:
    own = report["results"]["own"]["sizes"]
    assert [entry["size"] for entry in own] == list(SIZES)
    for entry in own:
        assert len(entry["runs"]) == 2
        for run in entry["runs"]:
            assert all(value > 0 for value in run.values())
            parts = run["vision_seconds"] + run["prefill_seconds"]
            assert parts <= run["first_token_seconds"] < run["total_seconds"]
            assert run["first_token_seconds"] < run["cold_first_token_seconds"]
            assert 50e6 < run["peak_rss_bytes"] < 1e9
        for name in entry["median"]:
            assert entry["min"][name] <= entry["median"][name] <= entry["max"][name]


@pytest.mark.engine
def test_kv_bytes_in_use_are_llama_cpps(report: dict[str, Any]) -> None:
    decoder = Bundle.open(embedded_bundle()).manifest.decoder
    for name, per_element in (("own", 2.0), ("small", 34 / 32)):
        run = report["results"][name]["sizes"][0]["runs"][0]
        expected = run["kv_positions"] * decoder.kv_bytes_per_token(per_element)
        assert expected <= run["kv_bytes_in_use"] < 1.05 * expected + 4096


@pytest.mark.engine
def test_ratios_are_of_medians(report: dict[str, Any]) -> None:
    own, other = (result["sizes"][0]["median"] for result in report["results"].values())
    ratio = report["ratios"][0]["vision_seconds_per_tile"]
    assert ratio == own["vision_seconds_per_tile"] / other["vision_seconds_per_tile"]


def test_the_command_prints_a_table_and_json(run: Run) -> None:
    arguments = ("bench", "--size", "300x200", "--runs", "1", "--tokens", "3", "--baseline")
    table = run(*arguments, EDGE_VLM_MODEL="demo")
    assert table.returncode == 0, table.stderr
    text = table.stdout.decode()
    for word in ("300x200", "ratio", "prefill, tokens/s", "peak memory, MB", "batch_size 512"):
        assert word in text
    result = run(*arguments, "--json", "--residency", "in-turns", EDGE_VLM_MODEL="demo")
    data = json.loads(result.stdout)
    own, baseline = data["results"].values()
    assert own["settings"]["residency"] == "in-turns"
    assert baseline["settings"]["spinning"]
    assert data["versions"]["llama-cpp-python"]
    assert data["ratios"][0]["size"] == [300, 200]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--size", "300"], "not a size"),
        (["--size", "0x9"], "not a size"),
        (["--recipe", "laptop"], "--synthetic"),
        (["--baseline-model", "demo"], "--baseline"),
        (["--model", "nothing"], "no such model"),
        (["--synthetic", "gpt", "--runs", "1"], "synthetic"),
    ],
)
def test_wrong_use_is_one_line(run: Run, arguments: list[str], word: str) -> None:
    assert_one_line(run("bench", *arguments), 2, word)


@pytest.mark.engine
def test_a_worker_reports_failures_and_death(tmp_path: Path) -> None:
    with Worker() as worker:
        with pytest.raises(EdgeVLMError, match="none"):
            worker.measure("vision", model=str(tmp_path / "none"), engines={}, crops=1)
        worker.process.kill()
        with pytest.raises(EdgeVLMError, match="ended with code"):
            worker.measure("load", model="demo", engines={})


def test_one_token_has_no_rate() -> None:
    with pytest.raises(InputError, match="two"):
        bench([], SIZES, tokens=1)

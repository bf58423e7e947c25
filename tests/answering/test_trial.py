"""A bundle of a stranger is tried in a process of its own; what dies there, dies there alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edge_vlm import EdgeVLM, MachineSettings
from edge_vlm.answering.trial import PARTS, remember, try_once
from edge_vlm.bundle.checksums import verify
from edge_vlm.bundle.find import embedded_bundle
from edge_vlm.bundle.gguf_header import FLOAT32, TEXT, UINT32, Value
from edge_vlm.bundle.manifest import DECODER_NAME, VISION_NAME, Bundle
from edge_vlm.errors import BundleError
from edge_vlm.machine.engine_settings import untuned
from edge_vlm.machine.folders import cache_folder
from tests.bundle.damage import edit, record, set_in
from tests.bundle.gguf_files import Entries, changed
from tests.conftest import Run, assert_one_line
from tests.toy.bundle import write_toy_bundle

STRANGERS = MachineSettings()  # trusts nobody
NEVER = -1e9  # seconds: whoever starts a trial is late at once


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A bundle whose graph onnxruntime runs."""
    return write_toy_bundle(tmp_path / "toy")


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the demo model, as if a stranger had made it."""
    return shutil.copytree(embedded_bundle(), tmp_path / "copy")


def try_vision(folder: Path, seconds: float = 60, settings: MachineSettings = STRANGERS) -> bool:
    bundle = Bundle.open(folder)
    verify(bundle)
    return try_once(bundle, settings, untuned(), (VISION_NAME,), seconds=seconds)


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(BundleError) as caught:
        work()
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.isprintable()
    assert len(message) < 700
    return message


def tried() -> list[Path]:
    folder = cache_folder() / "tried"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def put_before_embeddings(folder: Path, sizes: list[int], n_products: int) -> None:
    """Add what a chain of products of a padded matrix sums up to."""
    path = folder / VISION_NAME
    made = onnx.load(path)
    for node in made.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = {"embeddings": "before"}.get(name, name)
    pads = np.array([0, 0, *(size - 1 for size in sizes)], np.int64)
    for name, values in (("one", np.ones((1, 1), np.float32)), ("pads", pads)):
        made.graph.initializer.append(numpy_helper.from_array(values, name))
    nodes = [helper.make_node("Pad", ["one", "pads"], ["product0"])]
    for index in range(n_products):
        inputs = [f"product{index}", "product0"]
        nodes.append(helper.make_node("MatMul", inputs, [f"product{index + 1}"]))
    nodes.append(helper.make_node("ReduceSum", [f"product{n_products}"], ["sum"], keepdims=0))
    nodes.append(helper.make_node("Add", ["before", "sum"], ["embeddings"]))
    made.graph.node.extend(nodes)
    path.write_bytes(made.SerializeToString())
    record(folder, VISION_NAME)


def test_what_was_tried_is_remembered_by_its_content(toy: Path, tmp_path: Path) -> None:
    assert try_vision(toy)
    (note,) = tried()
    assert note.stat().st_size == 0
    assert try_vision(toy, NEVER)
    elsewhere = shutil.copytree(toy, tmp_path / "elsewhere")
    assert try_vision(elsewhere, NEVER)
    edit(toy, set_in("model", "name", to="another"))
    assert "was not done within" in refusal(lambda: try_vision(toy, NEVER))
    assert tried() == [note]


def test_another_kernel_is_another_trial(toy: Path) -> None:
    assert try_vision(toy)
    quantized = replace(STRANGERS, kv_type="q8_0")
    assert "was not done" in refusal(lambda: try_vision(toy, NEVER, quantized))
    more_threads = replace(STRANGERS, threads=1)
    assert try_vision(toy, NEVER, more_threads)


def test_who_is_trusted_is_not_tried(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MachineSettings.from_environment().trust_bundle  # of all other tests
    assert try_vision(toy, NEVER, MachineSettings.from_environment()) is False
    monkeypatch.delenv("EDGE_VLM_TRUST_BUNDLE")
    assert not MachineSettings.from_environment().trust_bundle
    demo = Bundle.open(embedded_bundle())
    assert try_once(demo, STRANGERS, untuned(), PARTS, seconds=NEVER) is False
    assert try_once(Bundle.open(toy), STRANGERS, untuned(), (), seconds=NEVER) is False
    assert tried() == []


def test_what_this_machine_made_is_not_tried(toy: Path) -> None:
    bundle = Bundle.open(toy)
    remember(bundle, STRANGERS, untuned())
    assert try_once(bundle, STRANGERS, untuned(), PARTS, seconds=NEVER)


def test_without_a_folder_it_is_tried_each_time(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EDGE_VLM_CACHE", str(tmp_path / "file"))
    assert try_vision(toy)
    assert "was not done" in refusal(lambda: try_vision(toy, NEVER))


def test_a_graph_without_an_end(toy: Path) -> None:
    """Allowed operators, and days of work."""
    put_before_embeddings(toy, [4000, 4000], 5000)
    started = time.monotonic()
    message = refusal(lambda: try_vision(toy, 4))
    assert time.monotonic() - started < 30
    assert message.startswith(f"{toy / VISION_NAME}: onnxruntime was tried with it in a process of")
    assert "was not done within 4 seconds" in message
    assert message.endswith("; if you trust its maker, EDGE_VLM_TRUST_BUNDLE=1 loads it untried")
    assert tried() == []


def test_a_graph_that_wants_all_memory(toy: Path) -> None:
    put_before_embeddings(toy, [1 << 21, 1 << 21], 0)
    message = refusal(lambda: try_vision(toy))
    assert "onnxruntime" in message
    assert "not done" not in message
    assert tried() == []


# What llama.cpp ends the process with, although each header agrees with the manifest.


def entry(key: str, kind: int, content: object) -> Callable[[Entries], None]:
    return lambda entries: entries.update({key: Value(kind, False, content)})


KILLERS = {
    "experts": (entry("qwen3.expert_count", UINT32, 2**31), "GGML_ASSERT"),
    "used experts": (entry("qwen3.expert_used_count", UINT32, 5), "GGML_ASSERT"),
    "layers behind": (entry("qwen3.nextn_predict_layers", UINT32, 2**31), "GGML_ASSERT"),
    "no bytes": (entry("tokenizer.ggml.model", TEXT, b"llama"), "ended with code"),
}


@pytest.mark.engine
@pytest.mark.parametrize("name", KILLERS)
def test_a_decoder_that_ends_the_process(demo: Path, name: str) -> None:
    change, words = KILLERS[name]
    path = demo / DECODER_NAME
    path.write_bytes(changed(path.read_bytes(), change))
    record(demo, DECODER_NAME)
    message = refusal(lambda: EdgeVLM.load(demo, settings=STRANGERS))
    assert message.startswith(f"{path}: llama.cpp was tried with it in a process of its own, which")
    assert words in message
    assert tried() == []


@pytest.mark.engine
def test_the_command_ends_with_one_line(demo: Path, run: Run) -> None:
    path = demo / DECODER_NAME
    path.write_bytes(changed(path.read_bytes(), KILLERS["experts"][0]))
    record(demo, DECODER_NAME)
    for command in (("ask", "What?"), ("verify",)):
        result = run(*command, EDGE_VLM_MODEL=str(demo), EDGE_VLM_TRUST_BUNDLE="0")
        assert_one_line(result, 2, str(path), "GGML_ASSERT(hparams.n_expert")
        assert b"/vendor/" not in result.stderr


@pytest.mark.engine
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_good_bundles_are_loaded(bundle: Callable[..., Path], precision: str) -> None:
    decoder = {"fp32": "f32", "int8": "q8_0", "int4": "q4_0"}[precision]
    folder = bundle("tiny-126-tied", vision=precision, decoder=decoder)
    for _ in range(2):
        with EdgeVLM.load(folder, settings=STRANGERS) as vlm:
            assert vlm.ask((), "Hello", max_tokens=1).prompt_tokens > 1
        assert len(tried()) == 1


HOSTILE = """
import sys
from edge_vlm.errors import BundleError
from edge_vlm import EdgeVLM
for folder in sys.argv[1:]:
    try:
        EdgeVLM.load(folder)
    except BundleError as error:
        print(error)
"""
ROWS = {
    **{
        f"{key} {value}": entry(f"qwen3.{key}", UINT32, value)
        for key, values in (
            ("block_count", (0, 2**31 - 1, 2**32 - 1)),
            ("rope.dimension_count", (0, 1, 2**31)),
        )
        for value in values
    },
    **{
        f"epsilon {value}": entry("qwen3.attention.layer_norm_rms_epsilon", FLOAT32, value)
        for value in (float("nan"), -1e30)
    },
    **{
        name: lambda entries, new=new: entries.update(
            {"tokenizer.ggml.tokens": Value(TEXT, True, new(entries))}
        )
        for name, new in {
            "a short list": lambda entries: entries["tokenizer.ggml.tokens"].content[:5],
            "all alike": lambda entries: [b"a"] * len(entries["tokenizer.ggml.tokens"].content),
            "not UTF-8": lambda entries: [
                b"\xff%d" % index for index in range(len(entries["tokenizer.ggml.tokens"].content))
            ],
        }.items()
    },
}


@pytest.mark.engine
def test_what_ended_an_app_before_is_one_line(demo: Path, tmp_path: Path) -> None:
    """Also where the bundle is trusted: the header is compared by each process that loads it."""
    good = (demo / DECODER_NAME).read_bytes()
    folders = [tmp_path / str(index) for index in range(len(ROWS))]
    for folder, change in zip(folders, ROWS.values(), strict=True):
        shutil.copytree(demo, folder)
        (folder / DECODER_NAME).write_bytes(changed(good, change))
        record(folder, DECODER_NAME)
    found = subprocess.run(
        [sys.executable, "-c", HOSTILE, *folders], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    lines = found.stdout.splitlines()
    for name, folder, line in zip(ROWS, folders, lines, strict=True):
        assert line.startswith(f"{folder / DECODER_NAME}: "), name

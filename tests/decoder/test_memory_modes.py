"""KV types, taking turns, and what the engines' settings leave as it is."""

from __future__ import annotations

import ctypes
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_vlm import EdgeVLM, MachineSettings
from edge_vlm.bundle.find import embedded_bundle
from edge_vlm.bundle.manifest import DECODER_NAME
from edge_vlm.bundle.manifest import Bundle as OpenBundle
from edge_vlm.decoder.decoder import LlamaDecoder
from edge_vlm.errors import InputError, VisionError
from edge_vlm.machine.engine_settings import (
    FLASH_ATTENTION,
    KV_TYPES,
    EngineSettings,
    engine_defaults,
    untuned,
)
from tests.toy.bundle import write_toy_bundle

PICTURES = sorted((Path(__file__).parents[2] / "examples").rglob("*.[jp][pn]g"))[:2]
QUESTION = "What is in the picture?"


def settings(**values: Any) -> MachineSettings:
    return MachineSettings(**{"threads": 1, "cache": None, "tile_memory": 0, **values})


@pytest.fixture(scope="module")
def together() -> Iterator[EdgeVLM]:
    with EdgeVLM.load("demo", settings=settings(residency="together")) as vlm:
        yield vlm


@pytest.fixture(scope="module")
def in_turns() -> Iterator[EdgeVLM]:
    with EdgeVLM.load("demo", settings=settings(residency="in-turns")) as vlm:
        yield vlm


@pytest.mark.engine
def test_taking_turns_does_not_change_a_conversation(together: EdgeVLM, in_turns: EdgeVLM) -> None:
    answers = []
    for vlm in (together, in_turns):
        with vlm.chat(max_tokens=6) as chat:
            said = [chat.ask(PICTURES[0], QUESTION), chat.ask(PICTURES[1], "And now?")]
            said.append(chat.ask("What was in the first one?"))
            answers.append([(a.token_ids, a.prompt_tokens, a.cached_tokens) for a in said])
    assert answers[0] == answers[1]
    assert answers[0][2][2] > 0


@pytest.mark.engine
def test_only_one_of_the_two_is_in_memory(in_turns: EdgeVLM) -> None:
    engine = in_turns.engine
    seen: list[tuple[str, bool, bool]] = []

    def look(progress: Any) -> None:
        loaded = engine.vision.is_loaded, engine.decoder.is_loaded
        seen.append((progress.stage, *loaded))

    in_turns.ask(PICTURES[0], QUESTION, max_tokens=2, progress=look)
    assert all(not (vision and decoder) for _, vision, decoder in seen)
    assert ("vision", True, False) in seen
    assert ("decode", False, True) in seen


@pytest.mark.engine
def test_a_working_decoder_is_not_released(in_turns: EdgeVLM) -> None:
    whole = in_turns.ask(PICTURES[1], QUESTION, max_tokens=8)
    with in_turns.stream(PICTURES[1], QUESTION, max_tokens=8) as stream:
        pieces = [next(stream)]
        other = threading.Thread(
            target=in_turns.ask, args=(PICTURES[0], QUESTION), kwargs={"max_tokens": 1}
        )
        other.start()
        other.join()
        pieces += stream
    assert stream.answer.token_ids == whole.token_ids
    assert "".join(pieces).strip() == whole.answer


@pytest.mark.engine
def test_kv_types_take_the_memory_they_say() -> None:
    """Measured on what llama.cpp hands out, which is K, V and a header."""
    opened = OpenBundle.open(embedded_bundle())
    sizes = {}
    for kv_type, per_element in KV_TYPES.items():
        decoder = LlamaDecoder(opened, kv_type=kv_type)
        with decoder.context(512) as context:
            context.append_tokens([5] * 500)
            sizes[kv_type] = context.state().nbytes
            expected = 500 * opened.manifest.decoder.kv_bytes_per_token(per_element)
            assert expected <= sizes[kv_type] <= 1.02 * expected + 8192
        decoder.close()
    assert sizes["q4_0"] < 0.6 * sizes["q8_0"] < 0.4 * sizes["f16"]


@pytest.mark.engine
@pytest.mark.parametrize("flash_attention", FLASH_ATTENTION)
def test_the_first_positions_can_be_copied(flash_attention: str) -> None:
    opened = OpenBundle.open(embedded_bundle())
    engines = replace(untuned(), threads=1, prefill_threads=1, flash_attention=flash_attention)
    decoder = LlamaDecoder(opened, engines)
    with decoder.context(800) as context, decoder.context(800) as other:
        context.append_tokens([5 + i % 90 for i in range(600)])
        context.settle()
        whole = context.state()
        context.append_tokens(range(5, 25), logits=True)
        before = context.logits()
        assert other.set_state(context.state(600))
        assert np.array_equal(context.logits(), before)
        assert (context.n_positions, other.n_positions) == (620, 600)
        other.append_tokens(range(5, 25), logits=True)
        assert np.array_equal(other.logits(), before)
        for made in (context, other):  # cells that were copied can be forgotten like any other
            made.truncate(600)
            assert made.state().nbytes == whole.nbytes
            made.append_tokens(range(5, 25), logits=True)
            assert np.array_equal(made.logits(), before)
    decoder.close()


def test_what_a_smaller_kv_cache_costs(bundle: Callable[..., Path]) -> None:
    opened = OpenBundle.open(bundle("tiny-126-tied"))  # with weights in f32
    n_ids = opened.manifest.decoder.vocab_size
    engines = replace(untuned(), threads=1, prefill_threads=1)

    def logits(kv_type: str) -> Any:
        decoder = LlamaDecoder(opened, engines, kv_type=kv_type)
        with decoder.context(512) as context:
            context.append_tokens([(7 + 13 * i) % n_ids for i in range(500)], logits=True)
            return context.logits()[:n_ids]

    exact = logits("f32")
    error = {
        kv_type: np.abs(logits(kv_type) - exact).max() / np.ptp(exact)
        for kv_type in ("f16", "q8_0", "q4_0")
    }
    assert error["f16"] < 0.001
    assert error["f16"] < error["q8_0"] < 0.01
    assert error["q8_0"] < error["q4_0"] < 0.2


@pytest.mark.engine
@pytest.mark.parametrize(
    "change",
    [
        {"threads": 2},
        {"batch_size": 17},
        {"flash_attention": "on"},
        {"flash_attention": "off"},
        {"vision_threads": 2, "vision_streams": 2},
        {"repack": True},
        {"mmap": False},
        {"spinning": True},
        {"tiles_per_call": 3},
    ],
    ids=lambda change: "-".join(f"{name}-{value}" for name, value in change.items()),
)
def test_engine_settings_do_not_change_an_answer(together: EdgeVLM, change: dict[str, Any]) -> None:
    expected = together.ask(PICTURES[0], QUESTION, max_tokens=8)
    with EdgeVLM.load("demo", settings=settings(**change)) as vlm:
        assert vlm.ask(PICTURES[0], QUESTION, max_tokens=8).token_ids == expected.token_ids


def test_given_beats_tuned_beats_default() -> None:
    tuned = EngineSettings(**{**vars(untuned()), "batch_size": 64, "vision_threads": 3})
    assert MachineSettings().engine_settings() == untuned()
    assert MachineSettings().engine_settings(tuned) == tuned
    given = MachineSettings(threads=5, vision_threads=2).engine_settings(tuned)
    assert (given.threads, given.prefill_threads, given.vision_threads) == (5, 5, 2)
    assert given.batch_size == 64
    assert engine_defaults().spinning


def test_interleaved_weights_are_in_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read where what is mapped cannot be let go of, as it would be a second copy."""
    for machine, repack in (("aarch64", True), ("x86_64", False)):
        for can_forget in (True, False):
            monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
            monkeypatch.setattr(sys, "platform", "linux" if can_forget else "darwin")
            assert (untuned().repack, untuned().mmap) == (repack, can_forget or not repack)
            other = MachineSettings(repack=not repack).engine_settings()
            assert (other.repack, other.mmap) == (not repack, can_forget or repack)
            assert MachineSettings(repack=True, mmap=True).engine_settings().mmap
            tuned = replace(untuned(), mmap=repack)
            assert MachineSettings(repack=repack).engine_settings(tuned) == tuned
            for_linux = untuned(arm=machine == "aarch64")
            assert for_linux == replace(untuned(), mmap=True)


def test_weights_without_plain_kernels_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert MachineSettings().engine_settings(precision="q4_0").repack
    assert not MachineSettings().engine_settings(precision="q4_k_m").repack
    assert not MachineSettings(repack=False).engine_settings(precision="q4_0").repack
    assert not MachineSettings().engine_settings(untuned("q4_k_m"), precision="q4_0").repack


def test_engine_settings_from_the_environment() -> None:
    names = {
        "EDGE_VLM_BATCH_SIZE": "64",
        "EDGE_VLM_REPACK": "0",
        "EDGE_VLM_FLASH_ATTENTION": "on",
        "EDGE_VLM_KV_TYPE": "q8_0",
        "EDGE_VLM_RESIDENCY": "in-turns",
    }
    found = MachineSettings.from_environment(names)
    assert (found.batch_size, found.repack, found.flash_attention) == (64, False, "on")
    assert (found.kv_type, found.residency) == ("q8_0", "in-turns")
    with pytest.raises(InputError, match="residency"):
        MachineSettings.from_environment({"EDGE_VLM_RESIDENCY": "never"})


@pytest.mark.parametrize("bad", [{"repack": 1}, {"flash_attention": "x"}, {"tiles_per_call": 0}])
def test_engine_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        MachineSettings(**bad)


def test_crops_of_one_call_are_those_of_many(bundle: Callable[..., Path]) -> None:
    from edge_vlm.families.jina_vlm.tiling import cut_tiles
    from edge_vlm.pictures.tower import OnnxTower

    opened = OpenBundle.open(bundle("tiny-126-tied"))
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    tiles = cut_tiles(pixels, opened.manifest.image_processor)
    assert len(tiles.crops) > 4
    engines = [EngineSettings(**{**vars(untuned()), "tiles_per_call": n}) for n in (1, 4)]
    found = [OnnxTower(opened, one).encode(tiles) for one in engines]
    np.testing.assert_allclose(found[0], found[1], atol=2e-4)


@pytest.mark.parametrize("wanted", [[], [2], [0, 3], [0, 1, 2, 3, 4]])
def test_streams_encode_the_same(bundle: Callable[..., Path], wanted: list[int]) -> None:
    from edge_vlm.pictures.tower import OnnxTower

    opened = OpenBundle.open(bundle("tiny-126-tied"))
    processor = opened.manifest.image_processor
    shape = (5, processor.n_patches, processor.patch_values)
    crops = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    last = np.array([False] * 4 + [True])
    found = []
    for streams in (1, 2, 3):
        engines = replace(untuned(), vision_threads=streams, vision_streams=streams)
        tower = OnnxTower(opened, engines)
        rows = {
            part[0]: row
            for part, (row,) in tower.encode_parts({"crops": crops, "is_last": last}, wanted)
        }
        assert sorted(rows) == wanted
        tower.rest()
        assert bool(tower.load_seconds) == bool(wanted)  # nothing is loaded for nothing
        found.append(np.array([rows[index] for index in wanted]))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_streams_stop_with_the_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_vlm.pictures.tower import OnnxTower

    opened = OpenBundle.open(write_toy_bundle(tmp_path / "toy"))
    tower = OnnxTower(opened, replace(untuned(), vision_threads=2, vision_streams=2))
    calls = []

    def fail(_session: Any, _outputs: Any, feed: Any, _options: Any) -> Any:
        calls.append(len(feed["crops"]))
        raise RuntimeError("no memory")

    monkeypatch.setattr("onnxruntime.InferenceSession.run", fail)
    crops = np.zeros((9, 1, 1), np.float32)
    with pytest.raises(VisionError):
        list(tower.encode_parts({"crops": crops, "is_last": np.zeros(9, bool)}))
    assert 0 < len(calls) <= 4


def test_no_more_streams_than_threads() -> None:
    assert replace(untuned(), vision_threads=1, vision_streams=2).streams == 1
    assert replace(untuned(), vision_threads=4, vision_streams=2).streams == 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing happens")
def test_a_mapped_file_leaves_memory_until_it_is_read(tmp_path: Path) -> None:
    import mmap

    from edge_vlm.machine.memory import forget_mapped

    path = tmp_path / "a file"
    path.write_bytes(bytes(range(256)) * 4096 * 16)

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssFile:")[1].split()[0]) * 1024

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        before = resident()
        forget_mapped(path)
        assert before - resident() > 0.9 * len(mapped)
        assert mapped[255] == 255
        forget_mapped(tmp_path / "another file")


def test_embeddings_do_not_keep_the_memory_of_onnxruntime(bundle: Callable[..., Path]) -> None:
    from edge_vlm.pictures.tower import OnnxTower

    opened = OpenBundle.open(bundle("tiny-126-tied"))
    settings = opened.manifest.image_processor
    crops = np.zeros((1, settings.n_patches, settings.patch_values), np.float32)
    assert (
        OnnxTower(opened).encode_crops({"crops": crops, "is_last": np.zeros(1, bool)}).flags.owndata
    )


def while_loading(
    patch: pytest.MonkeyPatch, before: Callable[[float], None], after: Callable[[float], None]
) -> None:
    """Call these around what is done whenever llama.cpp tells how much it has loaded."""
    from llama_cpp import llama_cpp as api

    real = api.llama_progress_callback

    def made(callback: Callable[[float, Any], bool]) -> Any:
        def with_both(done: float, user_data: Any) -> bool:
            before(done)
            goes_on = callback(done, user_data)
            after(done)
            return goes_on

        return real(with_both)

    patch.setattr(api, "llama_progress_callback", made)


def mapping(path: Path) -> tuple[int, int] | None:
    """Address and resident bytes of a file that is mapped into this process."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    for number, line in enumerate(lines):
        if line.endswith(f" {path}"):
            size = next(line for line in lines[number:] if line.startswith("Rss:"))
            return int(line.split("-")[0], 16), int(size.split()[1]) * 1024
    return None


@pytest.mark.engine
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing happens")
def test_a_mapped_file_is_let_go_of_while_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again, also what was read of it meanwhile."""
    folder = tmp_path / "bundle"  # a file that no other model of this process has mapped
    opened = OpenBundle.open(shutil.copytree(embedded_bundle(), folder))
    path = opened.file(DECODER_NAME).resolve()
    had: list[int] = []
    left: list[int] = []

    def read_some(_done: float) -> None:
        if found := mapping(path):
            ctypes.string_at(found[0], 1)
            had.append((mapping(path) or found)[1])

    def look(_done: float) -> None:
        if found := mapping(path):
            left.append(found[1])

    while_loading(monkeypatch, read_some, look)
    LlamaDecoder(opened, replace(untuned(), repack=True)).close()
    assert had[0] > 0.9 * path.stat().st_size
    assert min(had) > 0
    assert left.count(0) > 1
    assert left[-1] == 0
    had.clear()
    LlamaDecoder(opened, replace(untuned(), mmap=False)).close()
    assert not had  # it was never mapped


@pytest.mark.engine
@pytest.mark.skipif(sys.platform == "win32", reason="signals of threads")
def test_loading_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_done: float) -> None:
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.2)

    main = threading.main_thread().ident
    assert main
    while_loading(monkeypatch, interrupt, lambda _: None)
    opened = OpenBundle.open(embedded_bundle())
    # Jobs in the background of a shell ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            LlamaDecoder(opened, untuned())
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    LlamaDecoder(opened, untuned()).close()

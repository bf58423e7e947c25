"""What of a toy model is in memory when, and what is kept between processes."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edge_vlm import Answer, Cancelled, CancelToken, EdgeVLM, MachineSettings, Progress
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.machine.settings import cpu_identity
from edge_vlm.machine.store import Entry, Store, make_key
from edge_vlm.pictures.picture import TileCache
from edge_vlm.prompt.builder import PrefixCache
from tests.answering.test_turns import picture
from tests.fake_engine import FakeEngine

RECEIPT = Path(__file__).parents[2] / "examples" / "images" / "receipt-1.png"
OLD_CACHE = Path(__file__).parents[1] / "toy" / "old_cache"


def vision_calls(fake: FakeEngine) -> list[str]:
    """What was asked of the tower, and when the decoder had to go for it; crops as one."""
    found: list[str] = []
    for call in fake.journal.calls:
        if (call.startswith("vision.") or call == "decoder.release") and call not in found[-1:]:
            found.append(call)
    return found


def test_taking_turns(fake: FakeEngine) -> None:
    """The decoder goes before the tower comes, and the tower before the decoder is asked."""
    loaded: list[tuple[str, bool, bool]] = []

    def look(progress: Progress) -> None:
        loaded.append((progress.stage, fake.vision.is_loaded, fake.decoder.is_loaded))

    with fake.load(residency="in-turns") as model, model.chat(max_tokens=4) as chat:
        chat.ask("Hello")
        assert fake.decoder.is_loaded
        chat.ask(picture(), "What?", progress=look)
        assert vision_calls(fake) == [
            *("vision.release", "decoder.release", "vision.load", "vision.encode"),
            "vision.release",
        ]
    assert all(not (vision and decoder) for _, vision, decoder in loaded)
    assert ("vision", True, False) in loaded
    assert ("decode", False, True) in loaded


def test_staying_together(fake: FakeEngine) -> None:
    with fake.load(residency="together") as model:
        model.ask(picture(), "What?", max_tokens=1)
        assert fake.vision.is_loaded
        assert fake.journal.calls.index("vision.rest") < fake.journal.calls.index(
            "context.append_tokens"
        )
        assert "vision.release" not in fake.journal.calls


@pytest.mark.parametrize("residency", ["together", "in-turns"])
def test_the_tower_is_not_loaded_for_what_is_known(
    fake: FakeEngine, residency: str, tmp_path: Path
) -> None:
    for n_loaded in (1, 0):
        fake.journal.calls.clear()
        with fake.load(residency=residency, cache=tmp_path) as model:
            model.ask(picture(), "What?", max_tokens=1)
            model.ask((), "Hello", max_tokens=1)
        assert fake.journal.n("vision.load") == n_loaded


@pytest.mark.parametrize("residency", ["together", "in-turns"])
def test_encoding_alone(fake: FakeEngine, residency: str) -> None:
    with fake.load(residency=residency) as model:
        model.encode(picture())
        assert fake.vision.is_loaded is (residency == "together")
        cancel = CancelToken()
        cancel.set()
        with pytest.raises(Cancelled):
            model.encode(picture(2), cancel=cancel)
        assert fake.vision.is_loaded is (residency == "together")


def test_a_working_decoder_stays(fake: FakeEngine) -> None:
    """Another question's picture needs the tower in the middle of an answer."""
    fake.enqueue("one two", "three")
    with fake.load(residency="in-turns") as model:
        stream = model.stream(picture(1), "What?")
        pieces = [next(stream)]
        other = threading.Thread(target=model.ask, args=(picture(2), "And?"))
        other.start()
        other.join()
        assert fake.decoder.is_loaded
        assert fake.journal.n("decoder.release") == 2
        assert "".join([*pieces, *stream]) == "one two"
        fake.decoder.release()
        assert not fake.decoder.is_loaded


def test_an_answer_says_what_it_loaded(fake: FakeEngine) -> None:
    with fake.load() as model:
        before = model.ask((), "Hello", max_tokens=1).timings.load
        fake.vision.load_seconds += 2.5
        fake.decoder.load_seconds += 1.5
        assert model.ask((), "Hello", max_tokens=1).timings.load == pytest.approx(before + 4)


# Between processes


def entries(cache: Path, kind: str) -> list[Path]:
    return sorted((cache / "pictures" / "entries").glob(f"*.{kind}"))


def same(first: Answer, second: Answer) -> bool:
    return (first.token_ids, first.finish_reason) == (second.token_ids, second.finish_reason)


def test_a_second_process_restores_the_picture(fake: FakeEngine, tmp_path: Path) -> None:
    def ask(question: str, **settings: Any) -> Answer:
        with fake.load(**settings) as model:
            return model.ask(picture(), question, max_tokens=12)

    first = ask("What?", cache=tmp_path)
    assert (first.restored_tokens, first.encoded_crops) == (0, 7)
    assert len(entries(tmp_path, "tile")) == 8  # with the markers
    assert len(entries(tmp_path, "prefix")) == 1
    second = ask("And?", cache=tmp_path)
    assert second.restored_tokens == second.cached_tokens == 52
    assert (second.encoded_crops, second.cached_crops) == (0, 0)
    assert same(first, ask("What?"))
    assert same(second, ask("And?"))


def test_only_a_conversations_first_prefix_is_kept(fake: FakeEngine, tmp_path: Path) -> None:
    with fake.load(cache=tmp_path) as model, model.chat(max_tokens=2) as chat:
        chat.ask(picture(1), "What?")
        chat.ask(picture(2), "And?")
    assert len(entries(tmp_path, "prefix")) == 1


def test_the_longest_prefix_of_several_pictures(fake: FakeEngine, tmp_path: Path) -> None:
    one, two = picture(1), picture(2)
    with fake.load(cache=tmp_path) as model:
        model.ask(one, "What?", max_tokens=1)
        both = model.ask([one, two], "Compare.", max_tokens=8)
        assert (both.restored_tokens, both.encoded_crops) == (52, 7)
        again = model.ask([one, two], "And?", max_tokens=8)
        assert again.restored_tokens == 52 + 1 + 44  # and the space between them
        assert model.ask([two, one], "Compare.", max_tokens=8).restored_tokens == 0
    with fake.load() as model:
        assert same(both, model.ask([one, two], "Compare.", max_tokens=8))
        assert same(again, model.ask([one, two], "And?", max_tokens=8))


def test_nobody_waits_for_the_disk_before_the_first_piece(fake: FakeEngine, tmp_path: Path) -> None:
    fake.enqueue("one two")
    with fake.load(cache=tmp_path) as model:
        with model.stream(picture(), "What?") as stream:
            next(stream)
            assert fake.journal.n("context.state") == 0
            next(stream)
            assert fake.journal.n("context.state") == 1
            list(stream)
        assert fake.journal.n("context.state") == 1
        fake.enqueue("one two")
        with model.stream(picture(2), "What?") as stream:
            next(stream)  # and no more
        assert len(entries(tmp_path, "prefix")) == 2


def test_a_state_that_does_not_fit_is_dropped(fake: FakeEngine, tmp_path: Path) -> None:
    with fake.load(cache=tmp_path) as model:
        first = model.ask(picture(), "What?", max_tokens=8)
        (path,) = entries(tmp_path, "prefix")
        path.write_bytes(path.read_bytes()[:-1])
        again = model.ask(picture(), "What?", max_tokens=8)
        assert (again.restored_tokens, again.encoded_crops, again.cached_crops) == (0, 0, 7)
        assert same(first, again)
        assert model.ask(picture(), "What?", max_tokens=8).restored_tokens == 52


@pytest.mark.parametrize("size", [0, 7, 8, 4096])
def test_states_and_tiles_of_another_size_are_dropped(
    fake: FakeEngine, tmp_path: Path, size: int
) -> None:
    """Their checksums are right: somebody else has written them."""
    with fake.load(cache=tmp_path) as model:
        first = model.ask(picture(), "What?", max_tokens=8)
    forge(tmp_path, np.full(size, ord("x"), np.uint8))
    with fake.load(cache=tmp_path) as model:
        again = model.ask(picture(), "What?", max_tokens=8)
        assert (again.restored_tokens, again.encoded_crops) == (0, 7)
        assert same(first, again)
    with fake.load(cache=tmp_path) as model:
        assert model.ask(picture(), "What?", max_tokens=8).restored_tokens == 52


def forge(cache: Path, payload: npt.NDArray[np.uint8]) -> None:
    """Other content for all entries, under their keys."""
    store = Store(cache / "pictures", 1 << 30)
    for path in [*entries(cache, "tile"), *entries(cache, "prefix")]:
        path.unlink()
        store.write_soon([Entry(path.suffix[1:], bytes.fromhex(path.stem), payload)])
    store.flush()


@pytest.mark.engine
@pytest.mark.parametrize("size", [0, 7, 16, 4096])
def test_llama_cpp_takes_no_state_of_another_size(tmp_path: Path, size: int) -> None:
    settings = MachineSettings(cache=tmp_path, threads=1)
    for seed in range(3):  # at first there is none
        forge(tmp_path, np.random.default_rng(seed).integers(0, 256, size, np.uint8))
        with EdgeVLM.load("demo", settings=settings) as model:
            answer = model.ask(RECEIPT, "What is the total?")
        assert (str(answer), answer.restored_tokens, answer.cached_crops) == ("43.98", 0, 0)


def test_other_engines_find_nothing(fake: FakeEngine, tmp_path: Path) -> None:
    with fake.load(cache=tmp_path) as model:
        model.ask(picture(), "What?", max_tokens=1)
    other = FakeEngine(tmp_path / "other", kv_type="f32")
    with other.load(cache=tmp_path) as model:
        answer = model.ask(picture(), "What?", max_tokens=1)
        assert (answer.restored_tokens, answer.cached_crops) == (0, 7)  # crops are the tower's


def test_a_disk_that_refuses_costs_a_line(
    fake: FakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with fake.load(cache=tmp_path / "file") as model:
        for _ in range(2):
            assert model.ask(picture(), "What?", max_tokens=1).restored_tokens == 0
    assert caplog.text.count("pictures are not cached") == 1


def test_a_cache_that_was_made_before_still_works(fake: FakeEngine, tmp_path: Path) -> None:
    """Written by release 0.1 for this picture and these engines, on a processor named "toy"."""
    shutil.copytree(OLD_CACHE, tmp_path / "cache")
    height, width = 40, 52
    pixels = (np.arange(height * width * 3) * 37 % 251).astype(np.uint8)
    pixels = pixels.reshape(height, width, 3)
    here = fake.load(cache=tmp_path / "cache").engine
    assert here.store
    assert here.tiles.model == make_key({**fake.vision.identity, "cpu": cpu_identity()})
    identity = {**fake.vision.identity, "cpu": ["toy", ""]}
    there = dataclasses.replace(
        here,
        tiles=TileCache(fake.vision, identity, 0, here.store),
        prefixes=PrefixCache(here.store, {**identity, **fake.decoder.identity}),
    )

    def ask() -> Answer:
        fake.enqueue("Stripes.")
        return EdgeVLM(Bundle.open(fake.bundle), there).ask(pixels, "What is it?")

    assert ask().restored_tokens == 52
    for path in entries(tmp_path / "cache", "prefix"):
        path.unlink()
    answer = ask()
    assert (answer.restored_tokens, answer.encoded_crops, answer.cached_crops) == (0, 0, 7)
    assert not fake.journal.n("vision.load")

"""Caches change how long an answer takes, and nothing else."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_vlm import (
    Answer,
    BundleError,
    Cancelled,
    CancelToken,
    EdgeVLM,
    ImageError,
    MachineSettings,
)
from edge_vlm.bundle.find import embedded_bundle
from edge_vlm.families.jina_vlm.tiling import cut_tiles
from edge_vlm.planning.budget import limit_tiles
from tests.conftest import GoldenModel

MODEL = "tiny-126-tied"
N_PAIRS = int(os.environ.get("EDGE_VLM_TEST_PAIRS", "12"))  # a fixture clears the variables
EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "images").glob("*.png"))
Pixels = npt.NDArray[np.uint8]
Run = Callable[..., subprocess.CompletedProcess[bytes]]


def settings(cache: Path | None, **values: Any) -> MachineSettings:
    return MachineSettings(threads=1, cache=cache, **values)


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def same(first: Answer, second: Answer) -> bool:
    """What was answered, apart from counters and timings."""
    return (first.token_ids, first.answer, first.finish_reason) == (
        second.token_ids,
        second.answer,
        second.finish_reason,
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def plain(bundle: Callable[..., Path]) -> Iterator[EdgeVLM]:
    """A model that keeps nothing."""
    with EdgeVLM.load(bundle(MODEL), settings=settings(None, tile_memory=0)) as vlm:
        yield vlm


@pytest.fixture
def chart(golden: dict[str, GoldenModel]) -> Path:
    return golden[MODEL].cases["image_chart"].images[0]


@pytest.fixture
def icon(golden: dict[str, GoldenModel]) -> Path:
    return golden[MODEL].cases["image_icon_rgba"].images[0]


def entries(cache: Path, kind: str) -> list[Path]:
    return sorted((cache / "pictures" / "entries").glob(f"*.{kind}"))


def test_the_second_question_restores_the_picture(
    bundle: Callable[..., Path], cache: Path, chart: Path, plain: EdgeVLM
) -> None:
    with EdgeVLM.load(bundle(MODEL), settings=settings(cache)) as vlm:
        first = vlm.ask(chart, "What is shown?", max_tokens=8)
        assert (first.restored_tokens, first.encoded_crops, first.cached_crops) == (0, 7, 0)
    with EdgeVLM.load(bundle(MODEL), settings=settings(cache)) as vlm:
        second = vlm.ask(chart, "Which bar is the highest?", max_tokens=8)
        assert second.restored_tokens == second.cached_tokens >= second.image_tokens
        assert (second.encoded_crops, second.cached_crops) == (0, 0)
        assert vlm.engine is not None
        assert vlm.engine.vision.load_seconds == 0  # it was not needed
        with Image.open(chart) as image:  # the same pixels in another form
            third = vlm.ask(image.convert("RGB"), "What is shown?", max_tokens=8)
        assert third.restored_tokens == second.restored_tokens
    assert same(first, plain.ask(chart, "What is shown?", max_tokens=8))
    assert same(second, plain.ask(chart, "Which bar is the highest?", max_tokens=8))
    assert same(third, first)


def test_what_the_prefix_depends_on(
    bundle: Callable[..., Path], cache: Path, chart: Path, icon: Path
) -> None:
    def restored(vlm: EdgeVLM, *arguments: Any, **options: Any) -> int:
        return vlm.ask(*arguments, max_tokens=1, **options).restored_tokens

    with EdgeVLM.load(bundle(MODEL), settings=settings(cache)) as vlm:
        assert not restored(vlm, chart, "A?")
        assert not restored(vlm, chart, "A?", max_tiles=2)
        assert not restored(vlm, chart, "A?", system="Be brief.")
        assert not restored(vlm, icon, "A?")
        assert restored(vlm, chart, "B?")
        assert restored(vlm, chart, "B?", max_tiles=2)
        assert restored(vlm, chart, "B?", system="Be brief.")
        assert not restored(vlm, chart, "B?", system="Be very brief.")
        assert not restored(vlm, chart, "A?", max_tiles=1)
    for other in ({"kv_type": "f32"}, {"kv_type": "q8_0"}, {"batch_size": 64}):
        with EdgeVLM.load(bundle(MODEL), settings=settings(cache, **other)) as vlm:
            assert not restored(vlm, chart, "A?")
            assert restored(vlm, chart, "B?")


def test_the_longest_prefix_of_several_pictures(
    bundle: Callable[..., Path], cache: Path, chart: Path, icon: Path, plain: EdgeVLM
) -> None:
    with EdgeVLM.load(bundle(MODEL), settings=settings(cache)) as vlm:
        one = vlm.ask(chart, "What?", max_tokens=8)
        both = vlm.ask([chart, icon], "Compare.", max_tokens=8)
        assert 0 < both.restored_tokens < both.image_tokens
        assert (both.encoded_crops, both.cached_crops) == (2, 0)
        again = vlm.ask([chart, icon], "And now?", max_tokens=8)
        assert again.restored_tokens > both.restored_tokens
        swapped = vlm.ask([icon, chart], "Compare.", max_tokens=8)
        assert swapped.restored_tokens == 0
        assert (swapped.encoded_crops, swapped.cached_crops) == (0, 9)
    assert same(both, plain.ask([chart, icon], "Compare.", max_tokens=8))
    assert same(again, plain.ask([chart, icon], "And now?", max_tokens=8))
    assert same(swapped, plain.ask([icon, chart], "Compare.", max_tokens=8))
    assert not same(one, both)


def test_a_chat_begins_with_what_is_kept(
    bundle: Callable[..., Path], cache: Path, chart: Path, icon: Path, plain: EdgeVLM
) -> None:
    def talk(vlm: EdgeVLM) -> list[Answer]:
        with vlm.chat(max_tokens=8) as chat:
            return [chat.ask(chart, "What?"), chat.ask("More."), chat.ask(icon, "And this?")]

    with EdgeVLM.load(bundle(MODEL), settings=settings(cache)) as vlm:
        first, second = talk(vlm), talk(vlm)
    assert len(entries(cache, "prefix")) == 1  # of the first turn alone
    assert first[0].restored_tokens == 0
    assert second[0].restored_tokens > first[0].image_tokens
    assert [answer.restored_tokens for answer in second[1:]] == [0, 0]
    for a, b, c in zip(first, second, talk(plain), strict=True):
        assert same(a, b)
        assert same(a, c)


def test_an_interrupted_answer_still_keeps_the_picture(
    bundle: Callable[..., Path], cache: Path, chart: Path
) -> None:
    with EdgeVLM.load(bundle(MODEL), settings=settings(cache)) as vlm:
        for stage, n_tiles in (("vision", 3), ("decode", 7)):
            cancel = CancelToken()

            def stop(progress: Any, stage: str = stage, cancel: CancelToken = cancel) -> None:
                if progress.stage == stage and progress.done == 3:
                    cancel.set()

            with pytest.raises(Cancelled):
                vlm.ask(chart, "What?", max_tokens=8, progress=stop, cancel=cancel)
            sizes = [path.stat().st_size for path in entries(cache, "tile")]
            assert sum(size == max(sizes) for size in sizes) == n_tiles  # the rest are markers
        assert vlm.ask(chart, "What?", max_tokens=1).restored_tokens


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_an_answer_stopped_early_keeps_the_picture(
    bundle: Callable[..., Path], cache: Path, chart: Path, stage: str
) -> None:
    """Behind the picture, or before the first token."""
    with EdgeVLM.load(bundle(MODEL), settings=settings(cache)) as vlm:
        cancel = CancelToken()

        def stop(progress: Any) -> None:
            last = progress.total if stage == "prefill" else 1
            if progress.stage == stage and progress.done == last:
                cancel.set()

        with pytest.raises(Cancelled):
            vlm.ask(chart, "What?", max_tokens=8, progress=stop, cancel=cancel)
        assert len(entries(cache, "prefix")) == 1
        assert vlm.ask(chart, "What?", max_tokens=1).restored_tokens


def test_a_picture_is_kept_while_the_first_piece_is_read(
    bundle: Callable[..., Path], cache: Path, chart: Path, plain: EdgeVLM
) -> None:
    whole = plain.ask(chart, "What?", max_tokens=8, temperature=0)
    with EdgeVLM.load(bundle(MODEL), settings=settings(cache)) as vlm:
        with vlm.stream(chart, "What?", max_tokens=8, temperature=0) as stream:
            pieces = [next(stream)]
            assert not entries(cache, "prefix")  # the first piece did not wait for it
            pieces += stream
        assert stream.answer.token_ids == whole.token_ids
        assert len(entries(cache, "prefix")) == 1
        with vlm.stream(chart, "And?", max_tokens=8) as stream:
            next(stream)
        with vlm.stream(chart, "Now?", max_tokens=8, choices=["a", "b"]) as stream:
            assert next(stream)
    for path in entries(cache, "prefix"):
        path.unlink()
    with EdgeVLM.load(bundle(MODEL), settings=settings(cache)) as vlm:
        with vlm.stream(chart, "What?", max_tokens=8) as stream:
            next(stream)  # and no more
        assert len(entries(cache, "prefix")) == 1


def test_a_tile_is_encoded_once_wherever_it_is(
    bundle: Callable[..., Path], cache: Path, plain: EdgeVLM
) -> None:
    """The crops that change are those that the tiling says, in memory as on disk."""
    processor = plain.manifest.image_processor
    assert plain._engine is not None
    model_inputs = limit_tiles(processor, None)
    picture = noise(300, 400)
    before = cut_tiles(picture, model_inputs)
    changed_picture = picture.copy()
    changed_picture[40:44, 60:64] = 255 - changed_picture[40:44, 60:64]
    after = cut_tiles(changed_picture, model_inputs)
    n_changed = int((before.crops != after.crops).any(axis=(1, 2)).sum())
    assert 2 <= n_changed < len(before.crops) - 2
    for memory in (0, 1 << 30):
        folder = cache / str(memory)
        with EdgeVLM.load(bundle(MODEL), settings=settings(folder, tile_memory=memory)) as vlm:
            assert vlm.ask(picture, "What?", max_tokens=8).cached_crops == 0
            answer = vlm.ask(changed_picture, "What?", max_tokens=8)
        assert answer.encoded_crops == n_changed
        assert answer.cached_crops == len(before.crops) - n_changed
        assert same(answer, plain.ask(changed_picture, "What?", max_tokens=8))


def test_the_last_tile_is_not_taken_for_another(
    plain: EdgeVLM, bundle: Callable[..., Path]
) -> None:
    """All crops of a grey picture are the same, but the last one gets a padding vector."""
    grey = np.full((240, 320, 3), 128, np.uint8)
    with EdgeVLM.load(bundle(MODEL), settings=settings(None)) as vlm:
        engine = vlm.engine
        tiles = cut_tiles(grey, vlm.manifest.image_processor)
        found, n_known = engine.tiles.encode(tiles)
        exact = engine.vision.encode(tiles)
    assert n_known == len(tiles.crops) - 2
    assert not np.allclose(exact[-1], exact[0])
    assert np.array_equal(found, exact)


def test_memory_alone_keeps_tiles_too(
    bundle: Callable[..., Path], chart: Path, plain: EdgeVLM
) -> None:
    with EdgeVLM.load(bundle(MODEL), settings=settings(None)) as vlm:
        vlm.ask(chart, "What?", max_tokens=1)
        answer = vlm.ask(chart, "What is shown?", max_tokens=8)
    assert (answer.encoded_crops, answer.cached_crops, answer.restored_tokens) == (0, 7, 0)
    assert same(answer, plain.ask(chart, "What is shown?", max_tokens=8))
    for _ in range(2):
        assert plain.ask(chart, "What?", max_tokens=1).encoded_crops == 7


def test_memory_is_bounded(bundle: Callable[..., Path]) -> None:
    with EdgeVLM.load(bundle(MODEL), settings=settings(None, tile_memory=100_000)) as vlm:
        for seed in range(6):
            vlm.ask(noise(200, 200, seed), "What?", max_tokens=1)
        assert vlm.engine is not None
        held = vlm.engine.tiles._held.values()
        assert 50_000 < sum(rows.nbytes for rows in held) <= 100_000


def test_an_encoded_picture_stands_for_the_picture(
    bundle: Callable[..., Path], chart: Path, icon: Path, plain: EdgeVLM
) -> None:
    handle = plain.encode(chart)
    assert handle.n_tokens == 130
    assert handle.use.crops == 7
    expected = plain.ask([chart, icon], "Compare.", max_tokens=8)
    found = plain.ask([handle, icon], "Compare.", max_tokens=8)
    assert same(found, expected)
    assert found.images == expected.images
    assert (found.encoded_crops, expected.encoded_crops) == (2, 9)
    with plain.chat(max_tokens=8) as chat, plain.stream(handle, "What?", max_tokens=8) as stream:
        pieces = "".join(stream)
        assert chat.ask(handle, "What?").answer == pieces.strip()
        assert chat.ask(handle, "And?").image_tokens == 2 * handle.n_tokens
    few = plain.encode(chart, max_tiles=2)
    assert few.use.crops < handle.use.crops
    assert same(
        plain.ask(few, "What?", max_tokens=8), plain.ask(chart, "What?", max_tokens=8, max_tiles=2)
    )
    with (
        EdgeVLM.load(bundle("tiny-378"), settings=settings(None)) as other,
        pytest.raises(ImageError, match="another model"),
    ):
        other.ask(handle, "What?")


def test_a_picture_that_cannot_be_encoded(plain: EdgeVLM) -> None:
    with pytest.raises(ImageError):
        plain.encode(b"not a picture")


@pytest.mark.parametrize("kind", ["tile", "prefix"])
def test_damaged_entries_are_computed_again(
    bundle: Callable[..., Path], cache: Path, chart: Path, plain: EdgeVLM, kind: str
) -> None:
    expected = plain.ask(chart, "What is shown?", max_tokens=8)
    rng = random.Random(kind)
    with EdgeVLM.load(bundle(MODEL), settings=settings(cache, tile_memory=0)) as vlm:
        vlm.ask(chart, "What is shown?", max_tokens=1)
        for damage in ("flip", "cut", "empty", "swap"):
            if kind == "tile":
                for path in entries(cache, "prefix"):
                    path.unlink()
            good = {path: path.read_bytes() for path in entries(cache, kind)}
            others = [*list(good.values())[1:], b"foreign"]
            for (path, content), other in zip(good.items(), others, strict=True):
                data = bytearray(content)
                if damage == "flip":
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                elif damage == "swap":
                    data = bytearray(other)
                else:
                    del data[0 if damage == "empty" else rng.randrange(len(data)) :]
                path.write_bytes(data)
            answer = vlm.ask(chart, "What is shown?", max_tokens=8)
            assert same(answer, expected)
            assert answer.restored_tokens == 0
            assert answer.encoded_crops == (7 if kind == "tile" else 0)
            assert vlm.ask(chart, "Again?", max_tokens=1).restored_tokens > 0


def test_a_prefix_that_llama_cpp_refuses(
    bundle: Callable[..., Path], cache: Path, chart: Path, plain: EdgeVLM
) -> None:
    """As from a build that writes it otherwise; its checksums are right."""
    from edge_vlm.machine.store import Entry, Store

    with EdgeVLM.load(bundle(MODEL), settings=settings(cache)) as vlm:
        vlm.ask(chart, "What?", max_tokens=1)
        (path,) = entries(cache, "prefix")
        store = Store(cache / "pictures", 1 << 30)
        key = bytes.fromhex(path.stem)
        good = store.read("prefix", key)
        assert good is not None
        longer = good.copy()
        longer[:4] ^= 1  # llama.cpp's magic number
        for state in (longer, good[: len(good) // 2], np.zeros(8, np.uint8)):
            path.unlink()
            store.write_soon([Entry("prefix", key, state)])
            store.flush()
            answer = vlm.ask(chart, "What is shown?", max_tokens=8)
            assert answer.restored_tokens == 0
            assert same(answer, plain.ask(chart, "What is shown?", max_tokens=8))
            assert vlm.ask(chart, "What?", max_tokens=1).restored_tokens > 0


def test_another_version_of_the_bundle_finds_nothing(
    bundle: Callable[..., Path], cache: Path, chart: Path
) -> None:
    with EdgeVLM.load(bundle(MODEL), settings=settings(cache)) as vlm:
        vlm.ask(chart, "What?", max_tokens=1)
    tiles = {path.name for path in entries(cache, "tile")}
    other = bundle(MODEL, vision="fp16", decoder="f16")
    with EdgeVLM.load(other, settings=settings(cache)) as vlm:
        answer = vlm.ask(chart, "What?", max_tokens=8)
    assert (answer.restored_tokens, answer.cached_crops) == (0, 0)
    with EdgeVLM.load(other, settings=settings(None)) as vlm:
        assert same(answer, vlm.ask(chart, "What?", max_tokens=8))
    # The same decoder weights with another head on it would share tiles, never a KV cache.
    third = bundle(MODEL, decoder="f16")
    with EdgeVLM.load(third, settings=settings(cache)) as vlm:
        answer = vlm.ask(chart, "What?", max_tokens=8)
    assert answer.restored_tokens == 0
    assert len(tiles) < len(entries(cache, "tile"))


def test_a_bundle_replaced_under_a_loaded_model(
    bundle: Callable[..., Path], tmp_path: Path, chart: Path
) -> None:
    """The vision tower is loaded late; by then it must still be the one that was verified."""
    import shutil

    folder = shutil.copytree(bundle(MODEL), tmp_path / "bundle")
    with EdgeVLM.load(folder, settings=settings(None)) as vlm:
        path = folder / "vision.onnx"
        path.write_bytes(path.read_bytes())
        with pytest.raises(BundleError, match="was changed"):
            vlm.ask(chart, "What?")


def test_the_command_tells_what_was_cached(run: Run, chart: Path, cache: Path) -> None:
    def ask(*arguments: str) -> dict[str, Any]:
        result = run("ask", "--json", "--max-tokens=8", *arguments, EDGE_VLM_CACHE=str(cache))
        assert result.returncode == 0, result.stderr
        assert result.stderr == b""
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    alone = ask("--no-cache", str(chart), "What is shown?")
    assert not cache.exists()
    first, second = (ask(str(chart), "What is shown?") for _ in range(2))
    assert [a["encoded_crops"] for a in (alone, first, second)] == [7, 7, 0]
    assert second["restored_tokens"] == second["cached_tokens"] > 0
    assert alone["token_ids"] == first["token_ids"] == second["token_ids"]
    verbose = run("ask", "-v", str(chart), "What?", EDGE_VLM_CACHE=str(cache))
    assert f"cache: {second['restored_tokens']} tokens".encode() in verbose.stderr


def test_cache_info_clear_and_path(run: Run, chart: Path, cache: Path) -> None:
    environment = {"EDGE_VLM_CACHE": str(cache), "EDGE_VLM_CACHE_SIZE": "10MB"}
    assert run("cache", "path", **environment).stdout.decode().strip() == str(cache / "pictures")
    empty = json.loads(run("cache", "info", "--json", **environment).stdout)
    assert empty["enabled"]
    assert empty["used_bytes"] == 0
    assert not cache.exists()
    run("ask", str(chart), "What?", "--max-tokens=1", **environment)
    full = json.loads(run("cache", "info", "--json", **environment).stdout)
    assert full["entries"] == {"tile": 8, "prefix": 1}  # seven crops and the markers
    assert full["used_bytes"] == sum(full["bytes"].values()) <= full["limit_bytes"] == 10_000_000
    shown = run("cache", "info", **environment).stdout.decode()
    assert "of at most 10 MB" in shown
    cleared = run("cache", "clear", **environment)
    assert b"removed 9 entries" in cleared.stderr
    assert entries(cache, "*") == []
    assert json.loads(run("cache", "info", "--json", **environment).stdout)["used_bytes"] == 0


@pytest.mark.parametrize("off", ["", "OFF"])
def test_the_cache_can_be_turned_off(run: Run, chart: Path, tmp_path: Path, off: str) -> None:
    home = {"XDG_CACHE_HOME": str(tmp_path / "home")}
    result = run("ask", str(chart), "What?", "--max-tokens=1", EDGE_VLM_CACHE=off, **home)
    assert result.returncode == 0
    assert not list(tmp_path.rglob("pictures"))
    assert run("cache", "info", EDGE_VLM_CACHE=off).stdout == b"the cache is off\n"
    assert run("cache", "path", EDGE_VLM_CACHE=off).returncode == 2


def test_a_cache_that_cannot_be_written_costs_a_line(run: Run, chart: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    expected = run("ask", "--no-cache", str(chart), "What?", "--max-tokens=8")
    for folder in (blocked, blocked / "below"):
        result = run("ask", str(chart), "What?", "--max-tokens=8", EDGE_VLM_CACHE=str(folder))
        assert result.returncode == 0
        assert result.stdout == expected.stdout
        (line,) = result.stderr.decode().splitlines()
        assert line.startswith("pictures are not cached: ")


@pytest.mark.engine
def test_random_pictures_questions_and_settings(cache: Path) -> None:
    """Each with an empty cache, a filled one, and none: EDGE_VLM_TEST_PAIRS=500 asks for more."""
    rng = random.Random(1)
    pictures: list[Pixels] = []
    for path in EXAMPLES:
        with Image.open(path) as image:
            pictures.append(np.asarray(image.convert("RGB")))
    questions = json.loads((EXAMPLES[0].parents[1] / "questions.json").read_text("utf-8"))
    texts = sorted({str(item["question"]) for item in questions})
    kv_types = ("f16", "f32", "q8_0")
    loaded: list[tuple[EdgeVLM, EdgeVLM]] = []
    for kv_type in kv_types:
        for batch_size in (64, 512):
            base = settings(cache, kv_type=kv_type, batch_size=batch_size)
            without = base.without_cache()
            loaded.append(
                (
                    EdgeVLM.load(embedded_bundle(), settings=base),
                    EdgeVLM.load(embedded_bundle(), settings=without),
                )
            )
    cached = 0
    for _ in range(N_PAIRS):
        with_cache, without_cache = rng.choice(loaded)
        chosen = [varied(rng, rng.choice(pictures)) for _ in range(rng.choice((1, 1, 1, 2)))]
        options: dict[str, Any] = {"max_tokens": 24}
        if rng.random() < 0.4:
            options["max_tiles"] = rng.randint(1, 6)
        if rng.random() < 0.3:
            options["system"] = rng.choice(("Be brief.", "Answer in German."))
        first_text, text = rng.choice(texts), rng.choice(texts)
        with_cache.ask(chosen, first_text, **{**options, "max_tokens": 1})
        found = with_cache.ask(chosen, text, **options)
        expected = without_cache.ask(chosen, text, **options)
        assert same(found, expected), (text, options)
        assert found.restored_tokens > 0
        cut = [picture.copy() for picture in chosen]
        cut[-1][: rng.randint(1, 20), : rng.randint(1, 20)] ^= 0xFF  # most tiles stay
        found = with_cache.ask(cut, text, **options)
        assert same(found, without_cache.ask(cut, text, **options)), (text, options)
        cached += found.cached_crops
    assert cached > 0
    for pair in loaded:
        for vlm in pair:
            vlm.close()


def varied(rng: random.Random, picture: Pixels) -> Pixels:
    """The picture, or a part of it in another size."""
    height, width = picture.shape[:2]
    if rng.random() < 0.3:
        return picture
    top, left = rng.randrange(height // 2), rng.randrange(width // 2)
    part = picture[top : top + rng.randint(height // 4, height), left : left + width]
    size = (rng.randint(40, 500), rng.randint(40, 500))
    return np.asarray(Image.fromarray(part).resize(size))

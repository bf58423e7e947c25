"""Prompts with flash attention, answers without: the KV cache changes its layout in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.bundle.manifest import Bundle
from edge_vlm.decoder.context import Context, _batches
from edge_vlm.decoder.decoder import LlamaDecoder
from edge_vlm.decoder.llama import transpose_values
from edge_vlm.errors import Cancelled, DecoderError
from edge_vlm.machine.engine_settings import FLASH_ROWS, FLASH_TILE, flash_mode, untuned
from edge_vlm.progress import CancelToken

N_ROWS = 700  # more than FLASH_ROWS, in batches of 256 and a rest
MODES = ("prefill", "off")


@pytest.fixture(scope="module")
def model(bundle: Callable[..., Path]) -> Bundle:
    """In float32: quantized weights would magnify the last bits of what reaches them."""
    return Bundle.open(bundle("tiny-126-tied"))


@contextmanager
def decoder(model: Bundle, mode: str, **options: Any) -> Iterator[LlamaDecoder]:
    engines = replace(untuned(), threads=1, prefill_threads=1, batch_size=256, flash_attention=mode)
    made = LlamaDecoder(model, engines, **options)
    try:
        yield made
    finally:
        made.close()


def rows(n: int, model: Bundle) -> Any:
    shape = (n, model.manifest.decoder.hidden_size)
    return np.random.default_rng(0).normal(0, 0.05, shape).astype(np.float32)


def distance(one: Any, other: Any, model: Bundle) -> float:
    """Largest difference as a part of the range."""
    n = model.manifest.decoder.vocab_size
    return float(np.abs(one - other)[:n].max() / np.ptp(other[:n]))


def ask(context: Context, model: Bundle, answer: int = 4) -> list[Any]:
    """A few tokens, a picture, a question and an answer: the logits of its tokens."""
    context.append_tokens([1, 2, 3])
    context.append_embeddings(rows(N_ROWS, model))
    context.append_tokens([4, 5, 6], logits=True)
    found = [context.logits()]
    for _ in range(answer - 1):
        context.append_tokens(
            [int(found[-1][: model.manifest.decoder.vocab_size].argmax())], logits=True
        )
        found.append(context.logits())
    return found


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
@pytest.mark.parametrize("in_turns", [False, True])
def test_logits_are_the_same(model: Bundle, kv_type: str, in_turns: bool) -> None:
    found = {}
    for mode in MODES:
        with (
            decoder(model, mode, kv_type=kv_type, in_turns=in_turns) as made,
            made.context(N_ROWS + 20) as context,
        ):
            context.append_tokens([1, 2, 3])
            made.release()
            context.append_embeddings(rows(N_ROWS, model))
            made.release()  # in the middle of a prompt
            assert context.n_positions == N_ROWS + 3
            context.append_tokens([4, 5, 6], logits=True)
            found[mode] = context.logits()
    assert distance(found["prefill"], found["off"], model) < 3e-4


def test_a_context_that_changes_its_layout_is_like_any_other(model: Bundle) -> None:
    with (
        decoder(model, "prefill") as made,
        decoder(model, "off") as plain,
        made.context(N_ROWS + 20) as context,
        plain.context(N_ROWS + 20) as other,
    ):
        expected = ask(other, model)
        for first, second in zip(ask(context, model), expected, strict=True):
            assert distance(first, second, model) < 3e-4
        # What is copied out of one goes into the other.
        state = context.state()
        assert len(state) == other.state_bytes
        assert other.set_state(state)
        assert other.n_positions == context.n_positions
        # Room for more; less of what is there; another long prompt, and a larger one.
        context.reserve(3 * N_ROWS)
        assert (context.n_positions, context.capacity) == (N_ROWS + 9, 2304)
        context.append_embeddings(rows(N_ROWS + 20, model))
        context.truncate(N_ROWS + 3)
        context.append_tokens([4, 5, 6], logits=True)
        assert distance(context.logits(), expected[0], model) < 3e-4
        context.truncate(0)
        assert context.set_state(state)
        assert context.n_positions == N_ROWS + 9
        other.append_tokens([7], logits=True)
        context.append_tokens([7], logits=True)
        assert np.array_equal(context.logits(), other.logits())


def test_a_prompt_that_was_stopped_begins_again(model: Bundle) -> None:
    with decoder(model, "prefill") as made, made.context(N_ROWS + 20) as context:
        expected = ask(context, model)
        context.truncate(0)
        cancel = CancelToken()
        with pytest.raises(Cancelled):
            context.append_embeddings(
                rows(N_ROWS, model), cancel=cancel, progress=lambda done: cancel.set()
            )
        assert context.n_positions == 256
        context.truncate(0)
        for first, second in zip(ask(context, model), expected, strict=True):
            assert np.array_equal(first, second)


def test_what_is_short_or_quantized_keeps_one_layout(model: Bundle) -> None:
    with decoder(model, "prefill") as made, made.context(N_ROWS + 20) as context:
        context.append_embeddings(rows(FLASH_ROWS - 1, model))
        assert not context._flash
        context.append_embeddings(rows(190, model))
        assert not context._flash
    with decoder(model, "prefill", kv_type="q8_0") as made, made.context(N_ROWS + 20) as context:
        context.append_embeddings(rows(N_ROWS, model))
        assert not context._flash


@given(st.integers(1, 3000), st.integers(1, 600), st.booleans())
def test_batches_cover_a_prompt(n_rows: int, size: int, flash: bool) -> None:
    batches = _batches(n_rows, size, flash)
    assert [start for start, _ in batches] == [0, *(stop for _, stop in batches[:-1])]
    assert batches[-1][1] == n_rows
    lengths = [stop - start for start, stop in batches]
    assert 0 < min(lengths) <= max(lengths) <= size
    if flash and n_rows >= FLASH_TILE and flash_mode("prefill", "f16", size) == "prefill":
        assert min(lengths) >= FLASH_TILE


def state_bytes(n_cells: int, n_layers: int, width: int, element: int, seed: int) -> Any:
    random = np.random.default_rng(seed)
    parts = [np.array([7, 1, 1, n_cells], np.uint32).tobytes()]
    parts += [np.array([i, 1, 1], np.int32).tobytes() for i in range(n_cells)]
    parts += [np.array([0, n_layers], np.uint32).tobytes()]
    kind = np.array([1 if element == 2 else 0], np.int32).tobytes()
    for _ in range(2 * n_layers):
        row = np.array([width * element], np.uint64).tobytes()
        parts += [kind, row, random.bytes(n_cells * width * element)]
    return np.frombuffer(b"".join(parts), np.uint8).copy()


@given(
    st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.sampled_from([2, 4]), st.integers(0)
)
def test_values_are_transposed_and_back(
    n_cells: int, n_layers: int, width: int, element: int, seed: int
) -> None:
    state = state_bytes(n_cells, n_layers, width, element, seed % 2**32)
    before = state.copy()
    transpose_values(state, n_cells, n_layers)
    last = n_cells * width * element
    kind = np.uint16 if element == 2 else np.uint32
    rows_before = before[-last:].view(kind).reshape(n_cells, width)
    assert np.array_equal(state[-last:].view(kind).reshape(width, n_cells), rows_before.T)
    transpose_values(state, n_cells, n_layers)
    assert np.array_equal(state, before)


@pytest.mark.parametrize("place", [12, 16 + 5 * 12, 20 + 5 * 12, 24 + 5 * 12, 28 + 5 * 12, -1])
def test_a_state_of_another_kind_is_refused(place: int) -> None:
    state = state_bytes(5, 2, 3, 2, 0)
    state = state[:-1] if place == -1 else state
    if place >= 0:
        state[place] += 3
    with pytest.raises(DecoderError, match="lays its KV cache out"):
        transpose_values(state, 5, 2)

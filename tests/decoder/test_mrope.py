"""A decoder with M-RoPE: what llama.cpp makes of a picture's positions, against numpy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from edge_vlm.bundle.manifest import DECODER_NAME, Bundle, FileRecord
from edge_vlm.decoder.context import Context
from edge_vlm.decoder.decoder import LlamaDecoder
from edge_vlm.errors import Cancelled, DecoderError
from edge_vlm.families.sizes import Decoder
from edge_vlm.machine.engine_settings import FLASH_ROWS, untuned
from edge_vlm.progress import CancelToken
from tests.toy.bundle import toy_manifest

pytestmark = pytest.mark.engine

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
SIZES = Decoder(
    precision="f32",
    n_layers=2,
    hidden_size=64,
    ffn_size=96,
    n_heads=2,
    n_kv_heads=1,
    head_dim=32,
    vocab_size=96,
    additional_vocab_size=0,
    max_sequence_length=4096,
    tied_head=True,
)
SECTIONS = (4, 6, 6)  # of the 16 frequencies, for temporal, height and width
THETA, EPSILON = 100.0, 1e-6  # few positions are to make a difference
WORDS, MORE, LAST = [5, 6, 7], [8, 9], [10, 11, 12, 13]


def weights() -> dict[str, Float32]:
    """By llama.cpp's names; attention that looks at some positions more than at others."""
    random = np.random.default_rng(0)
    width, heads = SIZES.hidden_size, SIZES.head_dim

    def matrix(rows: int, columns: int) -> Float32:
        return random.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)

    found = {"token_embd.weight": random.normal(0, 1, (SIZES.vocab_size, width))}
    for layer in range(SIZES.n_layers):
        shapes = {
            "attn_q": (SIZES.n_heads * heads, width),
            "attn_k": (SIZES.n_kv_heads * heads, width),
            "attn_v": (SIZES.n_kv_heads * heads, width),
            "attn_output": (width, SIZES.n_heads * heads),
            "ffn_gate": (SIZES.ffn_size, width),
            "ffn_up": (SIZES.ffn_size, width),
            "ffn_down": (width, SIZES.ffn_size),
        }
        for name, shape in shapes.items():
            found[f"blk.{layer}.{name}.weight"] = matrix(*shape)
            if name in ("attn_q", "attn_k", "attn_v"):
                found[f"blk.{layer}.{name}.bias"] = random.normal(0, 1, shape[0])
        for name in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{name}.weight"] = random.uniform(0.5, 1.5, width)
    found["output_norm.weight"] = random.uniform(0.5, 1.5, width)
    return {name: values.astype(np.float32) for name, values in found.items()}


WEIGHTS = weights()


def reference(rows: Float32, positions: Int32) -> Float32:
    """(vocab_size,): scores behind rows (n, hidden_size) at positions (n, 3)."""
    half = SIZES.head_dim // 2
    section = np.repeat(np.arange(3), SECTIONS)
    angles = positions[:, section] * THETA ** -(np.arange(half) / half)

    def turned(heads: Any) -> Any:
        first, second = heads[..., :half], heads[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)

    def normed(x: Any, name: str) -> Any:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * WEIGHTS[f"{name}.weight"]

    x = rows.astype(np.float64)
    for layer in range(SIZES.n_layers):

        def times(x: Any, name: str, block: str = f"blk.{layer}.") -> Any:
            return x @ WEIGHTS[f"{block}{name}.weight"].T + WEIGHTS.get(f"{block}{name}.bias", 0)

        y = normed(x, f"blk.{layer}.attn_norm")
        q, k, v = (
            times(y, name).reshape(len(x), -1, SIZES.head_dim).transpose(1, 0, 2)
            for name in ("attn_q", "attn_k", "attn_v")
        )
        scores = turned(q) @ turned(k).transpose(0, 2, 1) / np.sqrt(SIZES.head_dim)
        scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = shares / shares.sum(-1, keepdims=True) @ v
        x = x + times(mixed.transpose(1, 0, 2).reshape(len(x), -1), "attn_output")
        y = normed(x, f"blk.{layer}.ffn_norm")
        gate = times(y, "ffn_gate")
        x = x + times(gate / (1 + np.exp(-gate)) * times(y, "ffn_up"), "ffn_down")
    last: Float32 = normed(x[-1], "output_norm") @ WEIGHTS["token_embd.weight"].T
    return last


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of random weights, in float32: close enough to what stands there to open the decoder."""
    folder = tmp_path_factory.mktemp("mrope")
    writer = gguf.GGUFWriter(folder / DECODER_NAME, "qwen2vl")
    writer.add_context_length(SIZES.max_sequence_length)
    writer.add_embedding_length(SIZES.hidden_size)
    writer.add_block_count(SIZES.n_layers)
    writer.add_feed_forward_length(SIZES.ffn_size)
    writer.add_head_count(SIZES.n_heads)
    writer.add_head_count_kv(SIZES.n_kv_heads)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_sections([*SECTIONS, 0])
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"word{i}" for i in range(SIZES.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * SIZES.vocab_size)
    writer.add_token_merges(["w o"])
    for name, values in WEIGHTS.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (folder / DECODER_NAME).read_bytes()
    record = FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest = toy_manifest({DECODER_NAME: data, "vision.onnx": b""}).model_copy(
        update={"decoder": SIZES, "files": {DECODER_NAME: record}}
    )
    return Bundle(folder, manifest)


@contextmanager
def decoder(model: Bundle, *, kv_type: str = "f32", **engines: Any) -> Iterator[LlamaDecoder]:
    """In small batches, so that a picture needs several."""
    wanted = {"threads": 1, "prefill_threads": 1, "batch_size": 16, "flash_attention": "off"}
    made = LlamaDecoder(
        model, replace(untuned(), **{**wanted, **engines}), kv_type=kv_type, in_turns=True
    )
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def context(model: Bundle) -> Iterator[Context]:
    with decoder(model) as made, made.context(256) as opened:
        yield opened


class Picture:
    """Random rows that stand in a grid, the last one of which may be shorter."""

    def __init__(self, height: int, width: int, seed: int = 0, n_missing: int = 0) -> None:
        shape = height * width - n_missing, SIZES.hidden_size
        self.rows = np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)
        grid = np.indices((1, height, width)).reshape(3, -1).T[: len(self.rows)]
        self.positions = np.ascontiguousarray(grid, np.int32)
        self.taken = max(height, width)


WIDE, TALL, RAGGED = Picture(4, 9), Picture(11, 2, seed=1), Picture(4, 9, seed=2, n_missing=5)


class Prompt:
    """Tokens and pictures in a row, as numpy has them."""

    def __init__(self, *parts: list[int] | Picture) -> None:
        rows, positions, self.next = [], [], 0
        for part in parts:
            if isinstance(part, Picture):
                rows.append(part.rows)
                positions.append(self.next + part.positions)
                self.next += part.taken
            else:
                rows.append(WEIGHTS["token_embd.weight"][part])
                positions.append(np.arange(len(part))[:, None] + np.full(3, self.next))
                self.next += len(part)
        self.parts = parts
        self.rows = np.concatenate(rows)
        self.positions = np.concatenate(positions)

    def put(self, context: Context, **options: Any) -> None:
        """Behind what is there; logits for the last token."""
        for part in self.parts:
            if isinstance(part, Picture):
                context.append_embeddings(part.rows, positions=part.positions, **options)
            else:
                context.append_tokens(part, logits=True, **options)


def agrees(context: Context, prompt: Prompt) -> bool:
    """Counts, the cells' positions as llama.cpp keeps them, and the logits."""
    assert context.n_positions == len(prompt.rows)
    assert context.next_position == prompt.next
    cells = context.state()[16 : 16 + 24 * len(prompt.rows)].view(np.int32).reshape(-1, 6)
    assert np.array_equal(cells[:, [0, 3, 2]], prompt.positions)
    expected = reference(prompt.rows, prompt.positions)
    return bool(np.abs(context.logits() - expected).max() < 1e-3 * np.ptp(expected))


PROMPTS: dict[str, list[list[int] | Picture]] = {
    "text": [WORDS],
    "picture": [WORDS, WIDE, LAST],
    "pictures": [WORDS, TALL, MORE, WIDE, LAST],
    "side by side": [WORDS, WIDE, TALL, LAST],
    "ragged": [WORDS, RAGGED, LAST],
}


@pytest.mark.parametrize("parts", PROMPTS.values(), ids=PROMPTS)
def test_scores_are_those_of_the_positions(context: Context, parts: Any) -> None:
    prompt = Prompt(*parts)
    prompt.put(context)
    assert agrees(context, prompt)
    context.append_tokens(MORE, logits=True)  # as an answer goes on
    assert agrees(context, Prompt(*parts, MORE))


def test_the_reference_tells_positions_apart() -> None:
    """Guards the guard: what is exchanged, counted on or off by one behind a picture is far off."""
    prompt = Prompt(WORDS, WIDE, LAST)
    right = reference(prompt.rows, prompt.positions)
    counted = np.repeat(np.arange(len(prompt.rows))[:, None], 3, axis=1)
    late = prompt.positions.copy()
    late[-len(LAST) :] += 1
    for wrong in (prompt.positions[:, [0, 2, 1]], counted, late):
        assert np.abs(reference(prompt.rows, wrong) - right).max() > 0.02 * np.ptp(right)


def test_rows_without_positions_count_on(context: Context) -> None:
    context.append_tokens(WORDS)
    context.append_embeddings(WIDE.rows, logits=True)
    n = len(WORDS) + len(WIDE.rows)
    rows = np.concatenate([WEIGHTS["token_embd.weight"][WORDS], WIDE.rows])
    expected = reference(rows, np.repeat(np.arange(n, dtype=np.int32)[:, None], 3, axis=1))
    assert np.abs(context.logits() - expected).max() < 1e-3 * np.ptp(expected)
    assert (context.n_positions, context.next_position) == (n, n)


def test_what_can_be_cut(context: Context) -> None:
    """Behind a picture, in front of it and in text; in the middle of it, it goes as a whole."""
    Prompt(WORDS, WIDE, MORE, TALL, LAST).put(context)
    ends = np.cumsum([0, *map(len, (WORDS, WIDE.rows, MORE, TALL.rows, LAST))]).tolist()
    for n, left, parts in (
        (ends[5] + 3, ends[5], (WORDS, WIDE, MORE, TALL, LAST)),
        (ends[4] + 1, ends[4] + 1, (WORDS, WIDE, MORE, TALL, LAST[:1])),
        (ends[4], ends[4], (WORDS, WIDE, MORE, TALL)),
        (ends[4] - 1, ends[3], (WORDS, WIDE, MORE)),
        (ends[2], ends[2], (WORDS, WIDE)),
        (ends[1] + 1, ends[1], (WORDS,)),
        (0, 0, ()),
    ):
        context.truncate(n)
        assert context.n_positions == left
        context.append_tokens([20, 21], logits=True)
        assert agrees(context, Prompt(*parts, [20, 21]))
        context.truncate(left)


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_a_state_knows_its_positions(model: Bundle, kv_type: str) -> None:
    """As on disk, and while the weights are away."""
    prompt = Prompt(WORDS, WIDE, MORE, TALL, LAST)
    with (
        decoder(model, kv_type=kv_type) as made,
        made.context(256) as context,
        made.context(256) as other,
    ):
        prompt.put(context)
        expected = context.logits()
        n_kept = len(prompt.rows) - len(LAST)
        assert other.set_state(context.state(n_kept))
        assert (other.n_positions, other.next_position) == (n_kept, prompt.next - len(LAST))
        made.release()
        other.reserve(600)
        assert (other.n_positions, other.next_position) == (n_kept, prompt.next - len(LAST))
        other.append_tokens(LAST, logits=True)
        assert np.array_equal(other.logits(), expected)
        assert not other.set_state(np.zeros(100, np.uint8))
        assert (other.n_positions, other.next_position) == (0, 0)
        prompt.put(other)
        assert np.array_equal(other.logits(), expected)


@pytest.mark.parametrize("done", [16, 32])
def test_a_picture_is_there_as_a_whole_or_not_at_all(context: Context, done: int) -> None:
    cancel = CancelToken()
    prompt = Prompt(WORDS, WIDE)

    def stop(n: int) -> None:
        if n == done:
            cancel.set()

    with pytest.raises(Cancelled):
        prompt.put(context, cancel=cancel, progress=stop)
    assert (context.n_positions, context.next_position) == (len(WORDS), len(WORDS))
    context.append_tokens(LAST, logits=True)
    assert agrees(context, Prompt(WORDS, LAST))


@pytest.mark.parametrize("shape", [(30, 25), (2, 400)], ids=str)
def test_a_layout_for_prompts_keeps_positions(model: Bundle, shape: tuple[int, int]) -> None:
    """A long prompt with flash attention, moved to an answer's layout."""
    large = Picture(*shape, seed=2)
    assert len(large.rows) >= FLASH_ROWS
    prompt = Prompt(WORDS, large, MORE)
    with (
        decoder(model, batch_size=256, flash_attention="prefill") as made,
        made.context(1024) as context,
    ):
        context.append_tokens(WORDS)
        context.append_embeddings(large.rows, positions=large.positions)
        assert context._flash
        context.append_tokens(MORE, logits=True)
        assert not context._flash
        assert agrees(context, prompt)


def test_three_positions_need_a_decoder_that_has_them(bundle: Callable[..., Path]) -> None:
    opened = Bundle.open(bundle("tiny-126-tied"))
    rows = np.zeros((len(WIDE.rows), opened.manifest.decoder.hidden_size), np.float32)
    made = LlamaDecoder(opened)
    with (
        made.context(256) as context,
        pytest.raises(DecoderError, match="one position a token, not three"),
    ):
        context.append_embeddings(rows, positions=WIDE.positions)
    made.close()

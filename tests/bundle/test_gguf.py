"""What is compared and bounded in the header of decoder.gguf before llama.cpp sees the file."""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_vlm.bundle.find import embedded_bundle
from edge_vlm.bundle.gguf_check import check_decoder, check_header
from edge_vlm.bundle.gguf_header import FLOAT32, INT32, TEXT, UINT32, Tensor, Value, read_header
from edge_vlm.bundle.manifest import DECODER_NAME, Bundle
from edge_vlm.errors import BundleError
from tests.bundle.gguf_files import Entries, changed, written

TOKENS = "tokenizer.ggml.tokens"
TYPES = "tokenizer.ggml.token_type"
MERGES = "tokenizer.ggml.merges"
EPSILON = "qwen3.attention.layer_norm_rms_epsilon"
NORM = "blk.0.attn_norm.weight"
Change = Callable[[Entries], Any]


@cache
def demo() -> Bundle:
    return Bundle.open(embedded_bundle())


@cache
def good() -> bytes:
    return demo().decoder_file.read_bytes()


def refusal(path: Path, content: bytes, **sizes: Any) -> str:
    """The one line that refuses a file of this content, where the manifest has these sizes."""
    path.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        check_decoder(path, demo().manifest.decoder.model_copy(update=sizes))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < 500
    return message.removeprefix(f"{path}: ")


def number(key: str, value: float, kind: int = UINT32) -> Change:
    return lambda entries: entries.update({key: Value(kind, False, value)})


def content(key: str, change: Callable[[list[Any]], Any]) -> Change:
    """Change a list's entries."""

    def in_place(entries: Entries) -> None:
        listed = list(entries[key].content)
        change(listed)
        kind = entries[key].kind
        new = listed if kind == TEXT else np.array(listed, entries[key].content.dtype)
        entries[key] = Value(kind, True, new)

    return in_place


def without(key: str) -> Change:
    return lambda entries: entries.pop(key)


def put(index: int, value: Any) -> Callable[[list[Any]], Any]:
    return lambda listed: listed.__setitem__(index, value)


ENTRIES: dict[str, tuple[Change, str]] = {
    **{
        f"{key} {value}": (number(f"qwen3.{key}", value), words.format(value))
        for key, values, words in (
            ("block_count", (0, 2, 2**31 - 1, 2**32 - 1), "has n_layers {}, the manifest says 3"),
            ("rope.dimension_count", (0, 1, 2, 62, 2**31), "has head_dim {} in qwen3.rope"),
            ("attention.key_length", (0, 63, 128, 2**31), "has head_dim {} in qwen3.attention"),
            ("attention.value_length", (0, 2**32 - 1), "has head_dim {} in qwen3.attention"),
            ("attention.head_count", (0, 3, 2**31), "has n_heads {}, the manifest says 4"),
            ("attention.head_count_kv", (0, 2, 2**32 - 1), "has n_kv_heads {}, the manifest"),
            ("embedding_length", (0, 2**31 - 1), "has hidden_size {}, the manifest says 256"),
            ("feed_forward_length", (0, 2**32 - 1), "has ffn_size {}, the manifest says 256"),
            ("context_length", (0, 2**32 - 1), "has max_sequence_length {}, the manifest"),
            ("vocab_size", (0, 1151, 2**32 - 1), "has vocabulary {}, the manifest says 1152"),
        )
        for value in values
    },
    "layers as text": (
        lambda entries: entries.update({"qwen3.block_count": Value(TEXT, False, b"3")}),
        "qwen3.block_count is of another type than expected",
    ),
    "layers by list": (
        lambda entries: entries.update(
            {"qwen3.attention.head_count": Value(UINT32, True, np.full(3, 4, np.uint32))}
        ),
        "qwen3.attention.head_count is of another type than expected",
    ),
    "no layers": (without("qwen3.block_count"), "lacks qwen3.block_count"),
    **{
        f"epsilon {value}": (number(EPSILON, value, FLOAT32), f"{EPSILON} is {value:g}, expected")
        for value in (math.nan, math.inf, -math.inf, 0.0, -1e30, -1e-6, 1.0, 1e30)
    },
    **{
        f"base {value}": (number("qwen3.rope.freq_base", value, FLOAT32), "qwen3.rope.freq_base is")
        for value in (math.nan, math.inf, 0.0, -1.0, 1e30)
    },
    "another number": (number("qwen3.rope.scaling.factor", math.nan, FLOAT32), "is not finite"),
    "a short list": (
        content(TOKENS, list.pop),
        f"{TOKENS} has 1151 entries, the manifest has 1152",
    ),
    "a long list": (content(TOKENS, lambda t: t.append(b"one more")), f"{TOKENS} has 1153 entries"),
    "no list": (without(TOKENS), f"lacks {TOKENS}"),
    "all alike": (content(TOKENS, lambda t: t.__setitem__(slice(None), [b"a"] * 1152)), "twice"),
    "two alike": (content(TOKENS, lambda t: t.__setitem__(7, t[8])), "the same token twice"),
    "empty": (content(TOKENS, put(7, b"")), f"{TOKENS} has an entry that is no text"),
    "NUL": (content(TOKENS, put(7, b"a\0b")), f"{TOKENS} has an entry that is no text"),
    **{
        f"invalid UTF-8 {text!r}": (content(TOKENS, put(7, text)), "an entry that is not UTF-8")
        for text in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80")
    },
    "a character in two tokens": (
        content(TOKENS, lambda t: t.__setitem__(slice(7, 9), [b"x\xc3", b"\xa9x"])),
        "an entry that is not UTF-8",
    ),
    "types": (content(TYPES, list.pop), f"{TYPES} has 1151 entries"),
    "type 0": (content(TYPES, put(0, 0)), f"{TYPES} has a type that there is not"),
    "type 7": (content(TYPES, put(0, 7)), f"{TYPES} has a type that there is not"),
    "no types": (without(TYPES), f"lacks {TYPES}"),
    "no pair": (content(MERGES, put(3, b"ab")), f"{MERGES} has an entry that is no pair"),
    "half a pair": (content(MERGES, put(3, b"ab ")), f"{MERGES} has an entry that is no pair"),
    "no merge": (content(MERGES, put(3, b"")), f"{MERGES} has an entry that is no text"),
    "merges not UTF-8": (content(MERGES, put(3, b"a \xff")), f"{MERGES} has an entry that is not"),
    "scores": (
        lambda entries: entries.update(
            {"tokenizer.ggml.scores": Value(FLOAT32, True, np.zeros(3, np.float32))}
        ),
        "tokenizer.ggml.scores has 3 entries",
    ),
    "end": (
        number("tokenizer.ggml.eos_token_id", 1152),
        "eos_token_id names id 1152, the manifest",
    ),
    "beginning": (number("tokenizer.ggml.bos_token_id", 2**32 - 1), "names id 4294967295"),
    "below": (number("tokenizer.ggml.fim_pre_token_id", -1, INT32), "names id -1"),
    "suppressed": (
        content("tokenizer.ggml.suppress_tokens", put(0, 1152)),
        "tokenizer.ggml.suppress_tokens names id 1152",
    ),
    "kind of vocabulary": (
        lambda entries: entries.update({"tokenizer.ggml.model": Value(TEXT, False, b"t5\x1b[m")}),
        "tokenizer.ggml.model is 't5\\x1b[m', none of those",
    ),
    "template": (number("tokenizer.chat_template", 1), "tokenizer.chat_template is of another"),
    "architecture": (
        lambda entries: entries.update({"general.architecture": Value(TEXT, False, b"\x1b]8;;x")}),
        "general.architecture is '\\x1b]8;;x'",
    ),
    "other files": (number("split.count", 2, 2), "is a part of a model, which reads other files"),
    **{
        f"alignment {value}": (number("general.alignment", value), "general.alignment is no power")
        for value in (0, 3, 2**31)
    },
}


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_that_differ_or_that_no_model_has(tmp_path: Path, name: str) -> None:
    change, words = ENTRIES[name]
    assert words in refusal(tmp_path / DECODER_NAME, changed(good(), change))


def moved(name: str, **fields: Any) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: replace(tensors[name], **fields)})


def renamed(name: str, new: str) -> Callable[[dict[str, Tensor]], Any]:
    def in_place(tensors: dict[str, Tensor]) -> None:
        listed = list(tensors.items())
        tensors.clear()
        tensors.update((new if found == name else found, tensor) for found, tensor in listed)

    return in_place


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a layer less": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("blk.2.")],
        "has tensors of 2 layers, the manifest says 3",
    ),
    "another layer": (
        renamed("blk.2.ffn_up.weight", "blk.99999999.x"),
        "has tensors of 4 layers, the manifest says 3",
    ),
    "no table": (renamed("token_embd.weight", "x"), "token_embd.weight is missing"),
    "table": (moved("token_embd.weight", shape=(1152, 256)), "token_embd.weight is 1152x256"),
    "norm": (moved("output_norm.weight", shape=(128, 2)), "output_norm.weight is 128x2"),
    "no axes": (moved(NORM, shape=()), f"tensor {NORM} has 0 axes"),
    "axes": (moved(NORM, shape=(1,) * 5), f"tensor {NORM} has 5 axes"),
    "empty": (moved(NORM, shape=(0, 256)), f"tensor {NORM} has the shape 0x256"),
    "huge": (
        moved(NORM, shape=(2**63, 2**63)),
        f"tensor {NORM} has the shape 9223372036854775808x",
    ),
    "half a block": (moved(NORM, shape=(16, 16), kind=8), f"tensor {NORM} has the shape 16x16"),
    "type": (moved(NORM, kind=2**32 - 1), f"tensor {NORM} is of type 4294967295"),
    "vector": (moved(NORM, kind=1), f"tensor {NORM} is a vector that is not stored as F32"),
    "start": (moved(NORM, start=2**64 - 1), f"tensor {NORM} begins at 18446744073709551615, expe"),
    "behind the end": (
        lambda t: t.update(
            {"x": Tensor((2**40,), 0, sum(-(-x.n_bytes // 32) * 32 for x in t.values()), 0)}
        ),
        "ends inside the tensor x",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_elsewhere_or_of_another_shape(tmp_path: Path, name: str) -> None:
    change, words = TENSORS[name]
    assert words in refusal(tmp_path / DECODER_NAME, changed(good(), tensors=change))


def bad_files() -> Iterator[tuple[str, bytes, str]]:
    data = good()
    yield "empty", b"", "cannot mmap an empty file"
    yield "magic", b"XXXX" + data[4:], "is not a GGUF file"
    for version in (0, 1, 4, 2**31, 3 << 24):
        yield f"version {version}", data[:4] + struct.pack("<I", version) + data[8:], "has GGUF ver"
    for at in (8, 16):
        for count in (2**20, 2**63 - 1, 2**64 - 1):
            yield f"{count} at {at}", data[:at] + struct.pack("<Q", count) + data[at + 8 :], "many"
    for cut in (4, 10, 23, 24, 30, 100, 1000, 20_000, len(data) // 2, len(data) - 1):
        yield f"cut at {cut}", data[:cut], "ends"
    yield "long key", data[:24] + struct.pack("<Q", 2**63) + data[32:], "a key is malformed"
    yield "key", data.replace(b"general.type", b"general\x1btype"), "a key is malformed"
    yield "keys twice", data.replace(b"general.type", b"general.name"), "general.name twice"
    yield "tensors twice", data.replace(b"blk.2.attn_q.", b"blk.1.attn_q."), "twice"
    no_list = struct.pack("<IQ", 9, 1)
    for what, value, words in (
        ("list of lists", struct.pack("<II", 9, 9) + no_list, "is of type 9, which there is not"),
        ("type", struct.pack("<I", 13), "is of type 13, which there is not"),
        ("long list", struct.pack("<IIQ", 9, 8, 2**22), "has 4194304 entries, which is too many"),
        ("numbers", struct.pack("<IIQ", 9, 4, 2**62), "ends early, or is too long"),
        ("long text", struct.pack("<IQ", 8, 2**40), "has a text of 1099511627776 bytes"),
    ):
        head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k"
        yield what, head + value + bytes(100), words


@pytest.mark.parametrize(
    ("data", "words"), [c[1:] for c in bad_files()], ids=[c[0] for c in bad_files()]
)
def test_files_that_are_malformed(tmp_path: Path, data: bytes, words: str) -> None:
    assert words in refusal(tmp_path / DECODER_NAME, data)


def test_sizes_that_manifest_and_file_agree_on_and_llama_cpp_does_not(tmp_path: Path) -> None:
    path = tmp_path / DECODER_NAME
    many = changed(good(), number("qwen3.block_count", 513))
    assert "has n_layers 513, llama.cpp takes 512" in refusal(path, many, n_layers=513)
    heads = changed(good(), number("qwen3.attention.head_count_kv", 3))
    assert "n_heads 4, not a multiple of n_kv_heads 3" in refusal(path, heads, n_kv_heads=3)

    def odd(entries: Entries) -> None:
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            entries[f"qwen3.{key}"] = Value(UINT32, False, 63)

    assert "has head_dim 63, which is odd" in refusal(path, changed(good(), odd), head_dim=63)


def test_what_llama_cpp_has_a_default_for_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / DECODER_NAME
    without_lengths = changed(good(), without("qwen3.attention.key_length"))
    path.write_bytes(without_lengths)
    check_decoder(path, demo().manifest.decoder)
    assert "has head_dim 64" in refusal(path, without_lengths, head_dim=32)
    for key in ("qwen3.rope.dimension_count", "qwen3.rope.freq_base", "qwen3.vocab_size"):
        path.write_bytes(changed(good(), without(key)))
        check_decoder(path, demo().manifest.decoder)


def test_what_is_written_anew_is_the_same() -> None:
    """Guards the tests above: changes alone make the difference."""
    assert changed(good()) == good()
    check_decoder(demo().decoder_file, demo().manifest.decoder)


def test_many_texts_are_read_in_a_second() -> None:
    texts = [b"token %d" % index for index in range(200_000)]
    data = written({"tokens": Value(TEXT, True, texts)}, {})
    started = time.process_time()
    assert read_header(data).values["tokens"].content == texts
    assert time.process_time() - started < 2


HEADER_BYTES = 36_000  # of the demo model


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, HEADER_BYTES), st.integers(0, 255)), min_size=1, max_size=8)
)
@example([(8, 255), (15, 255)])
def test_changed_bytes_are_read_or_refused(changes: list[tuple[int, int]]) -> None:
    """Whatever is in the file, nothing but a ValueError leaves the reader and the comparison."""
    data = bytearray(good())
    for position, byte in changes:
        data[position] = byte
    try:
        check_header(read_header(bytes(data)), demo().manifest.decoder)
        message = ""
    except ValueError as error:
        message = str(error)
    assert len(message) < 500

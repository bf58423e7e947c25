"""``decoder.gguf`` in llama.cpp against the published implementation's numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from edge_vlm_export.checkpoint.tensors import Checkpoint

from edge_vlm.bundle.manifest import Bundle
from tests.conftest import GOLDEN, GOLDEN_NAMES, GoldenModel
from tests.export_helpers import (
    copy_checkpoint,
    export_exact,
    last_logits,
    llama_model,
    llama_tokenize,
    set_key,
)

pytestmark = pytest.mark.engine  # it exports models

TEXT = "model.language_model."
PRECISIONS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
# Largest difference of a score, relative to the range of the scores.
BOUNDS = {"f32": 1e-4, "f16": 1e-2, "bf16": 2e-2}


def text_only(model: GoldenModel) -> tuple[list[int], npt.NDArray[np.float32]]:
    """Prompt ids and last scores of the case without a picture."""
    arrays = model.cases["text_only"].arrays
    return arrays["input_ids"].tolist(), arrays["logits_last"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_scores_equal_the_published_ones(
    name: str, precision: str, golden: dict[str, GoldenModel], bundle: Callable[..., Path]
) -> None:
    ids, expected = text_only(golden[name])
    path = bundle(name, decoder=precision) / "decoder.gguf"
    with llama_model(path, vocab_only=False) as model:
        logits = last_logits(model, ids)[: len(expected)]
    difference = np.abs(logits - expected).max() / np.ptp(expected)
    print(f"{name} {precision}: scores differ by {difference:.1e} of their range")
    assert difference < BOUNDS[precision]
    assert np.argmax(logits) == golden[name].cases["text_only"].data["greedy_ids"][0]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_tensors_are_the_checkpoint_s(
    name: str, precision: str, bundle: Callable[..., Path]
) -> None:
    checkpoint = Checkpoint.open(GOLDEN / name / "checkpoint")
    manifest = Bundle.open(bundle(name)).manifest.decoder
    expected = expected_tensors(checkpoint, manifest.n_heads, manifest.n_kv_heads)
    reader = gguf.GGUFReader(bundle(name, decoder=precision) / "decoder.gguf")
    assert {tensor.name for tensor in reader.tensors} == expected.keys()
    for tensor in reader.tensors:
        values = expected[tensor.name]
        kind = "f32" if values.ndim == 1 else precision
        assert tensor.tensor_type.name.lower() == kind, tensor.name
        assert tensor.shape.tolist() == list(values.shape[::-1])
        stored = np.ascontiguousarray(values.astype(PRECISIONS[kind]))
        assert tensor.data.tobytes() == stored.tobytes(), tensor.name


def expected_tensors(
    checkpoint: Checkpoint, n_heads: int, n_kv_heads: int
) -> dict[str, npt.NDArray[np.float32]]:
    """The GGUF's tensors in float32, put together from whole tensors."""

    def read(name: str) -> npt.NDArray[np.float32]:
        return checkpoint[name].read()

    extra = read(f"{TEXT}embedding.new_embedding")
    out = {
        "token_embd.weight": np.vstack([read(f"{TEXT}embedding.embedding"), extra]),
        "output_norm.weight": read(f"{TEXT}ln_f.weight"),
    }
    if "lm_head.weight" in checkpoint:
        head = read("lm_head.weight")
        out["output.weight"] = np.vstack([head, np.tile(head[-1:], (len(extra), 1))])
    n_layers = sum(f"{TEXT}layers." in key and "out.weight" in key for key in checkpoint.tensors)
    for layer in range(n_layers):
        source, target = f"{TEXT}layers.{layer}.", f"blk.{layer}."
        qkv = read(f"{source}attn.qkv_w.weight")
        head_dim = len(qkv) // (n_heads + 2 * n_kv_heads)
        cuts = [n_heads * head_dim, (n_heads + n_kv_heads) * head_dim]
        for part, values in zip("qkv", np.split(qkv, cuts), strict=True):
            out[f"{target}attn_{part}.weight"] = values
        up, gate = np.split(read(f"{source}ffn.up.weight"), 2)
        out |= {
            f"{target}ffn_up.weight": up,
            f"{target}ffn_gate.weight": gate,
            f"{target}ffn_down.weight": read(f"{source}ffn.down.weight"),
            f"{target}ffn_norm.weight": read(f"{source}ffn_lnorm.weight"),
            f"{target}attn_norm.weight": read(f"{source}attn_lnorm.weight"),
            f"{target}attn_output.weight": read(f"{source}attn.out.weight"),
            f"{target}attn_q_norm.weight": read(f"{source}attn.q_lnorm.weight"),
            f"{target}attn_k_norm.weight": read(f"{source}attn.k_lnorm.weight"),
        }
    return out


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_additional_ids_are_suppressed(name: str, bundle: Callable[..., Path]) -> None:
    folder = bundle(name)
    decoder = Bundle.open(folder).manifest.decoder
    with llama_model(folder / "decoder.gguf", vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        n_suppressed = ctypes.c_int32()
        tokens = llama_cpp.llama_vocab_get_suppress_tokens(vocab, ctypes.byref(n_suppressed))
        suppressed = tokens[: n_suppressed.value]
    first = decoder.vocab_size
    assert suppressed == list(range(first, first + decoder.additional_vocab_size))


def test_an_untied_head_never_prefers_an_additional_id(
    golden: dict[str, GoldenModel], bundle: Callable[..., Path]
) -> None:
    model = golden["tiny-378"]
    with llama_model(bundle("tiny-378") / "decoder.gguf", vocab_only=False) as loaded:
        for case in model.cases.values():
            ids = [token for token in case.arrays["input_ids"].tolist() if token < 768][-40:]
            logits = last_logits(loaded, ids)
            assert np.allclose(logits[768:], logits[767], atol=1e-5)
            assert np.argmax(logits) < 768


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_vocabulary_is_complete(name: str, bundle: Callable[..., Path]) -> None:
    folder = bundle(name)
    manifest = Bundle.open(folder).manifest
    n_ids = manifest.decoder.vocab_size + manifest.decoder.additional_vocab_size
    with llama_model(folder / "decoder.gguf", vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        assert llama_cpp.llama_vocab_n_tokens(vocab) == n_ids
        assert llama_cpp.llama_vocab_bos(vocab) == manifest.tokens.bos
        assert llama_cpp.llama_vocab_eos(vocab) == manifest.tokens.stop[0]
        assert llama_cpp.llama_vocab_eot(vocab) == manifest.tokens.stop[-1]
        assert not llama_cpp.llama_vocab_get_add_bos(vocab)
        assert all(llama_cpp.llama_vocab_is_eog(vocab, token) for token in manifest.tokens.stop)
        texts = [llama_cpp.llama_vocab_get_text(vocab, token).decode() for token in range(n_ids)]
        for text, token in manifest.tokens.special.items():
            assert texts[token] == text
            assert llama_cpp.llama_vocab_is_control(vocab, token)
        unused = [token for token, text in enumerate(texts) if text == f"[PAD{token}]"]
        assert len(unused) == n_ids - 740 - 34 if name == "tiny-378" else unused
        for token in unused:
            attributes = llama_cpp.llama_vocab_get_attr(vocab, token)
            assert attributes == llama_cpp.LLAMA_TOKEN_ATTR_UNUSED
        template = llama_cpp.llama_model_chat_template(model, None)
    source = GOLDEN / name / "checkpoint" / "chat_template.jinja"
    assert template.decode() == source.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_metadata_describe_the_model(name: str, bundle: Callable[..., Path]) -> None:
    folder = bundle(name)
    decoder = Bundle.open(folder).manifest.decoder
    fields = gguf.GGUFReader(folder / "decoder.gguf").fields
    found: dict[str, Any] = {key: field.contents() for key, field in fields.items()}
    for key, value in {
        "general.architecture": "qwen3",
        "general.name": name,
        "qwen3.context_length": decoder.max_sequence_length,
        "qwen3.embedding_length": decoder.hidden_size,
        "qwen3.block_count": decoder.n_layers,
        "qwen3.feed_forward_length": decoder.ffn_size,
        "qwen3.attention.head_count": decoder.n_heads,
        "qwen3.attention.head_count_kv": decoder.n_kv_heads,
        "qwen3.attention.key_length": decoder.head_dim,
        "qwen3.attention.value_length": decoder.head_dim,
        "qwen3.rope.freq_base": 1e6,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
    }.items():
        assert found[key] == value, key
    assert found["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_an_added_token_that_is_not_special_is_found_in_text(tmp_path: Path) -> None:
    """As the published tokenizer does; special ones are not."""
    checkpoint = copy_checkpoint("tiny-378", tmp_path / "checkpoint", link_weights=True)
    set_key(checkpoint / "tokenizer.json", "added_tokens.5.special", False)
    set_key(checkpoint / "tokenizer.json", "added_tokens.5.content", "<think>")
    folder = export_exact(checkpoint, tmp_path / "bundle")
    tokens = Bundle.open(folder).manifest.tokens
    assert "<think>" not in tokens.special
    assert "<|im_end|>" in tokens.special
    with llama_model(folder / "decoder.gguf", vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        assert llama_tokenize(vocab, "<think>") == [745]
        assert 742 not in llama_tokenize(vocab, "<|im_end|>")

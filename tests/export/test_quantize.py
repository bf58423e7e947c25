"""The quantized decoder: llama.cpp's types, what has to survive them, their process."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from edge_vlm_export import export_checkpoint
from edge_vlm_export.decoder.quantizer import MIXTURES, head_types

from edge_vlm.bundle.manifest import Bundle
from edge_vlm.errors import EdgeVLMError, InputError
from tests.conftest import GOLDEN
from tests.export_helpers import last_logits, llama_model

pytestmark = pytest.mark.engine  # it exports models

# (type of attn_q, of the token table, of the head) for a width that 256 divides, and for 128.
TYPES = {
    "q4_k_m": (("q4_k", "q4_k", "q6_k"), ("q5_0", "q8_0")),
    "q4_0": ((), ("q4_0", "q8_0")),
    "q5_k_m": ((), ("q5_1", "q8_0")),
    "q6_k": ((), ("q8_0", "q8_0")),
    "q8_0": ((), ("q8_0", "q8_0")),
    "iq4_xs": (("iq4_xs", "iq4_xs", "q6_k"), ("iq4_nl", "q8_0")),
}
# Largest error of a tensor, relative to its values (root mean squares), by the type's bits.
ERRORS = {"4": 0.12, "5": 0.06, "6": 0.03, "8": 0.01}


export = partial(export_checkpoint, vision="fp32")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_VLM_THREADS", "1")


def types_of(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("tiny-126-tied", kind) for kind in MIXTURES),
        ("tiny-378", "q4_k_m"),
        ("tiny-378", "iq4_xs"),
    ],
)
def test_every_mixture_is_llama_s(name: str, kind: str, bundle: Callable[..., Path]) -> None:
    path = bundle(name, decoder=kind) / "decoder.gguf"
    found = types_of(path)
    wide, narrow = TYPES[kind]
    asked = ("blk.0.attn_q.weight", "token_embd.weight", "output.weight")
    assert tuple(found[tensor] for tensor in asked if tensor in found) == (
        wide if name == "tiny-378" else narrow
    )
    assert all(found[tensor] == "f32" for tensor in found if "norm" in tensor)
    exact = gguf.GGUFReader(bundle(name, decoder="f32") / "decoder.gguf").tensors
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for tensor in exact:
        other = stored[tensor.name]
        values = gguf.quants.dequantize(other.data, other.tensor_type).reshape(tensor.data.shape)
        error = float(
            np.sqrt(np.square(values - tensor.data).mean() / np.square(tensor.data).mean())
        )
        if found[tensor.name] == "f32":
            assert error == 0, tensor.name
        else:
            digit = found[tensor.name].removeprefix("i")[1]
            assert 1e-4 < error < ERRORS[digit], (tensor.name, found[tensor.name])
    assert Bundle.open(path.parent).manifest.decoder.precision == kind


def test_metadata_and_the_ids_that_are_only_read_survive(bundle: Callable[..., Path]) -> None:
    folders = [bundle("tiny-378", decoder=kind) for kind in ("f32", "q4_k_m")]
    before, after = (gguf.GGUFReader(f / "decoder.gguf").fields for f in folders)
    changed = {"general.file_type", "general.quantization_version", "GGUF.kv_count"}
    assert after.keys() - before.keys() == {"general.quantization_version"}
    for key in before.keys() - changed:
        assert after[key].contents() == before[key].contents(), key
    decoder = Bundle.open(folders[1]).manifest.decoder
    with llama_model(folders[1] / "decoder.gguf", vocab_only=False) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        count = ctypes.c_int32()
        suppressed = llama_cpp.llama_vocab_get_suppress_tokens(vocab, ctypes.byref(count))
        extra = list(range(decoder.vocab_size, decoder.vocab_size + decoder.additional_vocab_size))
        assert suppressed[: count.value] == extra
        logits = last_logits(model, [1, 2, 3, 500])
    # The rows that fill up the head are still copies of the last one, so they never win.
    assert np.allclose(logits[768:], logits[767], atol=1e-5)
    assert np.argmax(logits) < 768


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("tiny-378", {"decoder_head": "q8_0"}, {"output": "q8_0", "token_embd": "q4_k"}),
        ("tiny-378", {"decoder_embedding": "q6_k"}, {"output": "q6_k", "token_embd": "q6_k"}),
        ("tiny-378", {"decoder_head": "f16"}, {"output": "f16", "token_embd": "q4_k"}),
        ("tiny-126-tied", {"decoder_head": "q4_0"}, {"token_embd": "q4_0"}),
        ("tiny-126-tied", {"decoder_embedding": "q6_k"}, {"token_embd": "q8_0"}),  # 128 wide
    ],
)
def test_head_and_token_table_can_be_chosen(
    name: str, options: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    out = export(
        GOLDEN / name / "checkpoint",
        tmp_path / "bundle",
        decoder="q4_k_m",
        measure=False,
        **options,
    )  # type: ignore[arg-type]
    found = types_of(out / "decoder.gguf")
    assert {key: found[f"{key}.weight"] for key in expected} == expected


def test_choices_that_cannot_be_met_are_refused(tmp_path: Path) -> None:
    checkpoint = GOLDEN / "tiny-126-tied" / "checkpoint"
    for options, message in (
        ({"decoder": "q4_k_m", "decoder_head": "q3_k"}, "decoder-head: 'q3_k' is none of"),
        ({"decoder": "f16", "decoder_head": "q8_0"}, "decoder-head: f16 stores every weight alike"),
        (
            {"decoder": "q4_0", "decoder_head": "q8_0", "decoder_embedding": "q4_0"},
            "its token table",
        ),
    ):
        with pytest.raises(InputError, match=message):
            export(checkpoint, tmp_path / "bundle", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_widths_fall_back_as_in_llama() -> None:
    assert head_types(False, 256, "q6_k", "iq4_xs") == ("q6_k", "iq4_xs")
    assert head_types(False, 96, "q6_k", "iq4_xs") == ("q8_0", "iq4_nl")
    assert head_types(False, 48, "q4_k", "q8_0") == ("f16", "f16")
    assert head_types(True, 96, "q4_k", None) == ("q5_0", "q5_0")
    assert head_types(False, 256, None, None) == (None, None)


def test_stopping_while_quantizing_leaves_nothing(tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "quantize":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(GOLDEN / "tiny-378" / "checkpoint", tmp_path / "x", decoder="q4_0", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_the_quantizer_is_one_line(tmp_path: Path) -> None:
    def halve(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and not done:
            (path,) = tmp_path.glob(".x.partial-*/decoder.gguf")
            os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(
        EdgeVLMError, match=r"could not quantize the decoder: .*not within the file"
    ):
        export(
            GOLDEN / "tiny-378" / "checkpoint",
            tmp_path / "x",
            decoder="q4_0",
            measure=False,
            progress=halve,
        )
    assert list(tmp_path.iterdir()) == []


def test_the_types_of_a_mixture_differ(bundle: Callable[..., Path]) -> None:
    """q4_k_m gives some tensors more bits; that is what the report tells."""
    counts = Counter(types_of(bundle("tiny-378", decoder="q4_k_m") / "decoder.gguf").values())
    assert counts == {"q4_k": 20, "q6_k": 3, "f32": 13}

"""A tiny InternVL with InternLM2, in both layouts: the golden model's numbers without biases.

The vocabulary is made up. As in the released one, rows of the SentencePiece model that mean nothing
become special tokens, and others stand behind it.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from tests.conftest import GOLDEN

N_IDS, N_PIECES, N_HEADS, N_KV_HEADS, HEAD_DIM = 571, 562, 4, 2, 32
SOURCE = GOLDEN / "internvl" / "checkpoint"
SPACE = "\u2581"
WORDS = f"{SPACE}the {SPACE}this {SPACE}what there <img img> {SPACE}is ich ein ist {SPACE}to"
ADDED = {
    560: "<|im_end|>",
    561: "<|im_start|>",
    **{562 + index: f"<{text}>" for index, text in enumerate(("img", "/img", "IMG_CONTEXT"))},
    **{565 + index: f"<{text}>" for index, text in enumerate(("quad", "/quad", "ref", "/ref"))},
    569: "<box>",
    570: "</box>",
}
FIRST = {0: "<unk>", 1: "<s>", 2: "</s>"}


def pieces() -> list[tuple[str, float, int]]:
    """Text, score and type (SentencePiece's numbers) of each piece, the best merge first."""
    listed = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    listed += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    made = list(
        dict.fromkeys(word[:end] for word in WORDS.split() for end in range(2, len(word) + 1))
    )
    letters = sorted({*"".join(made), *"abcdefghijklmnopqrstuvwxyz<>/|_IMGCONTEXT.,?!0123456789\n"})
    listed += [(text, -float(index), 1) for index, text in enumerate(made)]
    listed += [(text, -1000.0 - index, 1) for index, text in enumerate(letters)]
    n_unused = N_PIECES - len(listed)
    return listed + [(f"[UNUSED_TOKEN_{index}]", -2000.0, 1) for index in range(n_unused)]


def merges() -> list[tuple[str, str]]:
    """Every pair that makes a piece, in the order of the pieces."""
    texts = {text for text, _, kind in pieces() if kind == 1 and not text.startswith("[")}
    ordered = [text for text, _, kind in pieces() if kind == 1 and text in texts]
    return [
        (text[:cut], text[cut:])
        for text in ordered
        for cut in range(1, len(text))
        if text[:cut] in texts and text[cut:] in texts
    ]


def published_tokenizer() -> Tokenizer:
    """As transformers converts it for this family: no space in front."""
    vocab = {text: index for index, (text, _, _) in enumerate(pieces())}
    for number, text in ADDED.items():
        if number < N_PIECES:  # takes the place of a row that means nothing
            vocab = {text if n == number else old: n for old, n in vocab.items()}
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            merges(),
            unk_token="<unk>",  # noqa: S106
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False)
    texts = [*FIRST.values(), *ADDED.values()]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in texts])
    return tokenizer


def model_proto(**changes: bool) -> bytes:
    """``tokenizer.model``."""

    def varint(value: int) -> bytes:
        out = b""
        while value > 0x7F:
            out += bytes([value & 0x7F | 0x80])
            value >>= 7
        return out + bytes([value])

    def field(number: int, value: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(value)) + value

    def flag(number: int, value: int) -> bytes:
        return varint(number << 3) + varint(value)

    data = b""
    for text, score, kind in pieces():
        body = field(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        data += field(1, body + (flag(3, kind) if kind != 1 else b""))
    data += field(2, flag(3, 2) + flag(35, changes.get("byte_fallback", True)))
    names = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces"}
    flags = b"".join(flag(number, changes.get(name, False)) for number, name in names.items())
    return data + field(3, field(1, b"identity") + flags)


def write_hf(folder: Path) -> Path:
    """transformers' layout, which calls the language model Llama."""
    folder.mkdir()
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((SOURCE / name).read_bytes())
    published_tokenizer().save(str(folder / "tokenizer.json"))
    config = json.loads((SOURCE / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= {"model_type": "llama", "attention_bias": False, "eos_token_id": 560}
    _write(folder, config, {"bos_token": "<s>"}, _tensors())
    return folder


def write_chat(folder: Path) -> Path:
    """The original layout."""
    folder.mkdir()
    original = GOLDEN / "internvl-chat" / "checkpoint"
    (folder / "tokenizer.model").write_bytes(model_proto())
    behind = {text: number for number, text in ADDED.items() if number >= N_PIECES}
    (folder / "added_tokens.json").write_text(json.dumps(behind), encoding="utf-8")
    config = json.loads((original / "config.json").read_text(encoding="utf-8"))
    config["llm_config"] |= {"model_type": "internlm2", "bias": False}
    names = {
        "bos_token": "<s>",
        "added_tokens_decoder": {
            str(number): {"content": text, "special": True, "lstrip": False}
            for number, text in {**FIRST, **ADDED}.items()
        },
    }
    seeing = load_file(original / "model.safetensors")
    tensors = {n: v for n, v in seeing.items() if not n.startswith("language_model.")}
    _write(folder, config, names, tensors | _as_internlm2(_tensors()))
    return folder


def _write(folder: Path, config: Any, names: Any, tensors: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")


def _tensors() -> dict[str, Any]:
    """The golden model's without biases of queries, keys and values."""
    stored = load_file(SOURCE / "model.safetensors")
    return {n: v for n, v in stored.items() if not ("self_attn" in n and n.endswith(".bias"))}


def _as_internlm2(tensors: dict[str, Any]) -> dict[str, Any]:
    """The language model's by InternLM2's names; queries, keys and values of a layer as one."""
    renamed = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
    }
    out = {}
    for name, values in tensors.items():
        if not name.startswith("language_model.") or "self_attn.k" in name or "_attn.v" in name:
            continue
        if "self_attn.q_proj" in name:
            # "(h gs d) dim" of modeling_internlm2.py: gs are the queries of h, its key, its value.
            q, k, v = (tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv")
            width = q.shape[1]
            q = q.reshape(N_KV_HEADS, N_HEADS // N_KV_HEADS, HEAD_DIM, width)
            k, v = (part.reshape(N_KV_HEADS, 1, HEAD_DIM, width) for part in (k, v))
            packed = np.concatenate((q, k, v), axis=1).reshape(-1, width)
            out[name.replace("self_attn.q_proj", "attention.wqkv")] = packed
            continue
        for old, new in renamed.items():
            name = name.replace(old, new)
        out[name] = values
    return out

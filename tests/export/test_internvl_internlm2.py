"""InternVL with InternLM2: its tokenizer, its fused tensors, and what llama.cpp makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from edge_vlm_export import export_checkpoint
from edge_vlm_export.decoder.reference import Reference
from edge_vlm_export.families.internvl.sentencepiece import read_model
from edge_vlm_export.families.opened import Model
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_vlm import EdgeVLM, MachineSettings
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.errors import CheckpointError
from edge_vlm.prompt.builder import TokenSpan
from edge_vlm.prompt.messages import parse_messages
from tests.conftest import GOLDEN, examples
from tests.export.internlm2 import (
    ADDED,
    model_proto,
    published_tokenizer,
    write_chat,
    write_hf,
)
from tests.export.test_tokenizer import LANGUAGES, OTHERS
from tests.export_helpers import (
    edit_json,
    edit_tensors,
    last_logits,
    llama_model,
    llama_tokenize,
    refused,
    set_key,
)

pytestmark = pytest.mark.engine

BADGE = GOLDEN / "internvl" / "images" / "badge_40x38_rgba.png"
LAYOUTS = {"hf": write_hf, "chat": write_chat}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Checkpoint and bundle of each layout."""
    folder = tmp_path_factory.mktemp("internlm2")
    found = {}
    for name, write in LAYOUTS.items():
        checkpoint = write(folder / name)
        bundle = export_checkpoint(
            checkpoint, folder / f"{name}-bundle", vision="fp32", decoder="f32"
        )
        found[name] = checkpoint, bundle
    return found


def test_both_layouts_have_the_same_numbers(made: Any) -> None:
    """The fused tensor is split in the right order: one layout never had it."""
    files = [gguf.GGUFReader(bundle / "decoder.gguf") for _, bundle in made.values()]
    for first, second in zip(*(file.tensors for file in files), strict=True):
        assert first.name == second.name
        np.testing.assert_array_equal(first.data, second.data)
    fields = [{k: f.contents() for k, f in file.fields.items() if "." in k} for file in files]
    differ = {key for key in fields[0] if fields[0][key] != fields[1].get(key)}
    # Scores are places of merges in one and the model's own in the other: the order is the same.
    assert differ == {"general.name", "tokenizer.chat_template", "tokenizer.ggml.scores"}
    manifests = [Bundle.open(bundle).manifest for _, bundle in made.values()]
    for part in ("image_processor", "vision", "decoder", "tokens", "prompt"):
        assert getattr(manifests[0], part) == getattr(manifests[1], part)
    assert (manifests[0].tokens.bos, manifests[0].tokens.stop) == (1, (560,))


@pytest.mark.parametrize("name", LAYOUTS)
def test_llama_cpp_computes_what_the_checkpoint_says(name: str, made: Any) -> None:
    """Rotating neighbours of rows in another order is rotating halves of those stored."""
    checkpoint, bundle = made[name]
    exact = Reference(Model(checkpoint))
    ids = np.random.default_rng(0).integers(3, 571, 90).tolist()
    last = np.arange(len(ids)) == len(ids) - 1
    (hidden,) = exact.run([exact.embed(ids)], [last])
    expected = exact.logits(hidden)[0]
    with llama_model(bundle / "decoder.gguf", vocab_only=False) as model:
        found = last_logits(model, ids)
    assert np.abs(found - expected).max() < 1e-4 * np.ptp(expected)


def test_a_wrong_order_of_the_fused_rows_would_be_seen(made: Any, tmp_path: Path) -> None:
    """What the comparison above is worth: all queries first gives other numbers."""
    checkpoint = write_chat(tmp_path / "checkpoint")

    def reorder(tensors: Any) -> None:
        for key in [key for key in tensors if "wqkv" in key]:
            groups = tensors[key].reshape(2, 4, 32, 128)
            parts = groups[:, :2], groups[:, 2:3], groups[:, 3:]
            tensors[key] = np.concatenate([part.reshape(-1, 128) for part in parts])

    edit_tensors(checkpoint, reorder)
    right, wrong = (Reference(Model(folder)) for folder in (made["chat"][0], checkpoint))
    ids = np.arange(3, 60).tolist()
    last = np.arange(len(ids)) == len(ids) - 1
    scores = [one.logits(one.run([one.embed(ids)], [last])[0]) for one in (right, wrong)]
    assert np.abs(scores[0] - scores[1]).max() > 0.1 * np.ptp(scores[0])


class Both:
    """The published tokenizer and llama.cpp's of each layout."""

    def __init__(self, vocabularies: list[Any]) -> None:
        self.published = published_tokenizer()
        self.published.encode_special_tokens = True
        self.vocabularies = vocabularies

    def check(self, text: str) -> None:
        """All agree."""
        expected = self.published.encode(text, add_special_tokens=False).ids
        for vocab in self.vocabularies:
            assert llama_tokenize(vocab, text) == expected, ascii(text)


@pytest.fixture(scope="module")
def both(made: Any) -> Any:
    import llama_cpp

    files = [bundle / "decoder.gguf" for _, bundle in made.values()]
    with llama_model(files[0], vocab_only=True) as a, llama_model(files[1], vocab_only=True) as b:
        yield Both([llama_cpp.llama_model_get_vocab(model) for model in (a, b)])


@pytest.mark.parametrize("text", [*LANGUAGES.values(), *OTHERS[:-3]], ids=ascii)
def test_texts_have_the_published_ids(text: str, both: Both) -> None:
    both.check(text)


@settings(max_examples=examples(150, 2000), deadline=None)
@given(text=st.text(st.sampled_from("the thiswa<img/>?!. \u2581\u00e9\u4e16\n"), max_size=40))
@example(text="  the there  this<imgx ")
def test_random_texts_have_the_published_ids(text: str, both: Both) -> None:
    if "<img>" not in text:  # that llama.cpp would join to the token
        both.check(text)


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_answer_and_typed_special_tokens(name: str, made: Any) -> None:
    """Two tokens of this vocabulary make <img>, which llama.cpp alone would take for the token."""
    settings_ = MachineSettings(threads=1, kv_type="f32", cache=None)
    with EdgeVLM.load(made[name][1], settings=settings_) as vlm:
        tokenize, special = vlm.engine.decoder.tokenize, vlm.manifest.tokens.special
        assert special["<img>"] in tokenize("a<img>b")
        typed = "<img><img> </img>x<img><IMG_CONTEXT><|im_end|><s></s>"
        spans = vlm.engine.prompts.build(parse_messages([{"role": "user", "content": typed}]))
        ids = [token for span in spans if isinstance(span, TokenSpan) for token in span.ids]
        n_turns = 2 if name == "hf" else 3
        counts = {text: ids.count(token) for text, token in special.items()}
        expected = {"<|im_start|>": n_turns, "<|im_end|>": n_turns - 1, "<s>": 1}
        assert {text: count for text, count in counts.items() if count} == expected
        assert ids[:2] == [1, special["<|im_start|>"]]
        answer = vlm.ask(BADGE, "what is this?", max_tokens=6, loop_guard=False)
        assert (answer.image_tokens, len(answer.token_ids)) == (258, 6)
        with vlm.chat(max_tokens=4) as chat:
            first = chat.ask(BADGE, "what is this?", choices=["a", "b"])
            assert chat.ask((), "and this?").cached_tokens >= first.prompt_tokens


def test_rows_that_mean_nothing_are_unused(made: Any) -> None:
    for checkpoint, _ in made.values():
        tokenizer = Model(checkpoint).tokenizer
        assert tokenizer.tokens[560:563] == ("<|im_end|>", "<|im_start|>", "<img>")
        assert tokenizer.special == {"<s>": 1, "</s>": 2, **{t: n for n, t in ADDED.items()}} | (
            {"<unk>": 0} if "<unk>" in tokenizer.special else {}
        )
        unused = [text for text in tokenizer.tokens if text.startswith("[UNUSED")]
        kinds = {tokenizer.types[tokenizer.tokens.index(text)].name for text in unused}
        assert kinds == {"UNUSED"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"add_dummy_prefix": True}, "add_dummy_prefix is true"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is true"),
        ({"byte_fallback": False}, "byte fallback"),
    ],
)
def test_other_sentencepiece_models_are_refused(
    changes: dict[str, bool], problem: str, tmp_path: Path
) -> None:
    checkpoint = write_chat(tmp_path / "checkpoint")
    (checkpoint / "tokenizer.model").write_bytes(model_proto(**changes))
    refused(checkpoint, "tokenizer.model", problem)


@pytest.mark.parametrize("size", [0, 1, 7, 1000, 9000])
def test_a_damaged_model_file_is_one_line(size: int, tmp_path: Path) -> None:
    checkpoint = write_chat(tmp_path / "checkpoint")
    path = checkpoint / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:size])
    refused(checkpoint, "tokenizer.model", "no SentencePiece model")


def test_a_model_file_that_is_none_is_named(tmp_path: Path) -> None:
    checkpoint = write_chat(tmp_path / "checkpoint")
    path = checkpoint / "tokenizer.model"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="git-lfs pointer"):
        export_checkpoint(checkpoint, tmp_path / "out", vision="fp32", decoder="f32")
    path.unlink()
    refused(checkpoint, "tokenizer.model", "missing")


def test_any_bytes_are_a_model_file_or_one_line(tmp_path: Path) -> None:
    checkpoint = write_chat(tmp_path / "checkpoint")
    path, rng = checkpoint / "tokenizer.model", np.random.default_rng(0)
    whole = bytearray(path.read_bytes())
    for _ in range(200):
        damaged = whole.copy()
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        message = ""
        try:
            read_model(checkpoint, 571, [])
        except CheckpointError as error:
            message = str(error)
        assert len(message.splitlines()) <= 1


@pytest.mark.parametrize(
    ("write", "change", "fragments"),
    [
        (
            write_hf,
            ("tokenizer.json", "pre_tokenizer.prepend_scheme", "first"),
            ("prepend_scheme",),
        ),
        (write_hf, ("tokenizer.json", "model.byte_fallback", False), ("byte_fallback",)),
        (write_hf, ("tokenizer.json", "model.merges.3", ["t", "q"]), ("merges[3]", "two tokens")),
        (
            write_hf,
            ("config.json", "text_config.attention_bias", True),
            ("attention_bias is true",),
        ),
        (write_hf, ("config.json", "text_config.mlp_bias", True), ("mlp_bias is true",)),
        (write_chat, ("config.json", "llm_config.bias", True), ("llm_config.bias is true",)),
        (write_chat, ("added_tokens.json", "<img>", 40), ("<img>", "40")),
    ],
)
def test_what_is_not_supported_is_named(
    write: Callable[[Path], Path],
    change: tuple[str, str, Any],
    fragments: tuple[str, ...],
    tmp_path: Path,
) -> None:
    checkpoint = write(tmp_path / "checkpoint")
    file, key, value = change
    if file == "added_tokens.json":
        edit_json(
            checkpoint / "tokenizer_config.json", lambda data: data.pop("added_tokens_decoder")
        )
    set_key(checkpoint / file, key, value)
    refused(checkpoint, *fragments)


def test_a_missing_merge_is_named(tmp_path: Path) -> None:
    checkpoint = write_hf(tmp_path / "checkpoint")
    edit_json(
        checkpoint / "tokenizer.json", lambda data: data["model"]["merges"].remove(["t", "h"])
    )
    message = refused(checkpoint, "model.merges lacks")
    assert json.dumps(["t", "h"]) in message

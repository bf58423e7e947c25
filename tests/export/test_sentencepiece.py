"""A SentencePiece tokenizer in the GGUF gives the ids of the checkpoint's ``tokenizer.json``.

The checkpoint's side is the ``tokenizers`` library; on the other the space in front of a text is
written out, as the runtime does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from edge_vlm_export.checkpoint.sentencepiece import BYTES, SPACE, read_sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge_vlm.errors import CheckpointError
from tests.conftest import GOLDEN, examples
from tests.export.test_tokenizer import LANGUAGES, OTHERS
from tests.export_helpers import copy_checkpoint, edit_json, llama_model, llama_tokenize

pytestmark = pytest.mark.engine

NAMES = ("llava-1.5", "llava-next")
TYPED = (
    "USER: <image>\nWhat? ASSISTANT:",
    "</s> <s> <unk> <pad> <0x0A> [PAD570] [INST] x [/INST]",
    f"{SPACE}{SPACE}a {SPACE} b",
    "  two  spaces   and   three ",
)


class Pair:
    """Both sides of one tokenizer."""

    def __init__(self, published: Tokenizer, vocab: Any) -> None:
        self.published = published
        # Text that a user typed is text, also when it spells a special token.
        self.published.encode_special_tokens = True
        self.vocab = vocab

    def check(self, text: str) -> None:
        """Both sides agree."""
        expected = self.published.encode(text, add_special_tokens=False).ids
        found = llama_tokenize(self.vocab, f" {text}") if text else []
        assert found == expected, ascii(text)


@pytest.fixture(scope="module")
def pairs(bundle: Callable[..., Path]) -> Iterator[dict[str, Pair]]:
    """Both sides of the golden checkpoints' tokenizers."""
    first, second = NAMES
    with (
        llama_model(bundle(first) / "decoder.gguf", vocab_only=True) as one,
        llama_model(bundle(second) / "decoder.gguf", vocab_only=True) as two,
    ):
        yield {
            name: Pair(
                Tokenizer.from_file(str(GOLDEN / name / "checkpoint" / "tokenizer.json")),
                llama_cpp.llama_model_get_vocab(model),
            )
            for name, model in ((first, one), (second, two))
        }


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A vocabulary of all texts of one to three of six characters: all that can be merged is.

    The golden vocabularies are small: most wrong orders would leave their ids as they are.
    """
    folder = tmp_path_factory.mktemp("probe")
    letters = [SPACE, "a", "b", "é", "漢", "."]
    pieces = [a + b for a in letters for b in letters]
    pieces += [pair + c for pair in pieces for c in letters]
    np.random.default_rng(0).shuffle(pieces)
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces, *letters]
    ids = {text: token for token, text in enumerate(tokens)}
    source = json.loads(
        (GOLDEN / NAMES[0] / "checkpoint" / "tokenizer.json").read_text(encoding="utf-8")
    )
    source["added_tokens"] = source["added_tokens"][:3]
    source["model"]["vocab"] = ids
    source["model"]["merges"] = [
        [text[:place], text[place:]]
        for text in pieces
        for place in sorted(range(1, len(text)), key=lambda place: ids[text[:place]])
    ]
    (folder / "tokenizer.json").write_text(json.dumps(source), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>"}', encoding="utf-8")
    found = read_sentencepiece(folder, len(tokens) + 2, "")
    path = folder / "probe.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(list(found.tokens))
    writer.add_token_scores(list(found.scores))
    writer.add_token_types([int(kind) for kind in found.types])
    writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with llama_model(path, vocab_only=True) as model:
        published = Tokenizer.from_str(json.dumps(source))
        yield Pair(published, llama_cpp.llama_model_get_vocab(model))


@pytest.mark.parametrize("text", [*LANGUAGES.values(), *OTHERS, *TYPED], ids=ascii)
def test_texts_in_many_languages(text: str, pairs: dict[str, Pair], probe: Pair) -> None:
    for pair in (*pairs.values(), probe):
        for variant in (text, text.upper(), f" {text}\n", text.replace(" ", "  ")):
            pair.check(variant)


HARD = st.sampled_from(f"  {SPACE}\n\tabé漢.<>/s0xAB[]thearoui")
ANY = st.characters(exclude_categories=["Cs"])


@settings(max_examples=examples(250, 2000), deadline=None, derandomize=True)
@given(st.lists(st.one_of(HARD, HARD, ANY), max_size=40).map("".join))
@example("<unk></s><s>\n <0x41>")
def test_any_text(pairs: dict[str, Pair], text: str) -> None:
    for pair in pairs.values():
        pair.check(text)


@settings(max_examples=examples(250, 2000), deadline=None, derandomize=True)
@given(st.lists(st.sampled_from("  ab.é漢x"), max_size=30).map("".join))
def test_any_order_of_merges(probe: Pair, text: str) -> None:
    probe.check(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer may be changed."""
    return copy_checkpoint(NAMES[0], tmp_path / "checkpoint", link_weights=True)


def test_what_is_read(folder: Path) -> None:
    found = read_sentencepiece(folder, 576, "")
    assert (found.model, found.bos, found.normalizer, found.merges) == ("llama", 1, None, ())
    assert found.tokens[562:564] == ("[PAD562]", "[PAD563]")
    assert found.special["<image>"] == 560
    known = [score for score in found.scores if score]
    assert known == sorted(known, reverse=True)
    edit_json(folder / "tokenizer_config.json", lambda data: data.update(add_bos_token=False))
    assert read_sentencepiece(folder, 576, "").bos is None


def _merges(data: Any) -> list[Any]:
    merges: list[Any] = data["model"]["merges"]
    return merges


def _token(data: Any, text: str, token: int) -> None:
    data["model"]["vocab"] = {
        t: i for t, i in data["model"]["vocab"].items() if i != token and t != text
    } | {text: token}


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda d: d.update(pre_tokenizer={"type": "Metaspace"}), ("pre_tokenizer is",)),
        (lambda d: d.update(normalizer=None), ("normalizer is missing",)),
        (lambda d: d["normalizer"]["normalizers"].pop(0), ("normalizer.normalizers",)),
        (lambda d: d["normalizer"]["normalizers"][0].update(prepend="_"), ('prepend is "_"',)),
        (lambda d: d["model"].update(byte_fallback=False), ("byte_fallback is false",)),
        (lambda d: d["model"].update(type="Unigram"), ('model.type is "Unigram"', '"BPE"')),
        (lambda d: d["model"].update(ignore_merges=True), ("ignore_merges is true",)),
        (lambda d: d["model"]["vocab"].pop("<0x41>"), ("model.vocab lacks <0x41>",)),
        (lambda d: d["model"]["vocab"].update(x576=576), ("config.json has 576 ids",)),
        (lambda d: d["model"]["vocab"].update(other=300), ("has id 300, which contradicts",)),
        (lambda d: d["added_tokens"][3].update(special=False), ("added_tokens", "special")),
        (lambda d: d["added_tokens"][3].update(lstrip=True), ("lstrip is true",)),
        (lambda d: d["added_tokens"][3].update(id=5), ("<image>", "contradicts")),
        (lambda d: _merges(d).pop(7), ("model.merges lacks", "llama.cpp would join")),
        (lambda d: _merges(d).reverse(), ("out of the order of the ids",)),
        (lambda d: _merges(d).append(["a", "~~"]), ("expected two tokens",)),
        (lambda d: _token(d, "<s", 400) or _merges(d).clear(), ("model.merges lacks",)),
    ],
)
def test_another_kind_is_refused(
    folder: Path, change: Callable[[Any], Any], fragments: tuple[str, ...]
) -> None:
    edit_json(folder / "tokenizer.json", change)
    with pytest.raises(CheckpointError) as caught:
        read_sentencepiece(folder, 576, "")
    message = str(caught.value)
    assert message.startswith(str(folder / "tokenizer.json"))
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    for fragment in fragments:
        assert fragment in message


def test_typed_text_never_becomes_a_special_token(folder: Path) -> None:
    """A vocabulary in which "<s" and ">" are tokens would make "<s>" of typed text."""
    merges = [["s", ">"]]

    def change(data: Any) -> None:
        vocab = data["model"]["vocab"]
        data["model"]["merges"] = merges
        keep = {t: i for t, i in vocab.items() if i < 259 or len(t) == 1}
        data["model"]["vocab"] = keep | {"s>": 259, ">": 300}

    edit_json(folder / "tokenizer.json", change)
    with pytest.raises(CheckpointError, match=r"would also find \S*<s>\S* in text that a user"):
        read_sentencepiece(folder, 576, "")


def test_a_normalized_special_token_is_none_of_the_template(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", lambda d: d["added_tokens"][2].update(normalized=True))
    assert read_sentencepiece(folder, 576, "USER: {{ x }}").special["</s>"] == 2
    with pytest.raises(CheckpointError, match="</s> is normalized and in the chat template"):
        read_sentencepiece(folder, 576, "{{ x }}</s> ")

"""The GGUF's tokenizer gives the ids of the checkpoint's ``tokenizer.json``.

The checkpoint's side is the ``tokenizers`` library; llama.cpp's side is given NFC text where the
checkpoint normalizes, as the runtime does. Known differences, all in llama.cpp's older Unicode
tables, are tested as such at the end: they concern scripts that Unicode 16 added in 2024, and one
archaic letter.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from edge_vlm_export.checkpoint.tokenizer import SPLITS, byte_alphabet
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.conftest import GOLDEN, GOLDEN_NAMES, examples, golden_cases
from tests.export_helpers import llama_model, llama_tokenize

pytestmark = pytest.mark.engine

# Letters and digits that Unicode 16 added, in blocks; llama.cpp does not know them yet.
UNICODE_16 = (
    (0x1C89, 0x1C8A),
    (0xA7CB, 0xA7DC),
    (0x105C0, 0x105F3),
    (0x10D40, 0x10D85),
    (0x10EC2, 0x10EC4),
    (0x11380, 0x113D3),
    (0x116D0, 0x116E3),
    (0x11BC0, 0x11BF9),
    (0x13460, 0x143FA),
    (0x16100, 0x16139),
    (0x16D40, 0x16D79),
    (0x18CFF, 0x18CFF),
    (0x1CCF0, 0x1CCF9),
    (0x1E5D0, 0x1E5FA),
)
LONG_S = "\u017f"  # matches (?i:s) in the published rule, not in llama.cpp's

LANGUAGES = {
    "ar": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق؛ ٢٠٢٤.",
    "bg": "Всички хора се раждат свободни и равни по достойнство и права.",
    "bn": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "cs": "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv.",
    "da": "Alle mennesker er født frie og lige i værdighed og rettigheder.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Straße, Größe!",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.",
    "en": "All human beings aren't born at 12:30; they're FREE, I'd say, and WE'LL see.",
    "es": "¿Todos los seres humanos nacen libres? ¡Sí! Año 1948, señor.",
    "fa": "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت با هم برابرند ۱۲۳.",
    "fi": "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan.",
    "fr": "L'été, tous les êtres humains naissent libres et égaux : c'est « ça ».",
    "he": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "hu": "Minden emberi lény szabadon születik és egyenlő méltósága van.",
    "id": "Semua orang dilahirkan merdeka dan mempunyai martabat yang sama.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali; l'80% è così.",
    "ja": "すべての人間は、生まれながらにして自由であり、カナも１２３も。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "nl": "Alle mensen worden vrij en gelijk in waardigheid geboren, 's avonds.",
    "no": "Alle mennesker er født frie og med samme menneskeverd, på øya.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem godności, żółć.",
    "pt": "Todos os seres humanos nascem livres; não há exceção, coração.",
    "ro": "Toate ființele umane se nasc libere și egale în demnitate și în drepturi.",
    "ru": "Все люди рождаются свободными и равными; ещё 3 ёлки №5.",
    "sv": "Alla människor är födda fria och lika i värde och rättigheter.",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์ ๑๒๓",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. İIıi",
    "uk": "Всі люди народжуються вільними і рівними у своїй гідності, їжак.",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm.",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。",
}
OTHERS = (
    "",
    " ",
    "   \t\t  x  \n\n   y \r\n\r\n z\u3000\u00a0 ",
    "def f(x: int) -> str:\n    return f'{x!r}'  # it's\n\n\nclass A:\n\tpass\n",
    '{"a": [1, 2.5e-3], "b": null}\r\n<div class="x">&amp;</div> && || !== => ::',
    "0123456789 1,234,567.89 ½ ² Ⅷ ٣ 5th 3D",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600\U0001f3fd \u2764\ufe0f 1\ufe0f\u20e3",
    "\U0001f1e9\U0001f1ea",
    "e\u0301 \u00e9 A\u030a \u212b \ufb01 \u1112\u1161\u11ab \u0958 \u0915\u093c",
    "I'm you're we've he'll she'd it's DON'T 'S 'Re ''s x's's 'sx ' s 'LL 'Ll",
    "<|im_end|> <im_patch> <|image|> <|endoftext|>|<EXTRA_TOKENS_0>|",
    "\ufeff\u200b\u200c\u200d\u2028\u2029\u0085\x00\x01\x7f\ufffd\uffff\U0010ffff",
    "[PAD800] \u0120a \u010a",
)


class Pair:
    """Both sides of one tokenizer."""

    def __init__(self, published: Tokenizer, vocab: Any) -> None:
        self.published = published
        # Text that a user typed is text, also when it spells a special token.
        self.published.encode_special_tokens = True
        self.vocab = vocab

    def ids(self, text: str) -> tuple[list[int], list[int]]:
        """(published ids, llama.cpp's ids)."""
        published = self.published.encode(text, add_special_tokens=False).ids
        if self.published.normalizer:
            text = unicodedata.normalize("NFC", text)
        return published, llama_tokenize(self.vocab, text)

    def check(self, text: str) -> None:
        """Both sides agree."""
        published, found = self.ids(text)
        assert found == published, ascii(text)


@pytest.fixture(scope="module")
def pairs(bundle: Callable[..., Path]) -> Iterator[dict[str, Pair]]:
    """Both sides of the golden checkpoints' tokenizers."""
    first, second = GOLDEN_NAMES
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
    """See ``probing``; the rule is Qwen2's."""
    with probing(GOLDEN_NAMES[0], "qwen2", tmp_path_factory.mktemp("probe")) as pair:
        yield pair


@contextmanager
def probing(golden: str, rule: str, folder: Path) -> Iterator[Pair]:
    """A tokenizer whose merges join any two bytes, so that nearly every wrong split shows.

    The golden vocabularies are small: most wrong splits would leave their ids as they are.
    """
    letters = byte_alphabet()
    pieces = [[a, b] for a in letters for b in letters]
    np.random.default_rng(0).shuffle(pieces)
    tokens = letters + ["".join(pair) for pair in pieces]
    source = json.loads(
        (GOLDEN / golden / "checkpoint" / "tokenizer.json").read_text(encoding="utf-8")
    )
    assert source["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == SPLITS[rule][0]
    source["added_tokens"] = []
    source["model"]["vocab"] = {token: index for index, token in enumerate(tokens)}
    source["model"]["merges"] = pieces
    path = folder / "probe.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(8)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(pair) for pair in pieces])
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with llama_model(path, vocab_only=True) as model:
        published = Tokenizer.from_str(json.dumps(source))
        yield Pair(published, llama_cpp.llama_model_get_vocab(model))


@pytest.mark.parametrize("text", [*LANGUAGES.values(), *OTHERS], ids=ascii)
def test_texts_in_many_languages(text: str, pairs: dict[str, Pair], probe: Pair) -> None:
    for pair in (*pairs.values(), probe):
        for variant in (text, unicodedata.normalize("NFD", text), text.upper(), text + "\n"):
            pair.check(variant)


@pytest.mark.parametrize("case", golden_cases(), ids=str)
def test_golden_prompts(case: Any, pairs: dict[str, Pair]) -> None:
    prompt = case.data["prompt"]
    pairs[case.model].check(prompt)
    if not case.images:
        bos, *ids = case.arrays["input_ids"].tolist()
        assert llama_tokenize(pairs[case.model].vocab, prompt) == ids
        assert bos == {"tiny-378": 740, "tiny-126-tied": 694}[case.model]


def _is_known(character: str) -> bool:
    """Not one of the known differences, nor newer than this Python's Unicode tables."""
    code = ord(character)
    new = any(first <= code <= last for first, last in UNICODE_16)
    return not new and character != LONG_S and unicodedata.category(character) != "Cn"


HARD = st.sampled_from(
    " \t\n\r\x0b\x1c\x85\xa0\u2003\u2028\u3000\u200b\u200d\ufeff'''\u2019stmdrevlSTMDREVL"
    "\u212aK1\u00b2\u0663.,-!<|>/aA\u00e9e\u0301\u0903\u6f22\u304b\uc544\u1112\u1161\U0001f600"
)
ANY = st.characters(exclude_categories=["Cs"]).filter(_is_known)
TEXT = st.lists(st.one_of(HARD, HARD, ANY), max_size=40).map("".join)


@settings(max_examples=examples(250, 2000), deadline=None, derandomize=True)
@given(TEXT)
@example("!'s 's\n\n  \n 1's")
def test_any_text(pairs: dict[str, Pair], probe: Pair, text: str) -> None:
    for pair in (*pairs.values(), probe):
        pair.check(text)


@pytest.mark.parametrize("context", ["a{}a", "1{}1", " {}! ", "'{}", "{0}{0}'s", "\n{}\n"])
def test_every_character_of_the_basic_plane(context: str, probe: Pair) -> None:
    characters = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    texts = [unicodedata.normalize("NFC", context.format(c)) for c in filter(_is_known, characters)]
    for text, expected in zip(texts, probe.published.encode_batch(texts), strict=True):
        assert llama_tokenize(probe.vocab, text) == expected.ids, ascii(text)


@pytest.fixture(scope="module")
def pixtral(
    bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Pair]]:
    """Llama 3's rule: the golden Pixtral's tokenizer, and a probe."""
    published = Tokenizer.from_file(str(GOLDEN / "pixtral/checkpoint/tokenizer.json"))
    with (
        llama_model(bundle("pixtral") / "decoder.gguf", vocab_only=True) as model,
        probing("pixtral", "pixtral", tmp_path_factory.mktemp("probe")) as probe,
    ):
        yield [Pair(published, llama_cpp.llama_model_get_vocab(model)), probe]


@pytest.mark.parametrize("text", [*LANGUAGES.values(), *OTHERS], ids=ascii)
def test_texts_with_llama_3_s_rule(text: str, pixtral: list[Pair]) -> None:
    for pair in pixtral:
        for variant in (text, unicodedata.normalize("NFD", text), text.upper(), text + "\n"):
            pair.check(variant)


@settings(max_examples=examples(250, 2000), deadline=None, derandomize=True)
@given(TEXT)
@example("1234567 12 ½½½½ 1a2 \u0663\u0663\u0663\u0663")
def test_any_text_with_llama_3_s_rule(pixtral: list[Pair], text: str) -> None:
    for pair in pixtral:
        pair.check(text)


@pytest.mark.parametrize("context", ["a{}a", "1{0}{0}{0}1", "'{}", "{0}{0}'s"])
def test_every_character_with_llama_3_s_rule(context: str, pixtral: list[Pair]) -> None:
    probe = pixtral[1]
    characters = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    texts = [context.format(character) for character in filter(_is_known, characters)]
    for text, expected in zip(texts, probe.published.encode_batch(texts), strict=True):
        assert llama_tokenize(probe.vocab, text) == expected.ids, ascii(text)


def test_known_differences_are_still_there(probe: Pair) -> None:
    """When this fails, llama.cpp or tokenizers changed: shorten or extend the lists above."""
    texts = [f"'{LONG_S}{letter}" for letter in "abcdefgh"]
    assert any(a != b for a, b in map(probe.ids, texts))
    for first, _ in UNICODE_16:
        texts = [pattern.format(chr(first)) for pattern in ("a{}a", "1{}1", "{0}{0}'s", " {}! ")]
        assert any(a != b for a, b in map(probe.ids, texts)), hex(first)

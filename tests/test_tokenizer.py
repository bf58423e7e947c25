"""llama.cpp's tokenizer on the exported GGUF against ``tokenizers`` on the checkpoint."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge_vlm.bundle import Bundle
from edge_vlm.decoder import Decoder
from tests.conftest import GOLDEN, GOLDEN_NAMES

SENTENCES = [
    "What is the total on this receipt?",
    "Wie hoch ist der Gesamtbetrag?",
    "¿Cuál es el total de la cuenta?",
    "Quel est le prix de l'article ?",
    "Qual è il totale dello scontrino?",
    "Quanto custa a maçã?",
    "Hoeveel kost het brood?",
    "Hur mycket kostar mjölken?",
    "Hvor meget koster kaffen på kvitteringen?",
    "Kuinka paljon leipä maksaa?",
    "Ile kosztuje chleb żytni?",
    "Kolik stojí mléko?",
    "Mennyibe kerül a tej?",
    "Cât costă pâinea?",
    "Колко струва хлябът?",
    "Сколько стоит молоко?",
    "Скільки коштує їжа?",
    "Πόσο κοστίζει το ψωμί;",
    "Ekmek ne kadar? İstanbul'da ıslak",
    "كم سعر الخبز؟ ١٢٣",
    "כמה עולה הלחם?",
    "این نان چند است؟ ۴۵۶",
    "रोटी का दाम कितना है?",
    "রুটির দাম কত?",
    "ขนมปังราคาเท่าไหร่",
    "Bánh mì giá bao nhiêu?",
    "Berapa harga roti itu?",
    "这张收据的总额是多少？",
    "パンはいくらですか？",
    "빵은 얼마예요?",
]
PIECES = [
    *SENTENCES,
    *("    ", "\n\n", "\t", " \r\n ", "\u00a0", "\u3000", "\u200b", "  x", "x  ", "\n x"),
    *("def f(x):\n    return x**2  # ok\n", "<a href='x'>&amp;</a>", "{'k': [1, 2.5e-3]}"),
    *("0", "12", "345", "1234567890", "3.14159", "½", "²", "Ⅷ", "٣", "一二三"),
    *("I'm", "WE'LL", "it'S", "they've", "don't", "'re", "O’Neil", "''", "'"),
    *("😀", "👩‍👩‍👧‍👦", "🇩🇪", "✈️", "e\u0301", "A\u030a", "\u1112\u1161\u11ab", "ﬁ", "Å", "ẛ̣"),
    *("<|im_end|>", "<|endoftext|>", "<im_patch>", "<|image|>", "|<EXTRA_TOKENS_0>|", "<", "|"),
]


@pytest.fixture(scope="module", params=GOLDEN_NAMES)
def pair(
    request: pytest.FixtureRequest, bundle: Callable[..., Path]
) -> Iterator[tuple[Callable[[str], list[int]], Callable[[str], list[int]]]]:
    """(ids by llama.cpp, ids by tokenizers), special tokens being plain text in both."""
    opened = Bundle.open(bundle(request.param))
    decoder = Decoder(opened, threads=1, batch_size=8, kv_type="f16")
    path = GOLDEN / request.param / "checkpoint" / "tokenizer.json"
    reference = Tokenizer.from_file(str(path))
    reference.encode_special_tokens = True  # as text, like parse_special = false
    yield (
        lambda text: decoder.tokenize(unicodedata.normalize("NFC", text)),
        lambda text: reference.encode(text, add_special_tokens=False).ids,
    )
    decoder.close()


Pair = tuple[Callable[[str], list[int]], Callable[[str], list[int]]]


def test_languages_code_spaces_and_emoji(pair: Pair) -> None:
    ours, reference = pair
    for text in PIECES:
        assert ours(text) == reference(text), repr(text)


def test_thousands_of_mixed_strings(pair: Pair) -> None:
    ours, reference = pair
    rng = random.Random(5)
    for _ in range(3000):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 6)))
        start = rng.randrange(len(text))
        text = text[start : start + rng.randint(1, 80)]
        assert ours(text) == reference(text), repr(text)


@settings(max_examples=1500, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cn"]), max_size=40))
def test_any_text(pair: Pair, text: str) -> None:
    ours, reference = pair
    assert ours(text) == reference(text)

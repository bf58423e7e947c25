# ruff: noqa: SIM905
"""Words that are printed in the pictures."""

from __future__ import annotations

import random
import string

WORDS = (
    "open closed exit sale hotel bakery coffee taxi bus stop park school museum station platform"
    " ticket price garden kitchen bridge street river lake ocean forest summer winter spring autumn"
    " north south east west apple orange lemon cherry banana grape bread butter cheese milk sugar"
    " salt pepper tomato potato onion carrot salad soup pizza pasta rice fish meat egg water juice"
    " tea wine beer music dance theatre cinema art book paper pencil letter stamp parcel"
    " phone radio"
    " light power energy engine wheel motor train plane boat ship car bike walk run jump swim"
    " monday tuesday friday sunday january april june july august october red green blue black"
    " white"
    " small large big new old hot cold fast slow high low left right push pull in out up"
    " down yes no"
    " hello welcome thanks please danger caution warning notice private public free full empty"
    " doctor nurse dentist pharmacy hospital police bank post market shop store office garage"
    " table chair window door floor wall roof stairs lift room house home city village country"
    " dog cat horse bird cow sheep pig mouse lion tiger bear wolf fox rabbit duck goose"
    " gold silver iron copper glass stone wood metal cotton wool silk leather"
    " straße brücke schule bäcker käse brot milch wasser größe tür ausgang eingang offen zu"
    " apotheke bahnhof markt küche garten kirche schloss müller grün weiß früh spät"
    " calle plaza playa salida entrada abierto cerrado señor niño mañana café leche queso agua pan"
    " fruta verano invierno ciudad puente corazón música jardín estación aquí allí más"
    " rue place gare sortie entrée ouvert fermé école théâtre musée forêt crème fromage pain lait"
    " eau été hiver château fenêtre hôtel île garçon leçon noël fête bière marché poste"
)

LABELS = (
    "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec Mon Tue Wed Thu Fri Sat Sun A B C D E F G H"
    " K M P Q1 Q2 Q3 Q4 Rome Paris Oslo Bern Lima Cairo Tokyo Kyiv Tea Milk Rice Corn Wheat Beans"
    " Cats Dogs Birds Fish Bus Car Train Bike Red Blue Ana Ben Eva Leo Max Mia Tom Zoe North South"
    " East West 2019 2020 2021 2022 2023 2024 2025 2026"
).split()

ITEMS = (
    "Coffee Tea Milk Bread Butter Cheese Eggs Rice Pasta Sugar Salt Apples Pears Grapes Lemons"
    " Bananas Soup Salad Pizza Burger Fries Cake Cookie Muffin Juice Water Cola Wine Beer Honey Jam"
    " Yogurt Cream Flour Fish Ham Nuts Beans Corn Onions Potatoes Tomatoes Pen Paper Book Card Cup"
    " Plate Soap Lamp Batteries Candle Brot Käse Milch Wurst Kuchen Pan Queso Leche Café Pain Lait"
    " Crêpe Thé"
).split()
ITEMS = [item for item in ITEMS if len(item) <= 8]

SHOPS = (
    "MARKET BAKERY BISTRO CAFE KIOSK SHOP STORE DELI GRILL BAR HOTEL GARDEN CORNER CITY SUN STAR"
).split()

_CODE = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
_VOWELS = "aeiou"


def printed_word(rng: random.Random) -> str:
    """A word or number of 1 to 8 characters: lexicon words, made-up words, numbers and codes."""
    kind = rng.random()
    if kind < 0.5:
        word = rng.choice(_LEXICON)
        return rng.choice((word, word.upper(), word.upper(), word.capitalize()))
    if kind < 0.62:
        word = ""
        while len(word) < rng.randint(3, 7):
            word += rng.choice(_CONSONANTS) + rng.choice(_VOWELS)
        word = word[:8]
        return rng.choice((word.upper(), word.capitalize(), word))
    if kind < 0.85:
        return printed_number(rng)
    return "".join(rng.choice(_CODE) for _ in range(rng.randint(1, 6)))


def printed_number(rng: random.Random) -> str:
    """Whole numbers, prices and times."""
    kind = rng.random()
    if kind < 0.6:
        n_digits = rng.choice((1, 2, 2, 3, 3, 4, 4, 5))
        return str(rng.randint(10 ** (n_digits - 1) if n_digits > 1 else 0, 10**n_digits - 1))
    if kind < 0.8:
        return f"{rng.randint(0, 99)}.{rng.randint(0, 99):02d}"
    return f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}"


_LEXICON = sorted({word for word in WORDS.split() if len(word) <= 8})
_CONSONANTS = "".join(c for c in string.ascii_lowercase if c not in _VOWELS + "qxy")

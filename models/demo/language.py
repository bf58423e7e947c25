# ruff: noqa: SIM905, E501
"""The words of the demo model: names of things and colours, and how to ask, in six languages."""

from __future__ import annotations

from typing import NamedTuple

LANGUAGES = ("en", "de", "es", "fr", "zh", "ar")


class Noun(NamedTuple):
    """A thing's name in one language; `gender` is m, f or n ("" where it does not matter)."""

    one: str
    many: str
    gender: str = ""


class Colour(NamedTuple):
    """A colour's name; the agreeing forms are equal where the language does not inflect it."""

    masculine: str
    feminine: str
    masculine_many: str
    feminine_many: str


def _nouns(table: str) -> dict[str, dict[str, Noun]]:
    nouns: dict[str, dict[str, Noun]] = {}
    for line in table.strip().splitlines():
        key, *cells = (cell.strip() for cell in line.split("|"))
        names = {"en": Noun(key, cells[0])}
        for language, cell in zip(LANGUAGES[1:], cells[1:], strict=True):
            words = cell.split(",")
            if language == "zh":
                names[language] = Noun(words[0], words[0])
            else:
                names[language] = Noun(words[0], words[1], words[2])
        nouns[key] = names
    return nouns


NOUNS = _nouns("""
circle | circles | Kreis,Kreise,m | círculo,círculos,m | cercle,cercles,m | 圆形 | دائرة,دوائر,f
square | squares | Quadrat,Quadrate,n | cuadrado,cuadrados,m | carré,carrés,m | 正方形 | مربع,مربعات,m
triangle | triangles | Dreieck,Dreiecke,n | triángulo,triángulos,m | triangle,triangles,m | 三角形 | مثلث,مثلثات,m
star | stars | Stern,Sterne,m | estrella,estrellas,f | étoile,étoiles,f | 星形 | نجمة,نجوم,f
heart | hearts | Herz,Herzen,n | corazón,corazones,m | cœur,cœurs,m | 心形 | قلب,قلوب,m
diamond | diamonds | Raute,Rauten,f | rombo,rombos,m | losange,losanges,m | 菱形 | معين,معينات,m
cross | crosses | Kreuz,Kreuze,n | cruz,cruces,f | croix,croix,f | 十字形 | صليب,صلبان,m
ring | rings | Ring,Ringe,m | anillo,anillos,m | anneau,anneaux,m | 圆环 | حلقة,حلقات,f
cup | cups | Tasse,Tassen,f | taza,tazas,f | tasse,tasses,f | 杯子 | كوب,أكواب,m
bottle | bottles | Flasche,Flaschen,f | botella,botellas,f | bouteille,bouteilles,f | 瓶子 | زجاجة,زجاجات,f
book | books | Buch,Bücher,n | libro,libros,m | livre,livres,m | 书 | كتاب,كتب,m
ball | balls | Ball,Bälle,m | pelota,pelotas,f | ballon,ballons,m | 球 | كرة,كرات,f
lamp | lamps | Lampe,Lampen,f | lámpara,lámparas,f | lampe,lampes,f | 台灯 | مصباح,مصابيح,m
box | boxes | Kiste,Kisten,f | caja,cajas,f | boîte,boîtes,f | 盒子 | صندوق,صناديق,m
house | houses | Haus,Häuser,n | casa,casas,f | maison,maisons,f | 房子 | بيت,بيوت,m
car | cars | Auto,Autos,n | coche,coches,m | voiture,voitures,f | 汽车 | سيارة,سيارات,f
tree | trees | Baum,Bäume,m | árbol,árboles,m | arbre,arbres,m | 树 | شجرة,أشجار,f
boat | boats | Boot,Boote,n | barco,barcos,m | bateau,bateaux,m | 船 | قارب,قوارب,m
object | objects | Objekt,Objekte,n | objeto,objetos,m | objet,objets,m | 物体 | شيء,أشياء,m
""")

COLOURS: dict[str, dict[str, Colour]] = {
    "en": {
        name: Colour(name, name, name, name)
        for name in "red orange yellow green blue purple pink brown black white".split()
    },
    "de": {  # the stem; endings are added in `_german`
        "red": Colour("rot", "", "", ""),
        "orange": Colour("orange", "", "", ""),
        "yellow": Colour("gelb", "", "", ""),
        "green": Colour("grün", "", "", ""),
        "blue": Colour("blau", "", "", ""),
        "purple": Colour("lila", "", "", ""),
        "pink": Colour("rosa", "", "", ""),
        "brown": Colour("braun", "", "", ""),
        "black": Colour("schwarz", "", "", ""),
        "white": Colour("weiß", "", "", ""),
    },
    "es": {
        "red": Colour("rojo", "roja", "rojos", "rojas"),
        "orange": Colour("naranja", "naranja", "naranjas", "naranjas"),
        "yellow": Colour("amarillo", "amarilla", "amarillos", "amarillas"),
        "green": Colour("verde", "verde", "verdes", "verdes"),
        "blue": Colour("azul", "azul", "azules", "azules"),
        "purple": Colour("morado", "morada", "morados", "moradas"),
        "pink": Colour("rosa", "rosa", "rosas", "rosas"),
        "brown": Colour("marrón", "marrón", "marrones", "marrones"),
        "black": Colour("negro", "negra", "negros", "negras"),
        "white": Colour("blanco", "blanca", "blancos", "blancas"),
    },
    "fr": {
        "red": Colour("rouge", "rouge", "rouges", "rouges"),
        "orange": Colour("orange", "orange", "orange", "orange"),
        "yellow": Colour("jaune", "jaune", "jaunes", "jaunes"),
        "green": Colour("vert", "verte", "verts", "vertes"),
        "blue": Colour("bleu", "bleue", "bleus", "bleues"),
        "purple": Colour("violet", "violette", "violets", "violettes"),
        "pink": Colour("rose", "rose", "roses", "roses"),
        "brown": Colour("marron", "marron", "marron", "marron"),
        "black": Colour("noir", "noire", "noirs", "noires"),
        "white": Colour("blanc", "blanche", "blancs", "blanches"),
    },
    "zh": {
        name: Colour(word, word, word, word)
        for name, word in zip(
            "red orange yellow green blue purple pink brown black white".split(),
            "红色 橙色 黄色 绿色 蓝色 紫色 粉色 棕色 黑色 白色".split(),
            strict=True,
        )
    },
    "ar": {  # the plural of things takes the feminine singular
        "red": Colour("أحمر", "حمراء", "حمراء", "حمراء"),
        "orange": Colour("برتقالي", "برتقالية", "برتقالية", "برتقالية"),
        "yellow": Colour("أصفر", "صفراء", "صفراء", "صفراء"),
        "green": Colour("أخضر", "خضراء", "خضراء", "خضراء"),
        "blue": Colour("أزرق", "زرقاء", "زرقاء", "زرقاء"),
        "purple": Colour("بنفسجي", "بنفسجية", "بنفسجية", "بنفسجية"),
        "pink": Colour("وردي", "وردية", "وردية", "وردية"),
        "brown": Colour("بني", "بنية", "بنية", "بنية"),
        "black": Colour("أسود", "سوداء", "سوداء", "سوداء"),
        "white": Colour("أبيض", "بيضاء", "بيضاء", "بيضاء"),
    },
}

_GERMAN_FIXED = ("lila", "rosa")
_FRENCH_VOWELS = "aeiouéœâh"


def colour_name(language: str, colour: str) -> str:
    """The colour as an answer of its own: "red", "rot", "红色"."""
    return COLOURS[language][colour].masculine


def noun_name(language: str, noun: str) -> str:
    """The thing as an answer of its own: "star", "Stern", "星形"."""
    return NOUNS[noun][language].one


def _german(form: str, noun: Noun, colour: str | None) -> str:
    word = noun.many if form == "many" else noun.one
    article, ending = {
        "the": ({"m": "der ", "f": "die ", "n": "das "}[noun.gender], "e"),
        "of": ({"m": "dem ", "f": "der ", "n": "dem "}[noun.gender], "en"),
        "a": (
            {"m": "ein ", "f": "eine ", "n": "ein "}[noun.gender],
            {"m": "er", "f": "e", "n": "es"}[noun.gender],
        ),
        "many": ("", "e"),
    }[form]
    if colour is None:
        return f"{article}{word}"
    stem = COLOURS["de"][colour].masculine
    if stem not in _GERMAN_FIXED:
        stem = stem.removesuffix("e") + ending
    return f"{article}{stem} {word}"


def _agreeing(language: str, form: str, noun: Noun, colour: str | None) -> str:
    """The colour that agrees with the noun in Spanish, French and Arabic, or ""."""
    if colour is None:
        return ""
    forms = COLOURS[language][colour]
    if form == "many":
        return forms.feminine_many if noun.gender == "f" else forms.masculine_many
    return forms.feminine if noun.gender == "f" else forms.masculine


def phrase(language: str, form: str, noun: str, colour: str | None = None) -> str:
    """A noun with its article and colour.

    `form` is "the" (the red star), "of" (the same after "left of", "above" and so on), "a"
    (a red star) or "many" (red stars; after "how many").
    """
    name = NOUNS[noun][language]
    if language == "de":
        return _german(form, name, colour)
    if language == "zh":
        return f"{COLOURS['zh'][colour].masculine}的{name.one}" if colour else name.one
    agreeing = _agreeing(language, form, name, colour)
    if language == "ar":
        if form == "a":
            return f"{name.one} {agreeing}".strip()
        word = name.many if form == "many" else name.one
        return f"ال{word} ال{agreeing}" if agreeing else f"ال{word}"
    if language == "en":
        word = name.many if form == "many" else name.one
        words = f"{colour} {word}" if colour else word
        if form == "many":
            return words
        if form == "a":
            return f"an {words}" if words[0] in "aeiou" else f"a {words}"
        return f"the {words}"
    word = name.many if form == "many" else name.one
    words = f"{word} {agreeing}".strip()
    feminine = name.gender == "f"
    if language == "es":
        article = {
            "the": "la " if feminine else "el ",
            "of": "de la " if feminine else "del ",
            "a": "una " if feminine else "un ",
            "many": "",
        }[form]
        return article + words
    elided = word[0] in _FRENCH_VOWELS and not word.startswith("h")
    article = {
        "the": "l'" if elided else ("la " if feminine else "le "),
        "of": "de l'" if elided else ("de la " if feminine else "du "),
        "a": "une " if feminine else "un ",
        "many": "d'" if elided else "de ",
    }[form]
    return article + words


def how_many(language: str, noun: str) -> str:
    """Spanish "how many" agrees with its noun; the other languages have one word."""
    if language != "es":
        return ""
    return "Cuántas" if NOUNS[noun]["es"].gender == "f" else "Cuántos"


ANSWERS: dict[str, dict[str, str]] = {
    "yes": {"en": "yes", "de": "ja", "es": "sí", "fr": "oui", "zh": "是", "ar": "نعم"},
    "no": {"en": "no", "de": "nein", "es": "no", "fr": "non", "zh": "不是", "ar": "لا"},
    "present": {"en": "yes", "de": "ja", "es": "sí", "fr": "oui", "zh": "有", "ar": "نعم"},
    "absent": {"en": "no", "de": "nein", "es": "no", "fr": "non", "zh": "没有", "ar": "لا"},
    "left": {
        "en": "left",
        "de": "links",
        "es": "a la izquierda",
        "fr": "à gauche",
        "zh": "左边",
        "ar": "على اليسار",
    },
    "right": {
        "en": "right",
        "de": "rechts",
        "es": "a la derecha",
        "fr": "à droite",
        "zh": "右边",
        "ar": "على اليمين",
    },
    "above": {
        "en": "above",
        "de": "darüber",
        "es": "arriba",
        "fr": "au-dessus",
        "zh": "上面",
        "ar": "فوق",
    },
    "below": {
        "en": "below",
        "de": "darunter",
        "es": "abajo",
        "fr": "en dessous",
        "zh": "下面",
        "ar": "تحت",
    },
}

# {side} of a yes/no question about two things, in front of the second thing
SIDES: dict[str, dict[str, str]] = {
    "left": {
        "en": "to the left of",
        "de": "links von",
        "es": "a la izquierda",
        "fr": "à gauche",
        "zh": "左边",
        "ar": "على يسار",
    },
    "right": {
        "en": "to the right of",
        "de": "rechts von",
        "es": "a la derecha",
        "fr": "à droite",
        "zh": "右边",
        "ar": "على يمين",
    },
    "above": {
        "en": "above",
        "de": "über",
        "es": "encima",
        "fr": "au-dessus",
        "zh": "上面",
        "ar": "فوق",
    },
    "below": {
        "en": "below",
        "de": "unter",
        "es": "debajo",
        "fr": "en dessous",
        "zh": "下面",
        "ar": "تحت",
    },
}

# where in the picture a word or a thing is
PLACES: dict[str, dict[str, str]] = {
    "left": {
        "en": "on the left",
        "de": "links",
        "es": "a la izquierda",
        "fr": "à gauche",
        "zh": "最左边",
        "ar": "على اليسار",
    },
    "right": {
        "en": "on the right",
        "de": "rechts",
        "es": "a la derecha",
        "fr": "à droite",
        "zh": "最右边",
        "ar": "على اليمين",
    },
    "above": {
        "en": "at the top",
        "de": "oben",
        "es": "arriba",
        "fr": "en haut",
        "zh": "最上面",
        "ar": "في الأعلى",
    },
    "below": {
        "en": "at the bottom",
        "de": "unten",
        "es": "abajo",
        "fr": "en bas",
        "zh": "最下面",
        "ar": "في الأسفل",
    },
}

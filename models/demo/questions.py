# ruff: noqa: RUF001
"""Question templates: for each kind of question and language, several ways to ask it."""

from __future__ import annotations

import random

from models.demo.language import LANGUAGES

FAMILIES = ("attribute", "count", "relation", "reading", "chart", "receipt", "presence")


def _templates(text: str) -> dict[str, list[str]]:
    ways: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    for line in text.strip().splitlines():
        language, _, question = line.strip().partition(" ")
        ways[language].append(question)
    if min(len(lines) for lines in ways.values()) < 2:
        raise ValueError(f"a language has fewer than two ways to ask: {text}")
    return ways


TEMPLATES: dict[str, dict[str, list[str]]] = {
    "colour": _templates("""
        en What colour is {the}?
        en What color is {the}?
        en Which colour does {the} have?
        de Welche Farbe hat {the}?
        de Was für eine Farbe hat {the}?
        es ¿De qué color es {the}?
        es ¿Qué color tiene {the}?
        fr De quelle couleur est {the} ?
        fr Quelle est la couleur {of} ?
        zh {the}是什么颜色的？
        zh {the}是什么颜色？
        ar ما لون {the}؟
        ar ما هو لون {the}؟
    """),
    "noun": _templates("""
        en What is the {colour} object?
        en What is {colour} in the picture?
        en Name the {colour} thing.
        de Was ist {colour}?
        de Welches Ding im Bild ist {colour}?
        es ¿Qué objeto es {colour}?
        es ¿Qué hay de color {colour}?
        fr Quel objet est {colour} ?
        fr Qu'est-ce qui est {colour} ?
        zh {colour}的物体是什么？
        zh 图中{colour}的是什么？
        ar ما الشيء الذي لونه {colour}؟
        ar ما هو الشيء ال{colour}؟
    """),
    "describe": _templates("""
        en What is in the picture?
        en What do you see?
        en What does the image show?
        de Was ist auf dem Bild?
        de Was siehst du?
        es ¿Qué hay en la imagen?
        es ¿Qué ves?
        fr Qu'y a-t-il sur l'image ?
        fr Que vois-tu ?
        zh 图中有什么？
        zh 你看到了什么？
        ar ماذا يوجد في الصورة؟
        ar ماذا ترى؟
    """),
    "count": _templates("""
        en How many {many} are there?
        en How many {many} can you see?
        en Count the {many}.
        de Wie viele {many} gibt es?
        de Wie viele {many} sind zu sehen?
        es ¿{how_many} {many} hay?
        es ¿{how_many} {many} ves?
        fr Combien {many} y a-t-il ?
        fr Combien {many} vois-tu ?
        zh 有几个{many}？
        zh 图中有多少个{many}？
        ar كم عدد {many}؟
        ar ما عدد {many} في الصورة؟
    """),
    "horizontal": _templates("""
        en Is {the} to the left or to the right of {of}?
        en Is {the} left or right of {of}?
        de Ist {the} links oder rechts von {of}?
        de Steht {the} links oder rechts von {of}?
        es ¿Está {the} a la izquierda o a la derecha {of}?
        es ¿{the} está a la izquierda o a la derecha {of}?
        fr {the} est à gauche ou à droite {of} ?
        fr Est-ce que {the} est à gauche ou à droite {of} ?
        zh {the}在{of}的左边还是右边？
        zh {the}位于{of}的左边还是右边？
        ar هل {the} على يسار أم على يمين {of}؟
        ar هل نجد {the} على يسار أم على يمين {of}؟
    """),
    "vertical": _templates("""
        en Is {the} above or below {of}?
        en Is {the} higher or lower than {of}, above or below?
        de Ist {the} über oder unter {of}?
        de Liegt {the} über oder unter {of}?
        es ¿Está {the} encima o debajo {of}?
        es ¿{the} está arriba o abajo {of}?
        fr {the} est au-dessus ou en dessous {of} ?
        fr Est-ce que {the} est au-dessus ou en dessous {of} ?
        zh {the}在{of}的上面还是下面？
        zh {the}位于{of}的上面还是下面？
        ar هل {the} فوق أم تحت {of}؟
        ar هل نجد {the} فوق أم تحت {of}؟
    """),
    "side": _templates("""
        en Is {the} {side} {of}?
        en Can {the} be found {side} {of}?
        de Ist {the} {side} {of}?
        de Befindet sich {the} {side} {of}?
        es ¿Está {the} {side} {of}?
        es ¿Se encuentra {the} {side} {of}?
        fr Est-ce que {the} est {side} {of} ?
        fr {the} se trouve {side} {of} ?
        zh {the}在{of}的{side}吗？
        zh {the}是不是在{of}的{side}？
        ar هل {the} {side} {of}؟
        ar هل نجد {the} {side} {of}؟
    """),
    "outermost": _templates("""
        en Which object is {place}?
        en What is {place} of all objects?
        de Welches Objekt ist ganz {place}?
        de Was ist am weitesten {place}?
        es ¿Qué objeto está más {place}?
        es ¿Qué hay más {place}?
        fr Quel objet est le plus {place} ?
        fr Qu'est-ce qui est tout {place} ?
        zh 哪个物体在{place}？
        zh {place}的物体是什么？
        ar ما الشيء الموجود {place}؟
        ar أي شيء يوجد {place}؟
    """),
    "presence": _templates("""
        en Is there {a}?
        en Is there {a} in the picture?
        en Can you see {a}?
        de Ist {a} zu sehen?
        de Ist {a} im Bild?
        es ¿Hay {a}?
        es ¿Se ve {a} en la imagen?
        fr Y a-t-il {a} ?
        fr Est-ce qu'il y a {a} sur l'image ?
        zh 有{a}吗？
        zh 图中有没有{a}？
        ar هل يوجد {a}؟
        ar هل يوجد {a} في الصورة؟
    """),
    "read": _templates("""
        en What does it say?
        en What is written here?
        en Read the text.
        de Was steht da?
        de Was ist hier geschrieben?
        es ¿Qué dice?
        es ¿Qué está escrito?
        fr Qu'est-ce qui est écrit ?
        fr Que dit le texte ?
        zh 上面写着什么？
        zh 写的是什么？
        ar ماذا كُتب هنا؟
        ar ما هو النص المكتوب؟
    """),
    "read_place": _templates("""
        en What is written {place}?
        en Read the text {place}.
        de Was steht {place}?
        de Was ist {place} geschrieben?
        es ¿Qué está escrito {place}?
        es ¿Qué dice {place}?
        fr Qu'est-ce qui est écrit {place} ?
        fr Que dit le texte {place} ?
        zh {place}写着什么？
        zh {place}的文字是什么？
        ar ماذا كُتب {place}؟
        ar ما النص المكتوب {place}؟
    """),
    "read_colour": _templates("""
        en What is written in {colour}?
        en Read the {colour} text.
        de Was steht da in {colour}?
        de Was ist in {colour} geschrieben?
        es ¿Qué está escrito en {colour}?
        es ¿Qué dice el texto {colour}?
        fr Qu'est-ce qui est écrit en {colour} ?
        fr Que dit le texte {colour} ?
        zh {colour}的文字是什么？
        zh 用{colour}写着什么？
        ar ماذا كُتب باللون ال{colour}؟
        ar ما النص ال{colour}؟
    """),
    "tallest": _templates("""
        en Which bar is the tallest?
        en Which label has the highest bar?
        de Welcher Balken ist am höchsten?
        de Welcher Balken ist der größte?
        es ¿Qué barra es la más alta?
        es ¿Cuál es la barra más alta?
        fr Quelle barre est la plus haute ?
        fr Quelle est la barre la plus haute ?
        zh 哪根柱子最高？
        zh 最高的柱子是哪一个？
        ar ما هو العمود الأعلى؟
        ar أي عمود هو الأطول؟
    """),
    "shortest": _templates("""
        en Which bar is the shortest?
        en Which label has the lowest bar?
        de Welcher Balken ist am niedrigsten?
        de Welcher Balken ist der kleinste?
        es ¿Qué barra es la más baja?
        es ¿Cuál es la barra más baja?
        fr Quelle barre est la plus basse ?
        fr Quelle est la barre la plus basse ?
        zh 哪根柱子最矮？
        zh 最矮的柱子是哪一个？
        ar ما هو العمود الأدنى؟
        ar أي عمود هو الأقصر؟
    """),
    "tallest_value": _templates("""
        en What is the highest value?
        en What is the value of the tallest bar?
        de Was ist der höchste Wert?
        de Welchen Wert hat der höchste Balken?
        es ¿Cuál es el valor más alto?
        es ¿Qué valor tiene la barra más alta?
        fr Quelle est la valeur la plus haute ?
        fr Quelle valeur a la barre la plus haute ?
        zh 最大的数值是多少？
        zh 最高的柱子的数值是多少？
        ar ما هي أعلى قيمة؟
        ar ما قيمة العمود الأعلى؟
    """),
    "bar_value": _templates("""
        en What is the value of {label}?
        en How much is {label}?
        de Welchen Wert hat {label}?
        de Wie hoch ist {label}?
        es ¿Qué valor tiene {label}?
        es ¿Cuál es el valor de {label}?
        fr Quelle est la valeur de {label} ?
        fr Combien vaut {label} ?
        zh {label}的数值是多少？
        zh {label}是多少？
        ar ما قيمة {label}؟
        ar كم قيمة {label}؟
    """),
    "total": _templates("""
        en What is the total?
        en How much is it in total?
        en What is the total amount?
        de Wie hoch ist die Summe?
        de Was kostet alles zusammen?
        es ¿Cuál es el total?
        es ¿Cuánto es en total?
        fr Quel est le total ?
        fr Combien ça fait en tout ?
        zh 总计是多少？
        zh 一共多少钱？
        ar ما هو المجموع؟
        ar كم المبلغ الإجمالي؟
    """),
    "price": _templates("""
        en What does {label} cost?
        en What is the price of {label}?
        en How much is {label}?
        de Was kostet {label}?
        de Wie teuer ist {label}?
        es ¿Cuánto cuesta {label}?
        es ¿Qué precio tiene {label}?
        fr Combien coûte {label} ?
        fr Quel est le prix de {label} ?
        zh {label}多少钱？
        zh {label}的价格是多少？
        ar كم سعر {label}؟
        ar ما هو ثمن {label}؟
    """),
    "date": _templates("""
        en What is the date?
        en Which date is printed?
        en When was this?
        de Welches Datum steht da?
        de Von wann ist das?
        es ¿Cuál es la fecha?
        es ¿Qué fecha aparece?
        fr Quelle est la date ?
        fr De quelle date est-ce ?
        zh 日期是什么？
        zh 日期是哪一天？
        ar ما هو التاريخ؟
        ar ما التاريخ المكتوب؟
    """),
}


def ask(rng: random.Random, kind: str, language: str, **words: str) -> str:
    """One way to ask a question of this kind, with its words filled in, first letter capital."""
    question = rng.choice(TEMPLATES[kind][language]).format(**words)
    if language in ("zh", "ar"):
        return question
    start = 1 if question.startswith("¿") else 0
    return question[:start] + question[start].upper() + question[start + 1 :]

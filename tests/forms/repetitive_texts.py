"""Texts that repeat themselves: those that are right to, and loops that a model does not leave.

Legitimate ones are as long as a page has them: 40 rows, 100 numbered questions, 256 equal values.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

LINES = {
    "code-nop": ("    nop\n", 40),
    "code-call": ("    buffer.push(value);\n", 40),
    "code-print": ('print("Hello, world!")\n', 40),
    "code-assert": ("        self.assertEqual(parser.next_token(), Token.NULL)\n", 24),
    "code-sleep": ("sleep 1; echo retry\n", 40),
    "code-break": ("            break;\n", 40),
    "code-brace": ("}\n", 60),
    "code-div": ("</div>\n", 60),
    "code-br": ("<br>", 80),
    "code-td": ("<td></td>", 80),
    "code-td-space": ("<td>&nbsp;</td>\n", 60),
    "code-tr": ("<tr><td></td><td></td><td></td></tr>", 40),
    "code-tr-words": (
        "<tr><td>Water bottle</td><td>In stock</td><td>Acme Corporation</td></tr>",
        40,
    ),
    "code-comment": ("# ---------------------------\n", 40),
    "code-null": ("NULL,\n", 100),
    "code-hex": ("0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,\n", 32),
    "code-float": ("0.0f, ", 128),
    "code-latex": ("Water & 1.00 & available \\\\ ", 40),
    "code-sql": ("INSERT INTO seats VALUES (NULL, 'free');\n", 40),
    "code-yaml": ("- name: unknown\n  price: null\n", 40),
    "code-json-row": ('{"item": "Coffee", "quantity": 1, "price": 3.50, "note": null}, ', 40),
    "code-json-block": ('  {\n    "label": "person",\n    "box": null\n  },\n', 40),
    "list-milk": ("- Milk\n", 40),
    "list-star": ("* Bread and butter\n", 40),
    "list-dot": ("\N{BULLET} Reserved\n", 50),
    "list-check": ("- [ ] \n", 60),
    "list-box": ("\N{BALLOT BOX} Yes  \N{BALLOT BOX} No\n", 60),
    "list-empty": ("- \n", 60),
    "list-none": ("None\n", 60),
    "list-na": ("N/A\n", 60),
    "list-lorem": ("- Lorem ipsum dolor sit amet\n", 30),
    "list-inline": ("Milk, ", 60),
    "list-arrow": ("\N{RIGHTWARDS ARROW} open\n", 60),
    "list-labels": ("John Smith\n123 Main Street\nSpringfield, IL 62704\n\n", 30),
    "list-tickets": ("ADMIT ONE\nGrand Summer Raffle\nNo refunds\n\n", 20),
    "list-cards": (
        "Dr Ada Byron, engineer\nAnalytical Engines\n12 Dorset St, London\nada@engines.example\n\n",
        8,
    ),
    "poem-rose": ("Rose is a rose is a rose is a rose.\n", 8),
    "poem-row": ("Row, row, row your boat,\nGently down the stream.\n", 8),
    "poem-blackboard": ("I will not waste chalk.\n", 20),
    "poem-la": ("La la la la, la la la\n", 16),
    "poem-amen": ("Ora pro nobis.\n", 40),
    "poem-mercy": ("Lord, have mercy. ", 12),
    "poem-nevermore": ("Quoth the Raven, Nevermore.\n", 18),
    "words-ha": ("ha", 100),
    "words-very": ("very ", 50),
    "words-cheers": ("Hip hip hurray! ", 20),
    "words-logo": ("ACME ", 100),
    "words-sample": ("SAMPLE COPY ", 60),
    "words-wallpaper": ("Happy Birthday! ", 30),
    "words-tape": ("POLICE LINE DO NOT CROSS ", 20),
    "words-keyboard": ("All work and no play makes Jack a dull boy.\n", 20),
    "log-ok": ("OK\n", 100),
    "log-ping": ("Request timed out.\n", 40),
    "log-get": ("GET /health 200\n", 60),
    "zh-list": ("- 牛奶\n", 60),
    "zh-row": ("| 有货 | 无 | 无 |\n", 40),
    "zh-song": ("两只老虎,跑得快。", 12),
    "zh-signature": ("签名:________\n", 40),
    "ja-list": ("・予約済み\n", 60),
    "ja-row": ("| 月曜日 | 休み | なし |\n", 40),
    "ja-receipt": ("おにぎり   ¥120\n", 40),
    "ja-poem": ("松島や ああ松島や 松島や\n", 10),
    "ko-list": ("- 우유\n", 60),
    "ko-row": ("| 사과 | 재고 있음 |\n", 40),
    "ar-list": ("- حليب\n", 60),
    "ar-row": ("| متوفر | لا | لا |\n", 40),
    "ar-praise": ("سبحان الله\n", 33),
    "hi-list": ("- दूध\n", 60),
    "hi-row": ("| उपलब्ध | नहीं |\n", 40),
    "th-list": ("- นม\n", 60),
    "ru-list": ("- Хлеб и молоко\n", 40),
    "ru-row": ("| Яблоки | нет в наличии | 5,00 |\n", 40),
    "el-list": ("- Γάλα\n", 60),
    "he-list": ("- חלב\n", 60),
    "emoji": ("\N{BLACK HEART SUIT}", 120),
    "stars": ("\N{BLACK STAR}\N{BLACK STAR}\N{WHITE STAR} ", 50),
    "morse": (".- ", 120),
}
CELLS = ("", "-", "0", "0.00", "n/a", "yes", "\N{CHECK MARK}", "closed", "Water bottle", "100 %")
WIDTHS = (2, 4, 7)
RULES = "-=_.*#~+\N{BOX DRAWINGS LIGHT HORIZONTAL}\N{HORIZONTAL ELLIPSIS}"
VALUES: tuple[object, ...] = (0, 1, -1, 0.0, 1.5, 255, None, True, "", "a", "none", [], [0, 0], {})
NUMBERED = (
    ("{n}. Milk\n", 60),
    ("{n}. \n", 100),
    ("{n}) ________________\n", 100),
    ("Line {n}\n", 200),
    ("Question {n}: ________ (2 points)\n", 100),
    ("{n}. Please describe what you see in the picture: ____________\n", 50),
    ("| {n} | | | |\n", 100),
    ("| {n} | Water bottle | Acme Corporation | In stock | 5.00 |\n", 60),
    ("{n},0,0,0\n", 200),
    ("Seat {n}: free\n", 100),
    ("[{n}] Smith et al.\n", 60),
    ("item_{n} = None\n", 60),
    ("case {n}: return false;\n", 60),
    ("{n} bottles of beer on the wall, {n} bottles of beer.\n", 40),
    ("第{n}题:\n", 100),
    ("{n}\n", 300),
    ("{n} ", 300),
    ("2024-01-{n:02}: closed\n", 31),
    ("Room {n:03} - vacant\n", 80),
    ("Signature of participant {n}: __________\n", 50),
)


def legitimate() -> dict[str, str]:
    """Texts by name."""
    texts = {name: line * n for name, (line, n) in LINES.items()}
    texts |= dict(_tables())
    texts |= dict(_signs())
    texts |= dict(_numbers())
    texts |= {f"numbered-{i}": numbered(*row) for i, row in enumerate(NUMBERED)}
    for i, value in enumerate(VALUES):
        texts[f"json-{i}"] = json.dumps([value] * 100)
        texts[f"json-lines-{i}"] = json.dumps({"values": [value] * 60}, indent=2)
    texts |= dict(_drawn())
    return texts


def numbered(line: str, n_lines: int, first: int = 1, step: int = 1) -> str:
    """``line`` with a number that goes up."""
    return "".join(line.format(n=first + step * i) for i in range(n_lines))


def _tables() -> Iterator[tuple[str, str]]:
    for i, cell in enumerate(CELLS):
        for width in WIDTHS:
            cells = [cell] * width
            head = [f"Column {column}" for column in range(width)]
            rule = "|---" * width + "|\n"
            row = f"| {' | '.join(cells)} |\n"
            yield f"markdown-{i}-{width}", f"| {' | '.join(head)} |\n{rule}{row * 40}"
            yield f"csv-{i}-{width}", f"{','.join(head)}\n" + f"{','.join(cells)}\n" * 40
        tabs = "\t".join([cell] * 5)
        yield f"tsv-{i}", f"name\tvalue\n{tabs}\n" * 20
        yield f"tsv-rows-{i}", f"{tabs}\n" * 40
        item = f"1 x Coffee {cell}      3.50\n"
        yield f"receipt-{i}", f"THE SHOP\n{item * 40}TOTAL     140.00\n"


def _signs() -> Iterator[tuple[str, str]]:
    for i, sign in enumerate(RULES):
        yield f"rule-{i}", f"Title\n{sign * 200}\nText\n"
        yield f"rules-{i}", f"{sign * 60}\n" * 12
        yield (
            f"leader-{i}",
            "".join(
                f"{title} {sign * 90} {page}\n"
                for page, title in enumerate(["Preface", "Tiles", "Rows", "Index"] * 4)
            ),
        )
    yield "spaces", f"left{' ' * 200}right"
    yield "blank-lines", "above" + "\n" * 100 + "below"
    yield "blanks-in-a-form", "Name: ____________________  Date: __________\n" * 30


def _numbers() -> Iterator[tuple[str, str]]:
    for i, number in enumerate(("0", "1", "9", "01", "123", "0123456789")):
        yield f"digits-{i}", (number * 256)[:256]
        yield f"binary-{i}", f"{number} " * 64
        yield f"matrix-{i}", (f"{number} " * 12 + "\n") * 40
    yield "hex-dump", "".join(f"{16 * i:08x}  {'00 ' * 16} |{'.' * 16}|\n" for i in range(48))
    yield "phone", "555-0100 " * 40
    yield (
        "times-table",
        "".join(f"{a} x {b} = {a * b}\n" for a in range(1, 13) for b in range(1, 11)),
    )
    yield "thirds", "1/3 = 0." + "3" * 300
    yield "address", "255.255.255.255\n" * 50


def _drawn() -> Iterator[tuple[str, str]]:
    for i, data in enumerate((bytes(180), b"\xff" * 180, b"abc" * 60, bytes(57) * 12)):
        yield f"base64-{i}", base64.b64encode(data).decode()
        yield f"base64-lines-{i}", base64.encodebytes(data).decode()
    yield "ascii-box", f"+{'-' * 60}+\n" + f"|{' ' * 60}|\n" * 30 + f"+{'-' * 60}+\n"
    yield "ascii-board", ("# " * 20 + "\n" + " #" * 20 + "\n") * 16
    yield "ascii-bars", "".join(f"{name} {'#' * 70}\n" for name in ("north", "south", "east") * 6)
    yield "ascii-wall", ("|___|___|___|___|___|\n|_|___|___|___|___|_|\n") * 20
    yield "ascii-waves", f"{'~^' * 30}\n" * 20
    yield (
        "stanzas",
        "".join(
            f"Verse {verse}\nwith {verse} lines of its own\n"
            + "And we sing, we sing along!\n" * 4
            + "\n"
            for verse in range(1, 13)
        ),
    )
    yield (
        "week",
        "".join(f"| {day} | 9-17 | closed |\n" for day in ("Mon", "Tue", "Wed", "Thu", "Fri")) * 8,
    )
    yield "sheet-music", "C G Am F " * 24
    yield "crossword", f"{'. # . . # . ' * 2}\n" * 24
    yield "knitting", "knit 2, purl 2, " * 30


# What a loop says each time; what stands before it is of no matter.
PERIODS = (
    "0",
    "-",
    " ",
    "\n",
    "的",
    "na ",
    "0, ",
    "ha ha! ",
    "Milk\n",
    "| | |\n",
    "- Milk\n",
    "2024, ",
    "the the ",
    "I am, ",
    "and so on ",
    "| 0.00 | 0.00 | 0.00 |\n",
    "<td>&nbsp;</td>",
    "A dog runs. ",
    "牛奶、面包、",
    "今天天气很好。",
    "البيت كبير جدا، ",
    "मौसम अच्छा है। ",
    "วันนี้อากาศดีมาก ",
    "The image shows a cat. ",
    "- The image shows a cat\n",
    "The man in the picture is wearing a blue shirt and a hat. ",
    "* A small red car that is parked in front of the house\n",
    "| Water bottle | Acme Corporation | In stock | 5.00 |\n",
    '{"item": "Coffee", "price": 3.50}, ',
    "item: Coffee\nprice: 3.50\n\n",
    "El hombre lleva una camisa azul y un sombrero grande. ",
    "Der Mann im Bild trägt ein blaues Hemd und einen großen Hut. ",
    "На картинке изображён человек в синей рубашке. ",
    "写真には青いシャツを着た男性が写っています。",
    "사진에는 파란 셔츠를 입은 남자가 있습니다. ",
    "In the background, trees and a small lake can be seen, and behind them some mountains. ",
    "The table shows the sales of the year, the costs of the year and what was left of them.\n",
    "First he opens the door, then he looks for the light, and then he goes down the stairs; ",
    "A: What do you see?\nB: I see a house with a garden, and two children who play there.\n",
    "Apples, pears, plums, cherries, grapes, melons, lemons, oranges, figs, dates, kiwis, ",
    "## Section\n\nThis part of the page could not be read, as it is hidden by a hand.\n\n",
)
LONG = (
    "The first page of the report describes how the samples were taken from the river, who took"
    " them and at what time of the day. It lists the weather, the level of the water and colour."
    " A second list names all birds that were seen from the bridge while the work was going on. "
)
COUNTED = (
    "{n}. The image shows a man in a blue shirt.\n",
    "{n}. The man is holding a small dog ",
    "Step {n}: Open the window, look outside and close it again.\n",
    "({n}) And then there is another picture of the same old house, ",
    "Item {n} of the list is a bottle of water that costs 5.00 euros; ",
    "# Page {n}\n\nThis page of the report has been left blank on purpose.\n\n",
    "图{n}显示一个穿着蓝色衬衫的男人站在一座很大的房子前面看着天空。",
    "Chapter {n}\nIn which nothing happens that did not happen in the last one, nor will ever.\n",
)


def loops() -> dict[str, str]:
    """What is said each time, by name; with ``{n}`` where a number goes up."""
    found = {f"period-{i}": text for i, text in enumerate(PERIODS)}
    for n in (20, 35, 50, 70, 90, 110, 130, 150, 170, 190, 215, 240, 275):
        found[f"long-{n}"] = LONG[:n]
    return found | {f"counted-{i}": text for i, text in enumerate(COUNTED)}

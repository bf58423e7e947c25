"""Shapes on a plain ground, scenes and shelves: attributes, counting, relations, presence."""

from __future__ import annotations

import random
from collections import Counter

from models.demo import language as words
from models.demo.drawing import (
    PALETTE,
    Canvas,
    Rgb,
    Thing,
    jitter,
    random_background,
    shade,
    visible_colours,
)
from models.demo.families.common import Question, Sketch, Style, pick_zoom
from models.demo.questions import ask

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
SHELF_THINGS = ("cup", "bottle", "book", "ball", "lamp", "box")
SCENE_THINGS = ("house", "car", "tree", "boat", "ball")

Place = tuple[float, float, float]  # x, y, radius


def draw_shapes(rng: random.Random, style: Style) -> Sketch:
    """Shapes scattered on a plain ground, also in long and narrow pictures."""
    width, height = rng.choice(
        ((140, 140), (140, 140), (140, 140), (140, 224), (224, 140), (224, 140), (224, 224),
         (112, 300), (300, 112))
    )  # fmt: skip
    width -= rng.randint(0, 16)
    height -= rng.randint(0, 16)
    background = random_background(rng)
    canvas = Canvas(width, height, pick_zoom(rng, style), background)
    most = 8 if width * height > 25000 else 5
    n_things = rng.randint(1, most)
    sizes = (12.0, 26.0) if n_things > 4 else (14.0, 34.0)
    places = _scatter(rng, canvas, n_things, sizes)
    _fill_places(rng, canvas, places, SHAPES, background)
    return _sketch(canvas, SHAPES)


def draw_scene(rng: random.Random, style: Style) -> Sketch:
    """Sky, ground, and a few large things outdoors."""
    width, height = rng.choice(((140, 140), (224, 140), (224, 140), (224, 200)))
    sky = jitter(rng, rng.choice(((196, 222, 240), (226, 214, 206), (208, 214, 220))), 8)
    ground = jitter(rng, rng.choice(((186, 198, 160), (206, 192, 158), (176, 178, 176))), 10)
    canvas = Canvas(width, height, pick_zoom(rng, style), sky)
    horizon = height * rng.uniform(0.3, 0.5)
    canvas.rectangle((0, horizon, width, height), ground)
    for _ in range(rng.randint(0, 2)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, horizon * 0.7), rng.uniform(6, 12)
        canvas.ellipse((x - 2 * r, y - r * 0.6, x + 2 * r, y + r * 0.6), shade(sky, 2.2))
    n_things = rng.randint(1, 6)
    places = _scatter(rng, canvas, n_things, (17.0, 32.0), top=horizon * 0.5)
    _fill_places(rng, canvas, sorted(places, key=lambda p: p[1]), SCENE_THINGS, ground, sky)
    return _sketch(canvas, SCENE_THINGS)


def draw_shelf(rng: random.Random, style: Style) -> Sketch:
    """Two or three boards with things standing on them."""
    n_boards = rng.choice((2, 2, 2, 3))
    width = rng.choice((136, 180, 220))
    height = n_boards * rng.randint(62, 67) + 6
    wall = jitter(rng, rng.choice(((232, 228, 218), (214, 222, 226), (236, 236, 236))), 8)
    canvas = Canvas(width, height, pick_zoom(rng, style), wall)
    board = jitter(rng, rng.choice(((170, 138, 100), (120, 104, 92), (190, 190, 194))), 10)
    n_things = rng.randint(1, 8)
    slots = []
    n_columns = width // 45
    gap = height / n_boards
    for row in range(n_boards):
        floor = (row + 1) * gap - 8
        canvas.rectangle((4, floor, width - 4, floor + 6), board)
        for column in range(n_columns):
            radius = rng.uniform(16.0, min(22.0, gap * 0.4))
            x = (column + 0.5) * width / n_columns + rng.uniform(-3, 3)
            slots.append((x, floor - radius, radius))
    places = sorted(rng.sample(slots, min(n_things, len(slots))))
    _fill_places(rng, canvas, places, SHELF_THINGS, wall, board)
    return _sketch(canvas, SHELF_THINGS)


def _sketch(canvas: Canvas, nouns: tuple[str, ...]) -> Sketch:
    return Sketch(canvas, lambda rng: _ask(rng, canvas.things, nouns))


def _scatter(
    rng: random.Random,
    canvas: Canvas,
    n_things: int,
    sizes: tuple[float, float],
    top: float = 0.0,
) -> list[Place]:
    """Up to n_things places that do not touch."""
    places: list[Place] = []
    for _ in range(40 * n_things):
        if len(places) == n_things:
            break
        r = rng.uniform(*sizes)
        x = rng.uniform(r + 3, canvas.width - r - 3)
        y = rng.uniform(min(top + r, canvas.height - r - 4), canvas.height - r - 3)
        if all(max(abs(x - px), abs(y - py)) > r + pr + 4 for px, py, pr in places):
            places.append((x, y, r))
    return places


def _fill_places(
    rng: random.Random, canvas: Canvas, places: list[Place], nouns: tuple[str, ...], *grounds: Rgb
) -> None:
    """Put things on the places; kinds and colours repeat often enough to be counted."""
    colours = [
        name for name in PALETTE if all(name in visible_colours(ground) for ground in grounds)
    ]
    few_nouns = rng.sample(nouns, rng.randint(1, min(4, len(nouns))))
    few_colours = rng.sample(colours, rng.randint(1, min(5, len(colours))))
    mixed = rng.random() < 0.4
    for x, y, radius in places:
        noun = rng.choice(nouns if mixed else few_nouns)
        colour = rng.choice(colours if mixed else few_colours)
        canvas.thing(noun, colour, jitter(rng, PALETTE[colour]), x, y, radius)


Reference = tuple[str, str | None]  # noun, and colour where it is needed to tell things apart


def _references(things: list[Thing]) -> list[tuple[Thing, Reference]]:
    """Things that a noun, or a noun with a colour, names without doubt."""
    nouns = Counter(thing.noun for thing in things)
    pairs = Counter((thing.noun, thing.colour) for thing in things)
    named: list[tuple[Thing, Reference]] = []
    for thing in things:
        if nouns[thing.noun] == 1:
            named.append((thing, (thing.noun, None)))
        if pairs[thing.noun, thing.colour] == 1:
            named.append((thing, (thing.noun, thing.colour)))
    return named


def _ask(rng: random.Random, things: list[Thing], nouns: tuple[str, ...]) -> list[Question]:
    """Two questions of each of the four object families, each in a random language."""
    asked: list[Question] = []
    for _ in range(2):
        asked += _attribute(rng, things)
        asked += _count(rng, things, nouns)
        asked += _relation(rng, things)
        asked += _presence(rng, things, nouns)
    return asked


def _attribute(rng: random.Random, things: list[Thing]) -> list[Question]:
    lang = rng.choice(words.LANGUAGES)
    if len(things) == 1 and rng.random() < 0.3:
        text = ask(rng, "describe", lang)
        answer = words.phrase(lang, "a", things[0].noun, things[0].colour)
        return [Question("attribute", lang, text, answer)]
    nouns = Counter(thing.noun for thing in things)
    colours = Counter(thing.colour for thing in things)
    by_noun = [thing for thing in things if nouns[thing.noun] == 1]
    by_colour = [thing for thing in things if colours[thing.colour] == 1]
    if by_noun and (rng.random() < 0.55 or not by_colour):
        thing = rng.choice(by_noun)
        the, of = (words.phrase(lang, form, thing.noun) for form in ("the", "of"))
        text = ask(rng, "colour", lang, the=the, of=of)
        return [Question("attribute", lang, text, words.colour_name(lang, thing.colour))]
    if by_colour:
        thing = rng.choice(by_colour)
        text = ask(rng, "noun", lang, colour=words.colour_name(lang, thing.colour))
        return [Question("attribute", lang, text, words.noun_name(lang, thing.noun))]
    return []


def _count(rng: random.Random, things: list[Thing], nouns: tuple[str, ...]) -> list[Question]:
    lang = rng.choice(words.LANGUAGES)
    kind = rng.random()
    colour: str | None = None
    if kind < 0.35:
        noun, number = "object", len(things)
    elif kind < 0.7:
        noun = rng.choice([thing.noun for thing in things] + [rng.choice(nouns)])
        number = sum(thing.noun == noun for thing in things)
    else:
        noun = "object"
        colour = rng.choice([thing.colour for thing in things])
        if rng.random() < 0.1:
            colour = rng.choice(list(PALETTE))
        number = sum(thing.colour == colour for thing in things)
    many = words.phrase(lang, "many", noun, colour)
    text = ask(rng, "count", lang, many=many, how_many=words.how_many(lang, noun))
    return [Question("count", lang, text, str(number))]


def _relation(rng: random.Random, things: list[Thing]) -> list[Question]:
    lang = rng.choice(words.LANGUAGES)
    if len(things) < 2:
        return []
    if rng.random() < 0.3:
        side = rng.choice(("left", "right", "above", "below"))
        ordered = sorted(things, key=lambda t: t.x if side in ("left", "right") else t.y)
        if side in ("right", "below"):
            ordered.reverse()
        first, second = ordered[:2]
        gap = abs(first.x - second.x) if side in ("left", "right") else abs(first.y - second.y)
        if gap < 14:
            return []
        text = ask(rng, "outermost", lang, place=words.PLACES[side][lang])
        return [Question("relation", lang, text, words.noun_name(lang, first.noun))]
    named = _references(things)
    if len(named) < 2:
        return []
    (one, one_name), (two, two_name) = rng.sample(named, 2)
    if one is two:
        return []
    dx, dy = one.x - two.x, one.y - two.y
    if max(abs(dx), abs(dy)) < 20:
        return []
    horizontal = abs(dx) > abs(dy)
    side = ("left" if dx < 0 else "right") if horizontal else ("above" if dy < 0 else "below")
    the = words.phrase(lang, "the", *one_name)
    of = words.phrase(lang, "of", *two_name)
    if rng.random() < 0.5:
        kind = "horizontal" if horizontal else "vertical"
        text = ask(rng, kind, lang, the=the, of=of)
        return [Question("relation", lang, text, words.ANSWERS[side][lang])]
    truth = rng.random() < 0.5
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    asked = side if truth else opposite[side]
    text = ask(rng, "side", lang, the=the, of=of, side=words.SIDES[asked][lang])
    return [Question("relation", lang, text, words.ANSWERS["yes" if truth else "no"][lang])]


def _presence(rng: random.Random, things: list[Thing], nouns: tuple[str, ...]) -> list[Question]:
    lang = rng.choice(words.LANGUAGES)
    thing = rng.choice(things)
    colour: str | None = thing.colour if rng.random() < 0.6 else None
    noun = thing.noun
    if rng.random() < 0.5:  # look for something that is not there, often nearly
        if colour is not None and rng.random() < 0.5:
            colour = rng.choice([c for c in PALETTE if c != thing.colour])
        else:
            noun = rng.choice([n for n in nouns if n != thing.noun])
    there = any(
        other.noun == noun and (colour is None or other.colour == colour) for other in things
    )
    text = ask(rng, "presence", lang, a=words.phrase(lang, "a", noun, colour))
    answer = words.ANSWERS["present" if there else "absent"][lang]
    return [Question("presence", lang, text, answer)]

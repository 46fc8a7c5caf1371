"""Rules of the filter: planted faults of texts and images, what is there twice, and what stays."""

import random
from collections import Counter

from minigpt4.common.curation_schema import FilterConfig
from minigpt4.curation.filters import Evidence, filter_records, image_pairs, text_pairs
from minigpt4.curation.records import text_of

PEOPLE = [
    "man",
    "woman",
    "boy",
    "girl",
    "child",
    "farmer",
    "painter",
    "cyclist",
    "waiter",
    "nurse",
    "musician",
    "fisherman",
    "baker",
    "student",
    "tourist",
]
ANIMALS = [
    "dog",
    "cat",
    "horse",
    "parrot",
    "goat",
    "rabbit",
    "duck",
    "donkey",
    "squirrel",
    "crow",
    "swan",
    "turtle",
    "lizard",
    "fox",
    "hedgehog",
]
THINGS = [
    "bicycle",
    "basket",
    "lantern",
    "kettle",
    "ladder",
    "umbrella",
    "suitcase",
    "guitar",
    "mirror",
    "clock",
    "bench",
    "barrel",
    "statue",
    "vase",
    "rope",
]
PLACES = [
    "harbour",
    "market",
    "bridge",
    "meadow",
    "kitchen",
    "library",
    "station",
    "garden",
    "beach",
    "square",
    "workshop",
    "forest",
    "balcony",
    "attic",
]
COLOURS = [
    "red",
    "blue",
    "yellow",
    "green",
    "white",
    "brown",
    "grey",
    "purple",
    "orange",
    "black",
    "golden",
    "silver",
    "pale",
    "dark",
    "striped",
]
DOING = [
    "repairs",
    "carries",
    "holds",
    "watches",
    "paints",
    "cleans",
    "lifts",
    "admires",
    "examines",
    "pushes",
    "measures",
    "wraps",
    "photographs",
]
MOODS = ["calm", "busy", "cheerful", "quiet", "gloomy", "sunny", "crowded", "peaceful", "windy", "dusty"]
PATTERNS = (
    "In the {place}, a {colour} {thing} stands beside a {person} who {doing} a {thing}.",
    "A {person} {doing} the {colour} {thing} while a {animal} sleeps under a {colour} {thing}.",
    "Behind them, several {animal}s gather around an old {thing} near the {place}.",
    "The {colour} {animal} looks at the {person}, whose {thing} lies on the ground.",
    "There is also a {thing} with {colour} stripes, half hidden by a {colour} {thing}.",
    "On the left, two {person}s talk next to the {thing}, and a {animal} walks towards them.",
    "The whole scene feels {mood}, with soft light falling on the {colour} {thing} in the {place}.",
    "Further away one can make out a {mood} {place} where a {person} {doing} something {colour}.",
    "Near the right edge, the shadow of a {thing} crosses the path to the {place}.",
)


def sentence(draw: random.Random, pattern: str) -> str:
    words = {"place": PLACES, "colour": COLOURS, "thing": THINGS, "person": PEOPLE, "animal": ANIMALS}
    words |= {"doing": DOING, "mood": MOODS}
    for name, own in words.items():
        while f"{{{name}}}" in pattern:
            pattern = pattern.replace(f"{{{name}}}", draw.choice(own), 1)
    return pattern


def description(draw: random.Random, least: int = 4, most: int = 6) -> str:
    patterns = draw.sample(PATTERNS, draw.randint(least, most))
    return " ".join(sentence(draw, pattern) for pattern in patterns)


def count(text: str) -> int:
    return len(text.split()) * 5 // 4


def record(number: int, text: str, **fields) -> dict:
    draw = random.Random(f"image {number}")
    own = {"id": f"{number:05d}", "image": f"{number}.jpg", "sha256": f"{number:064x}", "width": 640, "height": 480}
    own |= {"phash": f"{draw.getrandbits(64):016x}", "contrast": 50.0, "source": "x", "text": text, "refined": text}
    return own | {"refiner": "rules", "changed": False, "similarity": 1.0} | fields


def run(texts: list[str], **changes) -> list[dict]:
    settings = FilterConfig(**({"opening": None} | changes))
    return filter_records([record(number, text) for number, text in enumerate(texts)], settings, Evidence(count))


# Planted faults: the rules that make them are not those that find them

FOREIGN = (
    "Una mujer vieja camina despacio por la calle mientras los niños juegan con una pelota de goma.",
    "Auf dem Tisch liegen mehrere Bücher, und durch das Fenster fällt ein warmes Licht auf den Boden.",
    "Les enfants regardent la mer pendant que leurs parents préparent le repas sous un grand arbre.",
    "Nel giardino ci sono molti fiori colorati e un gatto che dorme tranquillo sopra il muro di pietra.",
    "На столе стоит старая лампа, а рядом с ней лежит открытая книга и чашка горячего чая.",
    "桌子上有一本打开的书，旁边放着一杯热茶，窗外的树叶被风吹得沙沙作响。",
)
EXCUSES = (
    "I'm sorry, but I can't tell what the rest of the picture shows.",
    "I apologize for that, the answer before was wrong.",
    "As an AI language model, I do not have eyes.",
    "I’m sorry, I made a mistake in the last sentence.",
    "The paragraph describes everything that matters.",
    "Unfortunately I cannot see the image from here.",
)


def repeats(draw: random.Random) -> str:
    parts = description(draw, 3, 5).split(". ")
    kind = draw.randrange(3)
    if kind == 0:  # a sentence comes again later on
        return ". ".join([*parts, parts[0].rstrip(".")]) + "."
    if kind == 1:  # a phrase goes round
        words = parts[0].split()
        return f"{' '.join(parts)} and {' '.join(words[-3:]) + ' ':s}" + f"and {' '.join(words[-3:])} " * draw.randint(
            4, 12
        )
    name = draw.choice(THINGS)
    return f"{' '.join(parts)}. " + " ".join(
        f"There is a {draw.choice(COLOURS)} {name} in the picture." for _ in range(7)
    )


def breaks_off(draw: random.Random) -> str:
    words = description(draw).split()
    end = draw.randint(45, len(words) - 6)
    while words[end - 1].lower() not in ("a", "the", "of", "with", "and", "whose", "by", "is"):
        end -= 1
    return " ".join(words[:end])


def foreign(draw: random.Random) -> str:
    lines = description(draw, 4, 5).split(". ")
    kept = draw.choice((lines[:2], lines[:1], []))
    return ". ".join([*kept, ""]) + " ".join(draw.sample(FOREIGN, 3))


def excuse(draw: random.Random) -> str:
    lines = [f"{line.rstrip('.')}." for line in description(draw).split(". ")]
    lines.insert(draw.randint(0, len(lines)), draw.choice(EXCUSES))
    return " ".join(lines)


def debris(draw: random.Random) -> str:
    words, kind = description(draw).split(), draw.randrange(3)
    place = draw.randrange(len(words))
    if kind == 0:
        words.insert(
            place, draw.choice(("###", "###Human:", "</s>", "<Img>", "Assistant:", "[INST]", "�", "<|im_end|>"))
        )
        return " ".join(words)
    if kind == 1:
        signs = "".join(draw.choice("@#$%^&*=+~|\\<>/{}[]_★●■►") for _ in range(90))
        return " ".join([*words[:place], signs, *words[place:]])
    return " ".join(words[: draw.randint(5, 18)]).rstrip(".,") + "."  # hardly anything is left


KINDS = {one.__name__: one for one in (repeats, breaks_off, foreign, excuse, debris)}


def test_planted_bad_texts_are_found_and_good_ones_stay():
    draw = random.Random("planted, second set")
    planted = [(name, make(draw)) for name, make in KINDS.items() for _ in range(100)]
    planted += [("", description(draw)) for _ in range(500)]
    draw.shuffle(planted)
    found = run([text for _, text in planted])
    hit = Counter((name, record["kept"]) for (name, _), record in zip(planted, found, strict=True))
    recall = {name: hit[name, False] / 100 for name in KINDS}
    dropped = sum(not record["kept"] for record in found)
    precision = 1 - hit["", False] / dropped
    assert min(recall.values()) >= 0.95, recall
    assert precision >= 0.95, [
        (text_of(r), r["evidence"]) for (n, _), r in zip(planted, found, strict=True) if not n and not r["kept"]
    ][:3]


# What is there twice


def altered(draw: random.Random, text: str) -> str:
    """A near-duplicate: a word replaced, or one more at the end."""
    words = text.split()
    if draw.random() < 0.5:
        words[draw.choice((0, 1, -1, -2))] = "indeed"
    else:
        words += ["Really", "nice."]
    return " ".join(words)


def test_planted_near_duplicates_are_found_across_sets_and_nothing_else():
    draw = random.Random("duplicates")
    texts = [description(draw, 6, 8) for _ in range(900)]
    twins = {number: altered(draw, texts[number]) for number in range(300)}
    pairs = {(one, other - 900) for one, other, _ in text_pairs([*texts, *twins.values()], 0.7) if one < 900 <= other}
    assert len(pairs & {(number, number) for number in twins}) >= 297
    assert all(one == other for one, other in pairs)
    hashes = [f"{draw.getrandbits(64):016x}" for _ in range(3000)]
    near = [
        f"{int(one, 16) ^ sum(1 << bit for bit in draw.sample(range(64), draw.randint(0, 6))):016x}" for one in hashes
    ]
    found = {(one, other) for one, other, _ in image_pairs(hashes, near, 6)}
    assert found == {(number, number) for number in range(3000)}
    exact = [(one, other, bits) for one, other, bits in image_pairs(hashes[:40], near[:40], 64)]
    assert all(bits == (int(hashes[a], 16) ^ int(near[b], 16)).bit_count() for a, b, bits in exact)
    assert len(exact) == 1600

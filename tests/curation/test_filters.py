"""Rules of the filter: planted faults of texts and images, what is there twice, and what stays."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from minigpt4.common.binding import bind
from minigpt4.common.curation_schema import FilterConfig
from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.curation import filters
from minigpt4.curation.filters import Evidence, HeldOut, filter_records, image_pairs

words_in = str.split
PEOPLE = words_in(
    "man woman boy girl child farmer painter cyclist waiter nurse musician fisherman baker student tourist"
)
ANIMALS = words_in("dog cat horse parrot goat rabbit duck donkey squirrel crow swan turtle lizard fox hedgehog")
THINGS = words_in(
    "bicycle basket lantern kettle ladder umbrella suitcase guitar mirror clock bench barrel statue vase rope"
)
PLACES = words_in(
    "harbour market bridge meadow kitchen library station garden beach square workshop forest balcony attic"
)
COLOURS = words_in("red blue yellow green white brown grey purple orange black golden silver pale dark striped")
DOING = words_in("repairs carries holds watches paints cleans lifts admires examines pushes measures wraps")
MOODS = words_in("calm busy cheerful quiet gloomy sunny crowded peaceful windy dusty")
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
    assert precision >= 0.95


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
    records = [record(number, description(draw, 6, 8)) for number in range(900)]
    texts = {f"text {number}": altered(draw, records[number]["text"]) for number in range(300)}
    bits = {number: sum(1 << bit for bit in draw.sample(range(64), draw.randint(0, 6))) for number in range(300, 600)}
    hashes = {f"image {number}": f"{int(records[number]['phash'], 16) ^ own:016x}" for number, own in bits.items()}
    found = filter_records(records, FilterConfig(opening=None), Evidence(count, HeldOut(hashes, texts)))
    hits = [int(one["id"]) for one in found if one["failed_rules"] == [filters.LEAKAGE]]
    assert len({number for number in hits if number < 300}) >= 297
    assert [number for number in hits if number >= 300] == list(range(300, 600))
    assert all(one["evidence"][filters.LEAKAGE].startswith("image") for one in found[300:600])
    assert all(one["kept"] for one in found[600:])


def test_all_pairs_of_images_are_compared_bit_by_bit():
    draw = random.Random("bits")
    hashes = [f"{draw.getrandbits(64):016x}" for _ in range(3000)]
    near = [
        f"{int(one, 16) ^ sum(1 << bit for bit in draw.sample(range(64), draw.randint(0, 6))):016x}" for one in hashes
    ]
    found = {(one, other) for one, other, _ in image_pairs(hashes, near, 6)}
    assert found == {(number, number) for number in range(3000)}
    exact = [(one, other, bits) for one, other, bits in image_pairs(hashes[:40], near[:40], 64)]
    assert all(bits == (int(hashes[a], 16) ^ int(near[b], 16)).bit_count() for a, b, bits in exact)
    assert len(exact) == 1600


# Each rule

DRAW = random.Random("good")
GOOD = description(DRAW, 6, 6)


@pytest.mark.parametrize(
    ("changes", "fields", "rule"),
    [
        ({"least_tokens": count(GOOD)}, {}, None),
        ({"least_tokens": count(GOOD) + 1}, {}, filters.SHORT),
        ({"most_tokens": count(GOOD)}, {}, None),
        ({"most_tokens": count(GOOD) - 1}, {}, filters.LONG),
        ({"phrases": ["near the"]}, {"refined": f"Near the\nend. {GOOD}"}, filters.ITSELF),
        ({"phrases": ["ear th"]}, {"refined": f"Near the end. {GOOD}"}, None),
        ({}, {"refined": GOOD + " ###"}, "fragment"),
        ({"failures": False, "signs": 0.1}, {"refined": GOOD + " " + "*" * 80}, filters.SIGNS),
        ({"failures": False, "signs": None}, {"refined": GOOD + " " + "*" * 80}, None),
        ({}, {"refined": f"{GOOD} Una mujer camina por la calle con su perro."}, filters.LANGUAGE),
        ({"language": None}, {"refined": f"{GOOD} Una mujer camina por la calle con su perro."}, None),
        ({}, {"width": 99}, filters.POOR),
        ({}, {"width": 100, "height": 400}, None),
        ({}, {"width": 100, "height": 401}, filters.POOR),
        ({}, {"contrast": 0.0}, filters.POOR),
        ({"least_contrast": None}, {"contrast": 0.0}, None),
        ({}, {"refiner": "none", "ended_first": False}, "cut off"),
        ({}, {"refiner": "none", "ended_first": False, "second": "x", "ended_second": True}, None),
        ({}, {"refiner": "rules", "ended_first": False}, None),
    ],
    ids=str,
)
def test_thresholds_of_one_record(changes, fields, rule):
    settings = FilterConfig(**({"ngram_share": None} | changes))
    (found,) = filter_records([record(1, GOOD, **fields)], settings, Evidence(count))
    assert found["failed_rules"] == ([] if rule is None else [rule])
    assert found["kept"] == (rule is None) == ("dropped" not in found)
    if rule is not None:
        assert (found["dropped"]["step"], found["dropped"]["rule"]) == ("filter", rule)


def test_caption_that_the_text_never_mentions_is_for_people_and_so_is_what_the_image_does_not_matter_to():
    records = [record(n, description(DRAW), caption=text) for n, text in enumerate(("a zeppelin", GOOD, "the of"))]
    records += [record(n, description(DRAW)) for n in range(3, 10)]
    gains = {one["id"]: number / 10 - 0.1 for number, one in enumerate(records)}
    settings = FilterConfig(likelihood=0.2, opening=None)
    found = filter_records(records, settings, Evidence(count, gains=gains))
    assert all(one["kept"] for one in found)
    piled = {one["id"]: [why["rule"] for why in one["review"]] for one in found if "review" in one}
    assert piled == {"00000": [filters.CAPTION, filters.LIKELIHOOD], "00001": [filters.LIKELIHOOD]}
    assert found[5]["measures"]["image_gain"] == pytest.approx(0.4)


def test_of_what_is_there_twice_one_stays_whatever_the_order_and_a_bad_twin_costs_nothing():
    texts = [description(DRAW, 6, 8) for _ in range(8)]
    records = [record(number, text) for number, text in enumerate(texts)]
    one = int(records[0]["phash"], 16)
    records[1] |= {"phash": f"{one ^ 0b111111:016x}"}  # 6 bits: the same
    records[2] |= {"phash": f"{one ^ (0b1111111 << 8):016x}"}  # 7: people look at it
    records[4] |= {"refined": altered(DRAW, texts[3])}
    records[5] |= {"sha256": records[6]["sha256"], "phash": records[6]["phash"], "refined": "I'm sorry. " + texts[5]}
    left: list[dict] = []
    for order in (records, records[::-1]):
        found = {one["id"]: one for one in filter_records(order, FilterConfig(opening=None), Evidence(count))}
        rules = {key: one["failed_rules"] for key, one in found.items() if one["failed_rules"]}
        assert sorted(map(tuple, rules.values())) == [(filters.SAME_IMAGE,), (filters.ITSELF,), (filters.SAME_TEXT,)]
        assert found["00006"]["kept"]
        assert len({"00000", "00001"} & rules.keys()) == len({"00003", "00004"} & rules.keys()) == 1
        near = [one["review"][0]["rule"] for one in found.values() if "review" in one]
        assert near == [filters.SAME_IMAGE] * found["00000"]["kept"]
        left.append({key: one["kept"] for key, one in sorted(found.items())})
    assert left[0] == left[1]


def test_features_that_are_alike_and_openings_beyond_the_cap_leave():
    records = [
        record(number, f"The old photo shows {word} things. {description(DRAW)}")
        for number, word in enumerate(["nice"] * 6 + ["big", "odd", "red", "new"])
    ]
    features = {one["id"]: np.eye(12, dtype=np.float32)[number] for number, one in enumerate(records)}
    features["00007"] = (0.98 * features["00006"] + 0.199 * features["00007"]).astype(np.float32)
    settings = FilterConfig(opening=0.2, image_alike=0.97)
    found = filter_records(records, settings, Evidence(count, features=features))
    hits = Counter(rule for one in found for rule in one["failed_rules"])
    assert hits == {filters.ALIKE: 1, filters.OPENING: 5}
    assert sum(one["kept"] for one in found if one["text"].startswith("The old photo shows nice")) == 1


def test_test_sets_are_read_from_lists_of_captions(tmp_path):
    (tmp_path / "test.json").write_text(json.dumps({"annotations": [{"image_id": 7, "caption": GOOD}]}))
    held_out = HeldOut.read([str(tmp_path / "test.json")])
    (found,) = filter_records([record(1, altered(DRAW, GOOD))], FilterConfig(), Evidence(count, held_out))
    assert found["failed_rules"] == [filters.LEAKAGE]
    assert "test.json: 7" in found["dropped"]["evidence"]
    with pytest.raises(SampleError, match=r"curation\.filter\.test_sets: .*nowhere\.json cannot be read"):
        HeldOut.read([str(tmp_path / "nowhere.json")])


def test_dropped_records_stay_as_they_are_and_wrong_settings_are_named():
    gone = {"id": "x", "dropped": {"step": "select", "rule": "unreadable image", "evidence": "torn"}}
    assert filter_records([gone], FilterConfig(), Evidence(count)) == [gone]
    with pytest.raises(
        ConfigError, match=r"curation\.filter\.image_distance_review: 3 must be at least image_distance"
    ):
        bind(FilterConfig, {"image_distance_review": 3}, section="curation.filter", source="x.yaml")
    with pytest.raises(ConfigError, match="least_token: unknown key; did you mean 'least_tokens'"):
        bind(FilterConfig, {"least_token": 3}, section="curation.filter", source="x.yaml")

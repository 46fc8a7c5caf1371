"""Rules of failures, each by itself."""

import pytest

from minigpt4.evaluation.failure_rules import find_failures

GOOD = (
    "The image shows a kitchen with a round table. A loaf of bread and a jar of honey stand on a checked cloth, and a "
    "grey cat sits on one of the chairs."
)
VERSE = "The river runs beneath the bridge,\nthe evening paints it gold,\nand on the bank an old man sits\n"


def _kinds(text: str, form: str = "prose", ended: bool | None = True) -> list[str]:
    return [failure.kind for failure in find_failures(text, form, ended)]


def _evidence(text: str, form: str = "prose", ended: bool | None = True) -> str:
    (failure,) = find_failures(text, form, ended)
    return failure.evidence


@pytest.mark.parametrize("ended", [True, None])
def test_good_answer_has_no_failure(ended):
    assert _kinds(GOOD, ended=ended) == []


# Empty and cut off


@pytest.mark.parametrize("text", ["", " \n", "...", "- -", "!?"])
def test_text_without_a_word_is_empty_and_nothing_else(text):
    assert _kinds(text, ended=False) == ["empty"]


def test_answer_that_the_limit_ended_is_cut_off_even_after_a_whole_sentence():
    assert "after a whole sentence" in _evidence(GOOD, ended=False)
    assert "in mid-sentence" in _evidence(GOOD[:-10], ended=False)


def test_last_sentence_without_its_full_stop_is_no_failure():
    assert _kinds(GOOD[:-1]) == []


# Repetition


@pytest.mark.parametrize(("times", "kinds"), [(3, []), (4, ["repetition"])])
def test_word_four_times_in_a_row_is_a_loop_in_prose(times, kinds):
    assert _kinds(f"The tree on the hill is {'very ' * times}old, and a swing hangs from a branch.") == kinds


def test_loop_is_shown_with_its_length():
    text = "There is a tree " + "and a red car " * 9 + "in the street."
    assert _evidence(text) == "9 times in a row: “and a red car”"


def test_sentence_that_comes_again_is_a_repetition_in_prose_but_not_in_verse():
    again = "The old man sits on the bank of the river. "
    assert _kinds(again + GOOD + " " + again) == ["repetition"]
    assert _kinds(again + GOOD + " " + again, "verse") == []


def test_refrain_that_comes_twice_in_a_row_is_no_loop():
    assert _kinds(VERSE + "and sings, and sings, and sings the old refrain.\n" * 2, "verse") == []


def test_poem_that_goes_round_in_circles_is_a_loop():
    assert _kinds(VERSE * 3, "verse") == ["repetition"]
    assert _kinds(VERSE + "the sea, the sea, " * 5 + "and the shore.", "verse") == ["repetition"]


def test_same_phrases_in_changing_order_are_a_repetition():
    parts = ["there is a car on the left", "there is a man on the right", "there is a dog in the street"]
    text = ", ".join(parts[number % 3] + (" too" if number % 2 else "") for number in (0, 1, 2, 1, 0, 2, 2, 0, 1))
    assert "4-word passages came before" in _evidence(text + ".")


# Fragments


@pytest.mark.parametrize(
    ("text", "evidence"),
    [
        ("a dog on a couch", "5 words"),
        (GOOD + " ###", "debris of a template: '###'"),
        (GOOD + " Human: What else?", "debris of a template: 'Human:'"),
        ("1. A red barn behind the wooden fence of a farm.\n2. A tractor.\n3.", "a bullet without text"),
        ("and then " + GOOD[0].lower() + GOOD[1:], "begins in mid-sentence: “and then the image shows a”"),
        (", " + GOOD, "begins with ','"),
        (GOOD[:-7] + "the", "ends in mid-sentence: “...heese"),
        (GOOD[:-1] + ",", "ends in mid-sentence"),
    ],
)
def test_fragment_is_named_by_what_shows_it(text, evidence):
    assert evidence[:20] in _evidence(text)


def test_poem_may_be_short_and_may_begin_with_and():
    assert _kinds("And snow on the fence posts\na red cart left in the yard", "verse") == []


def test_end_that_the_limit_made_is_not_counted_as_a_fragment_too():
    assert _kinds(GOOD[:-7] + "the", ended=False) == ["cut off"]


# Language


def test_other_language_in_latin_letters_is_found_by_its_words():
    text = "Das Bild zeigt einen Mann, der mit seinem Hund durch einen Park geht und einen Ball in der Hand trägt."
    assert "English function words" in _evidence(text)


def test_other_letters_are_counted_and_such_a_text_is_not_called_short():
    assert _evidence("图中有一只猫坐在窗台上。") == "11 of 11 letters are not Latin"


def test_what_a_sign_says_is_part_of_the_image():
    assert _kinds('The sign above the door of the old house at the corner reads "停车场停车场停车场停车场".') == []

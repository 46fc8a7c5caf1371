import unicodedata

import pytest

from minigpt4.mini.scenes import BACKGROUNDS, THINGS, Thing, with_article


def test_there_are_80_kinds_with_names_of_their_own_that_unicode_gives():
    assert len({thing.name for thing in THINGS}) == 80
    assert all(unicodedata.lookup(thing.name.upper()) == chr(int(thing.code_point, 16)) for thing in THINGS)


def test_no_kind_is_called_like_a_background():
    assert not set(BACKGROUNDS) & {word for thing in THINGS for word in thing.name.split()}


@pytest.mark.parametrize(
    ("name", "plural"),
    [("cat", "cats"), ("bus", "buses"), ("butterfly", "butterflies"), ("key", "keys"), ("snowman", "snowmen")],
)
def test_plurals(name, plural):
    thing = Thing("1F408", name)
    assert (thing.counted(1), thing.counted(2)) == (name, plural)


def test_articles_follow_the_first_letter():
    assert (with_article("owl"), with_article("cat")) == ("an owl", "a cat")

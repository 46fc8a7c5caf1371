"""Help for misspelt names stays short enough to be read."""

from minigpt4.common.errors import hint, nearest


def test_few_names_are_all_listed_behind_the_nearest():
    assert hint("modle", ["run", "model"]) == "did you mean 'model'? Known: model, run"


def test_many_names_are_listed_only_where_none_is_near():
    names = [f"key_{letter}" for letter in "abcdefghijklmnop"] + ["image_size"]
    assert hint("image_sise", names) == "did you mean 'image_size'?"
    assert hint("xyz", names).startswith("Known: image_size, key_a, key_b")


def test_unlike_name_has_no_nearest():
    assert nearest("zzz", ["model", "run"]) is None

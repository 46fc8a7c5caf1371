import pytest

from minigpt4.common.errors import ConfigError

BEGIN, END = "<!-- step: begin -->", "<!-- step: end -->"


@pytest.fixture
def tables(script):
    return script("tables")


def test_a_section_is_replaced_between_its_marks(tables, tmp_path):
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    tables.write_section(document, "step", "new \\1\n")
    assert document.read_text() == f"before\n{BEGIN}\nnew \\1\n{END}\nafter\n"


def test_a_new_section_goes_to_the_end(tables, tmp_path):
    document = tmp_path / "performance.md"
    document.write_text("# Performance\n")
    tables.write_section(document, "step", "new\n")
    assert document.read_text() == f"# Performance\n\n{BEGIN}\nnew\n{END}\n"


def test_a_file_that_cannot_be_written_is_named(tables, tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        tables.write_section(tmp_path / "nowhere" / "x.md", "step", "new")


def test_ways_are_measured_in_turn_and_forth_and_back(tables):
    order = []
    seconds = tables.seconds_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_the_median_of_the_rounds_own_ratios(tables):
    assert tables.ratio([2.0, 30.0, 4.0], [1.0, 3.0, 1.0]) == 4.0

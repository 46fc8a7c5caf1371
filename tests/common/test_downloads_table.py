"""The table of published weights, and the document that shows it."""

import re
from pathlib import Path

import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.common.utils import human
from minigpt4.common.weights import WeightsEntry, files_markdown, llms_markdown, load_table

ROOT = Path(__file__).parents[2]


def test_table_refuses_paths_outside_and_unknown_sources():
    with pytest.raises(ConfigError, match="below the weights folder"):
        WeightsEntry("a", "../a.pth", ("https://x/a",), 1, "", "")
    with pytest.raises(ConfigError, match="sources"):
        WeightsEntry("a", "a.pth", ("ftp://x/a",), 1, "", "")


def test_table_names_the_unknown_key_of_a_file(tmp_path):
    (tmp_path / "t.yaml").write_text("files: {a: {path: a, sources: ['hf:a/b'], about: 1, sice: 1}}")
    with pytest.raises(ConfigError, match=r"t\.yaml: .*sice"):
        load_table(tmp_path / "t.yaml")


def test_shipped_table_is_whole():
    table = load_table()
    assert {entry.path for entry in table.files.values()} >= {
        "eva_vit_g.pth",
        "blip2_pretrained_flant5xxl.pth",
    }
    assert len({entry.path for entry in table.files.values()}) == len(table.files)
    for entry in table.files.values():
        assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert entry.bytes in (None, entry.about)
    for llm in table.llms:
        assert {llm.llm, *filter(None, (llm.stage1, llm.aligned))} <= set(table.files)


def test_computed_sizes_of_projectors_follow_from_their_widths():
    table = load_table()
    for llm in table.llms:
        width, hidden = llm.projector
        for name in filter(None, (llm.stage1, llm.aligned)):
            parameters = width * hidden + hidden
            assert f"{parameters:,} fp32 parameters" in table.files[name].size
            assert table.files[name].about == parameters * 4 * 3


def test_doc_shows_the_table():
    doc, table = (ROOT / "docs" / "weights.md").read_text(), load_table()
    assert f"<!-- weights table -->\n\n{files_markdown(table)}\n\n<!-- end of weights table -->" in doc
    assert f"<!-- llm table -->\n\n{llms_markdown(table)}\n\n<!-- end of llm table -->" in doc


def test_sizes_are_readable():
    assert [human(size) for size in (0, 999, 1000, 433481467, 26031759360)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "433.5 MB",
        "26.0 GB",
    ]

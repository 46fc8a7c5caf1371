"""The converter of BLIP's caption files: streaming, strict about JSON, lenient about entries."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import csv as read

SCRIPT = Path(__file__).parents[2] / "scripts/convert_stage1_captions.py"


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("scripts/convert_stage1_captions.py")


HALF = {"url": "u", "caption": "a cute \ud83d dog"}
PAIRS = [
    ("http://a.b/1.jpg?x=[1]&y={2}", "a dog, running"),
    ("http://a.b/2.jpg", 'a sign that says "stop"'),
    ("http://a.b/3.jpg", '"quoted" at the start'),
    ("http://a.b/4.jpg", "Straße – 東京 🗼"),
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_pairs_become_rows_with_a_header_wherever_the_chunks_end(tmp_path, script, monkeypatch, indent, chunk):
    monkeypatch.setattr(script, "CHUNK", chunk)
    source = tmp_path / "ccs_synthetic_filtered_large.json"
    source.write_text(json.dumps([{"caption": c, "url": u} for u, c in PAIRS], indent=indent))
    assert script.main([str(source)]) == 0
    with source.with_suffix(".tsv").open(newline="", encoding="utf-8") as text:
        assert list(csv.reader(text, delimiter="\t")) == [["url", "caption"], *map(list, PAIRS)]
    options = read.ParseOptions(delimiter="\t")  # of img2dataset's reader
    table = read.read_csv(source.with_suffix(".tsv"), parse_options=options)
    assert list(zip(*table.to_pydict().values(), strict=True)) == PAIRS


def test_tabs_and_line_breaks_become_blanks_and_an_empty_list_a_header(tmp_path, script):
    odd = '[{"url": " http://a.b/1.jpg\\n", "caption": "a\\tdog\\r\\nruns"}]'
    for text, rows in ((odd, b"http://a.b/1.jpg\ta dog runs\n"), (" [ ] ", b"")):
        (tmp_path / "in.json").write_text(text)
        assert script.main([str(tmp_path / "in.json"), "-o", str(tmp_path / "out.tsv")]) == 0
        assert (tmp_path / "out.tsv").read_bytes() == b"url\tcaption\n" + rows


def test_entries_without_url_or_caption_are_left_out_and_counted(tmp_path, script, capsys):
    source = tmp_path / "in.json"
    broken = [{"url": "u"}, {"url": "", "caption": "c"}, {"url": "u", "caption": None}, "text", 7, {}, HALF]
    source.write_text(json.dumps([*broken, {"url": "u", "caption": "c"}]))
    assert script.main([str(source)]) == 0
    out = capsys.readouterr().out
    assert "1 pairs; 7 entries left out" in out
    assert 'left out: {"url": "u"}' in out


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"url": "u", "caption": "c"}, {"url": "u", "cap', "character 31: "),
        ('[{"url": "u", "caption": "c"}', "character 1: the file ends in the middle of the list"),
        ('{"annotations": []}', "character 0: '[' expected"),
        ('[{"url": "u", "caption": "c"}]\n[{"url": "v", "caption": "d"}]', "character 30: extra data after the list"),
        ("[] x", "character 2: extra data"),
        ("<html>", "character 0: '[' expected"),
        ("[" * 100_000, "character 1: "),
        ("", "character 0: '[' expected"),
    ],
)
def test_broken_json_is_named_by_its_place_and_leaves_no_output(tmp_path, script, capsys, text, place):
    source = tmp_path / "in.json"
    source.write_text(text)
    assert script.main([str(source)]) == 2
    assert place in capsys.readouterr().err
    assert not (tmp_path / "in.tsv").exists()
    source.unlink()
    assert script.main([str(source)]) == 2
    assert "in.json: No such file or directory" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from Linux's /proc")
def test_file_larger_than_the_memory_allowed_is_converted(tmp_path):
    source = tmp_path / "in.json"
    entry = json.dumps({"url": "http://a.b/1.jpg", "caption": "word " * 100})
    count = 140_000  # 76 MB of text
    source.write_text(f"[{', '.join([entry] * count)}]")
    code = (
        "import re, runpy\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "finally: print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    command, environment = [sys.executable, "-c", code, str(source)], {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert f"{count:,} pairs; 0 entries left out" in done.stdout
    assert int(done.stdout.split()[-1]) * 1024 < 60e6 < source.stat().st_size

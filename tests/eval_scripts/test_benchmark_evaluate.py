"""`benchmarks/evaluate.py`: all ways are measured and compared, and the section goes into a file."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark(load_script):
    """By its file: a package of that name may be installed."""
    sys.path.append(str(BENCHMARKS))  # scripts find each other in their own folder
    return load_script("benchmarks/evaluate.py")


def test_run_folder_is_measured_in_both_ways_and_reported(benchmark, shared, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    document = tmp_path / "performance.md"
    document.write_text("# Performance\n\nKept.\n")
    arguments = ["--cfg-path", str(shared.config), "--run", str(shared.folder), "--write", str(document)]
    arguments += ["--images", "2", "--repeats", "1", "--metrics", "BLEU", "--skip-plain"]
    assert benchmark.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "2 checkpoints on 2 images (flickr30k_grounded_detail, test," in shown
    one, several = (float(number) for number in re.findall(r"^\|.*, s \| ([\d.]+)", shown, re.MULTILINE))
    (ratio,) = re.findall(r"\| 2 runs / one run \| ([\d.]+)", shown)
    assert float(ratio) == pytest.approx(several / one, rel=0.02)
    assert str(shared.folder) not in shown
    assert document.read_text().startswith("# Performance\n\nKept.\n\n<!-- evaluate: begin -->\n## Several checkpoints")


def test_plain_run_says_and_scores_what_an_evaluation_does(benchmark, shared, complete, tmp_path):
    plain_evaluation = importlib.import_module("plain_evaluation")
    checkpoint = shared.folder / "checkpoint_1.pth"
    arguments = ["--cfg-path", str(shared.config), "--ckpt", str(checkpoint), "--save", str(tmp_path)]
    assert plain_evaluation.main(arguments) == 0
    plain = json.loads((tmp_path / plain_evaluation.RESULT).read_text())
    ours = json.loads((complete / "captions_epoch_1.json").read_text())
    assert plain["captions"] == {one["image_id"]: one["caption"] for one in ours}
    facts = json.loads((complete / "metrics.json").read_text())
    assert plain["scores"] == facts["checkpoints"][2]["scores"]


def test_section_names_the_plain_runs_and_their_ratios(benchmark, complete):
    args = benchmark.parse_args(["--cfg-path", "x.yaml", "--ckpt", "a.pth"])
    facts = json.loads((complete / "metrics.json").read_text())
    shown = benchmark.report(args, facts, [benchmark.Timing(together=2.0, apart=5.0, plain=40.0, same=32)])
    assert "32 of its 33 captions are those of the other runs" in shown
    assert "| 3 runs / one run | 2.50 |" in shown
    assert "| 3 plain runs / 3 runs | 8.00 |" in shown
    assert "| 3 plain runs / one run | 20.00 |" in shown


def test_scores_of_the_same_captions_must_be_the_same(benchmark):
    ours = {"name": "a", "scores": {"CIDEr": 0.5}, "captions": [{"image_id": "1", "caption": "A dog."}]}
    plain = {"captions": {"1": "A dog."}, "scores": {"CIDEr": 0.5}}
    assert benchmark.same_captions(ours, plain) == 1
    assert benchmark.same_captions(ours, {"captions": {"1": "A cat."}, "scores": {"CIDEr": 0.4}}) == 0
    with pytest.raises(benchmark.RunError, match="scores of 'a' are not those of pycocoevalcap"):
        benchmark.same_captions(ours, plain | {"scores": {"CIDEr": 0.4}})


def test_one_checkpoint_is_no_comparison_and_a_failing_evaluation_is_shown_with_its_reason(benchmark, shared, capsys):
    for checkpoints, reason in ((["a.pth"], "two checkpoints"), (["a=gone.pth", "b=gone.pth"], "no file gone.pth")):
        assert benchmark.main(["--cfg-path", str(shared.config), "--ckpt", *checkpoints]) == 2
        assert reason in capsys.readouterr().err

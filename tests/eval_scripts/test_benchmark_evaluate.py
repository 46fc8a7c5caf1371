"""`benchmarks/evaluate.py`: all ways are measured and compared, and the section goes into a file."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark(load_script):
    """By its file: a package of that name may be installed."""
    sys.path.append(str(BENCHMARKS))  # scripts find each other in their own folder
    return load_script("benchmarks/evaluate.py")


def test_run_folder_is_measured_in_all_ways_and_reported(benchmark, shared, warm, monkeypatch, tmp_path, capsys):
    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        started = warm.script(*command[1:], cwd=BENCHMARKS.parent, path=(BENCHMARKS,))
        return subprocess.CompletedProcess(command, started.wait()[0], "", started.text())

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    document = tmp_path / "performance.md"
    document.write_text("# Performance\n\nKept.\n")
    arguments = ["--cfg-path", str(shared.config), "--run", str(shared.folder), "--write", str(document)]
    assert benchmark.main([*arguments, "--images", "5", "--repeats", "1", "--metrics", "BLEU"]) == 0
    shown = capsys.readouterr().out
    assert "2 checkpoints on 5 images (flickr30k_grounded_detail, test," in shown
    assert "10 of its 10 captions are those of the other runs" in shown  # their scores must be the same, then
    one, several, plain = (float(number) for number in re.findall(r"^\|.*, s \| ([\d.]+)", shown, re.MULTILINE))
    ratios = {"2 runs / one run": several / one, "2 plain runs / 2 runs": plain / several}
    for name, ratio in (ratios | {"2 plain runs / one run": plain / one}).items():
        assert float(re.search(rf"\| {name} \| ([\d.]+)", shown)[1]) == pytest.approx(ratio, rel=0.1)  # of tenths
    assert str(shared.folder) not in shown
    assert document.read_text().startswith("# Performance\n\nKept.\n\n<!-- evaluate: begin -->\n## Several checkpoints")


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

"""`benchmarks/evaluate_checkpoints.py`: both ways are measured and compared, and the section goes into a file."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evaluate_checkpoints.py"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.append(str(SCRIPT.parent))  # scripts find each other in their own folder
    spec = importlib.util.spec_from_file_location("evaluate_checkpoints", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_run_folder_is_measured_in_both_ways_and_reported(benchmark, shared, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    document = tmp_path / "performance.md"
    document.write_text("# Performance\n\nKept.\n")
    arguments = ["--cfg-path", str(shared.config), "--run", str(shared.folder), "--write", str(document)]
    assert benchmark.main([*arguments, "--images", "2", "--repeats", "1", "--metrics", "BLEU"]) == 0
    shown = capsys.readouterr().out
    assert "2 checkpoints on 2 images (flickr30k_grounded_detail, test," in shown
    seconds = [float(number) for number in re.findall(r"^\|.*, s \| ([\d.]+)", shown, re.MULTILINE)]
    (ratio,) = re.findall(r"\| times faster \| ([\d.]+)", shown)
    assert float(ratio) == pytest.approx(seconds[1] / seconds[0], rel=0.02)
    assert str(shared.folder) not in shown
    assert document.read_text().startswith(
        "# Performance\n\nKept.\n\n<!-- evaluate_checkpoints: begin -->\n## Several checkpoints"
    )


def test_difference_between_the_ways_is_an_error(benchmark, tmp_path, monkeypatch):
    args = benchmark.parse_args(["--cfg-path", "x.yaml", "--ckpt", "a.pth", "b.pth"])
    names = iter(["together", "apart_0", "apart_1"])
    rows = {name: [{"name": "a", "scores": {}, "captions": [name]}] for name in ("apart_0", "apart_1")}
    rows["together"] = [*rows["apart_0"], {"name": "a", "scores": {}, "captions": ["other"]}]
    monkeypatch.setattr(benchmark, "_evaluate", lambda *given: float(len(next(names))))
    monkeypatch.setattr(benchmark, "_results", lambda folder: rows[folder.name])
    with pytest.raises(benchmark.RunError, match="captions or scores of 'a' are not those of its own process"):
        benchmark._repeat(args, ["a.pth", "b.pth"], [], tmp_path, apart_first=False)


def test_one_checkpoint_is_no_comparison(benchmark, shared, capsys):
    assert benchmark.main(["--cfg-path", str(shared.config), "--ckpt", "a.pth"]) == 2
    assert "two checkpoints" in capsys.readouterr().err


def test_failing_evaluation_is_shown_with_its_reason(benchmark, shared, capsys):
    assert benchmark.main(["--cfg-path", str(shared.config), "--ckpt", "a=gone.pth", "b=gone.pth"]) == 2
    assert "there is no file gone.pth" in capsys.readouterr().err

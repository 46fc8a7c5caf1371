"""A run from its first line to its last file."""

import json
import re

from minigpt4.common.start_clock import PHASES


def test_run_trains_saves_each_epoch_and_logs(tiny):
    result = tiny.train()
    (run,) = tiny.runs()
    names = {path.name for path in run.iterdir()}
    expected = {"checkpoint_0.pth", "checkpoint_0.json", "checkpoint_1.pth", "checkpoint_1.json", "log.txt", "run.json"}
    assert expected <= names
    assert "number of trainable parameters: 4704" in result.stderr
    assert "20 steps x 2 = 40 samples" in result.stderr
    (start,) = re.findall(r"Start-up took .*", result.stderr)
    assert re.fullmatch(
        r"Start-up took [\d.]+ s: " + ", ".join(rf"{name} [\d.]+" for name in [*PHASES, "other"]), start
    )
    epochs = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in epochs] == [0, 1]
    assert float(epochs[1]["train_loss"]) < float(epochs[0]["train_loss"])

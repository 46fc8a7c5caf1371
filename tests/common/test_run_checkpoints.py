"""Checkpoints of runs on disk: what counts as whole, what is found, what is deleted."""

import json
import logging
import os
import subprocess
from pathlib import Path

import pytest
import torch

from minigpt4.common.checkpoint import (
    amend_card,
    card_path,
    drop_leftovers,
    drop_old,
    newest_checkpoint,
    read_card,
    read_checkpoint,
    save_checkpoint,
)
from minigpt4.common.errors import WeightsError

FULL = OSError(28, "No space left on device")


@pytest.fixture
def save(tmp_path):
    """Saves a checkpoint whose weight is its iteration; returns its path."""

    def save(iteration, *, name=None, run="20260101_000000", started="2026-01-01", job="minigpt4", **card):
        path = tmp_path / run / (name or f"checkpoint_iter_{iteration}.pth")
        path.parent.mkdir(exist_ok=True)
        card |= {"job_name": job, "run_started": started, "iteration": iteration}
        save_checkpoint(path, {"model": {"w": torch.full((100,), float(iteration))}}, card)
        return path

    return save


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def require_whole(path: Path, iteration: int) -> None:
    """The checkpoint and its card are there, and nothing else."""
    assert read_checkpoint(path)["model"]["w"].tolist() == [iteration] * 100
    card = read_card(path)
    assert (card["iteration"], card["file"], card["bytes"]) == (iteration, path.name, path.stat().st_size)
    assert sorted(path.parent.iterdir()) == [card_path(path), path]


def test_card_is_written_last_and_the_old_one_goes_before_the_new_file_comes(save, monkeypatch):
    """What a killed save leaves is deleted, and nothing else."""
    path, seen = save(3), []
    (path.parent / ".checkpoint_iter_2.pth.77.part").write_bytes(b"half")
    drop_leftovers(path.parent)
    replace = Path.replace

    def watch(old, new):
        seen.append((new.name, card_path(path).exists()))
        return replace(old, new)

    monkeypatch.setattr(Path, "replace", watch)
    save(3)
    assert seen == [("checkpoint_iter_3.pth", False), ("checkpoint_iter_3.json", False)]
    require_whole(path, 3)


@pytest.mark.parametrize("broken", [FULL, RuntimeError("unexpected pos 1 vs 2"), "fsync of the card"])
def test_failed_save_leaves_the_file_of_this_name_whole(save, monkeypatch, broken):
    path, fsync, calls = save(3), os.fsync, []

    def fail(content, file):
        file.write(b"half")
        raise broken

    def fail_at_the_card(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise FULL
        fsync(descriptor)

    if isinstance(broken, Exception):
        monkeypatch.setattr(torch, "save", fail)
    else:
        monkeypatch.setattr(os, "fsync", fail_at_the_card)
    with pytest.raises(WeightsError, match=r"checkpoint_iter_3.pth: could not be saved"):
        save(3)
    require_whole(path, 3)


def test_content_that_is_not_what_the_card_says_is_refused_and_without_a_card_it_is_read(save):
    path, without = save(3), save(4)
    damage(path)
    with pytest.raises(WeightsError, match=r"checkpoint_iter_3\.json says; take an earlier checkpoint"):
        read_checkpoint(path)
    card_path(without).unlink()
    assert read_checkpoint(without)["model"]["w"][0] == 4
    torch.save({"model": {}, "optimizer": {"state": [{"exp_avg": torch.ones(1).expand(9)}]}}, without)
    with pytest.raises(WeightsError, match=rf"{without}: exp_avg is an expanded view"):
        read_checkpoint(without)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", '{"iteration": 3}'),
        *({"sha256": 7}, {"iteration": "3"}, {"run_number": [1]}, {"run_started": 5}, {"best_loss": "low"}),
        *({"llm_fingerprint": {}}, {"vision_fingerprints": "abc"}),
    ],
)
def test_card_that_is_no_card_counts_as_none(save, tmp_path, text):
    good, path = save(1), save(3)
    card_path(path).write_text(text if isinstance(text, str) else json.dumps(read_card(path) | text))
    assert read_card(path) is None
    assert newest_checkpoint(tmp_path, "minigpt4") == good
    drop_old(path.parent, 1)
    assert path.exists()


def test_newest_passes_over_what_is_damaged_or_half_written_and_says_so(save, tmp_path, caplog):
    assert newest_checkpoint(tmp_path, "minigpt4") is newest_checkpoint(tmp_path / "missing", "minigpt4") is None
    good, damaged, half = save(9), save(10), save(11)
    save(12, job="other")
    save(13, name="checkpoint_best.pth")
    assert newest_checkpoint(tmp_path, "minigpt4") == half  # by number, not by name
    damage(damaged)
    card_path(half).unlink()
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path, "minigpt4") == good
    assert f"{damaged} is damaged and is passed over" in caplog.text
    assert f"{half} has no card that can be read" in caplog.text


def test_newest_is_of_the_run_with_the_highest_number_though_the_clock_was_set_back(save, tmp_path):
    last = save(70, run="20270101_000000", started="2027-01-01")  # from before there were numbers
    earlier = save(50, run="20260101_000000", started="2026-01-01")
    assert newest_checkpoint(tmp_path, "minigpt4") == last
    damage(last)
    assert newest_checkpoint(tmp_path, "minigpt4") == earlier
    save(50, run="20260102_000000", started="2026-01-01", run_number=1)
    later = save(2, run="20200101_000000", started="2020-01-01", run_number=2)
    assert newest_checkpoint(tmp_path, "minigpt4") == later


def test_keep_last_deletes_the_oldest_iteration_checkpoints_with_their_cards_only(save):
    for iteration in (9, 10, 11):
        save(iteration)
    epoch, best = save(5, name="checkpoint_0.pth"), save(5, name="checkpoint_best.pth")
    drop_old(epoch.parent, None)
    assert len(list(epoch.parent.glob("*.pth"))) == 5
    drop_old(epoch.parent, 2)
    left = {path.name for path in epoch.parent.iterdir()}
    kept = ["checkpoint_iter_10", "checkpoint_iter_11", epoch.stem, best.stem]
    assert left == {f"{name}.{suffix}" for name in kept for suffix in ("pth", "json")}


def test_a_disk_that_turns_read_only_is_named_as_the_cause(disk, monkeypatch, caplog):
    path, content = disk / "checkpoint_0.pth", {"model": {"w": torch.ones(3)}}
    save_checkpoint(path, content, {"iteration": 1})
    old = disk / "checkpoint_iter_0.pth"
    save_checkpoint(old, content, {"iteration": 0})
    save_checkpoint(disk / "checkpoint_iter_1.pth", content, {"iteration": 1})
    (disk / ".checkpoint_1.pth.1.part").write_bytes(b"half")
    replace = Path.replace

    def turn_read_only(old, new):
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        return replace(old, new)

    monkeypatch.setattr(Path, "replace", turn_read_only)
    with pytest.raises(WeightsError, match=r"checkpoint_iter_2.pth: could not be saved: .*Read-only file system"):
        save_checkpoint(disk / "checkpoint_iter_2.pth", content, {"iteration": 2})
    with pytest.raises(WeightsError, match=r"checkpoint_0.json: could not be written: .*Read-only"):
        amend_card(path, valid_loss=1.0)
    drop_leftovers(disk)
    drop_old(disk, 1)
    assert f"{old}: cannot be deleted (Read-only file system)" in caplog.text
    assert read_checkpoint(path)["model"]["w"].sum() == 3

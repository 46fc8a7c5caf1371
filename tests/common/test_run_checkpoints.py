"""Checkpoints of runs on disk: what counts as whole, what is found, what is deleted."""

import json
import logging
import os
import subprocess

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


def _damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_saved_content_and_card_come_back(save):
    path = save(3)
    assert torch.equal(read_checkpoint(path)["model"]["w"], torch.full((100,), 3.0))
    card = read_card(path)
    assert card["iteration"] == 3
    assert card["file"] == path.name
    assert card["bytes"] == path.stat().st_size
    assert sorted(path.parent.iterdir()) == [card_path(path), path]


def test_card_is_written_last_and_the_old_one_goes_before_the_new_file_comes(save, monkeypatch):
    path, seen = save(3), []
    replace = type(path).replace

    def watch(old, new):
        seen.append((new.name, card_path(path).exists()))
        return replace(old, new)

    monkeypatch.setattr(type(path), "replace", watch)
    save(3)
    assert seen == [("checkpoint_iter_3.pth", False), ("checkpoint_iter_3.json", False)]


@pytest.mark.parametrize("broken", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 1 vs 2")])
def test_failed_save_leaves_the_file_of_this_name_whole(save, monkeypatch, broken):
    path = save(3)

    def fail(content, file):
        file.write(b"half")
        raise broken

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(WeightsError, match=r"could not be saved.*Earlier checkpoints are untouched"):
        save(3)
    assert read_checkpoint(path)["model"]["w"][0] == 3
    assert read_card(path) is not None
    assert sorted(path.parent.iterdir()) == [card_path(path), path]


def test_failed_card_leaves_the_file_of_this_name_whole(save, monkeypatch):
    path, fsync, calls = save(3), os.fsync, []

    def fail_at_the_card(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_at_the_card)
    with pytest.raises(WeightsError, match="No space left"):
        save(3)
    assert read_checkpoint(path)["model"]["w"][0] == 3
    assert sorted(path.parent.iterdir()) == [card_path(path), path]


def test_content_that_is_not_what_the_card_says_is_refused(save):
    path = save(3)
    _damage(path)
    with pytest.raises(WeightsError, match=r"checkpoint_iter_3\.json says; take an earlier checkpoint"):
        read_checkpoint(path)


def test_checkpoint_without_a_card_can_be_read_by_its_path(save):
    path = save(3)
    card_path(path).unlink()
    assert read_checkpoint(path)["model"]["w"][0] == 3


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"iteration": 3}'])
def test_card_that_is_no_card_counts_as_none(save, text):
    path = save(3)
    card_path(path).write_text(text)
    assert read_card(path) is None


def test_newest_is_the_furthest_by_number_not_by_name(save, tmp_path):
    for iteration in (9, 10, 8):
        save(iteration)
    assert newest_checkpoint(tmp_path, "minigpt4").name == "checkpoint_iter_10.pth"


def test_newest_is_none_where_nothing_is(tmp_path):
    assert newest_checkpoint(tmp_path, "minigpt4") is None
    assert newest_checkpoint(tmp_path / "missing", "minigpt4") is None


def test_newest_passes_over_what_is_damaged_or_half_written_and_says_so(save, tmp_path, caplog):
    good, damaged, half = save(1), save(2), save(3)
    _damage(damaged)
    card_path(half).unlink()
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path, "minigpt4") == good
    assert f"{damaged} is damaged and is passed over" in caplog.text
    assert f"{half} has no card that can be read" in caplog.text


def test_newest_is_of_the_run_that_started_last_though_another_is_further(save, tmp_path):
    save(50)
    later = save(2, run="20260101_000000_2", started="2026-01-02")
    assert newest_checkpoint(tmp_path, "minigpt4") == later
    _damage(later)
    assert newest_checkpoint(tmp_path, "minigpt4").name == "checkpoint_iter_50.pth"


def test_newest_is_never_of_another_job_nor_the_best(save, tmp_path):
    own = save(1)
    save(2, job="other")
    save(3, name="checkpoint_best.pth")
    assert newest_checkpoint(tmp_path, "minigpt4") == own


def test_keep_last_deletes_the_oldest_iteration_checkpoints_with_their_cards_only(save):
    for iteration in (9, 10, 11):
        save(iteration)
    epoch, best = save(5, name="checkpoint_0.pth"), save(5, name="checkpoint_best.pth")
    drop_old(epoch.parent, 2)
    left = {path.name for path in epoch.parent.iterdir()}
    kept = ["checkpoint_iter_10", "checkpoint_iter_11", epoch.stem, best.stem]
    assert left == {f"{name}.{suffix}" for name in kept for suffix in ("pth", "json")}


def test_keep_last_unset_keeps_all(save):
    folder = [save(iteration) for iteration in (1, 2, 3)][0].parent
    drop_old(folder, None)
    assert len(list(folder.glob("*.pth"))) == 3


def test_leftovers_of_killed_saves_are_deleted_and_nothing_else(save):
    path = save(1)
    (path.parent / ".checkpoint_iter_2.pth.77.tmp").write_bytes(b"half")
    (path.parent / ".checkpoint_iter_2.json.77.tmp").write_bytes(b"{")
    drop_leftovers(path.parent)
    assert sorted(path.parent.iterdir()) == [card_path(path), path]


def test_card_is_plain_json(save):
    assert json.loads(card_path(save(1)).read_text())["sha256"]


def test_newest_is_of_the_run_with_the_highest_number_though_the_clock_was_set_back(save, tmp_path):
    save(50, run="20260101_000000", started="2026-01-01", run_number=1)
    later = save(2, run="20200101_000000", started="2020-01-01", run_number=2)
    save(70, run="20270101_000000", started="2027-01-01")  # from before there were numbers
    assert newest_checkpoint(tmp_path, "minigpt4") == later


@pytest.mark.parametrize(
    "fact",
    [
        {"sha256": 7},
        {"iteration": "3"},
        {"run_number": [1]},
        {"run_started": 5},
        {"best_loss": "low"},
        {"llm_fingerprint": {}},
        {"vision_fingerprints": "abc"},
    ],
)
def test_a_card_with_something_else_in_its_facts_counts_as_none(save, tmp_path, fact):
    good, path = save(1), save(3)
    card_path(path).write_text(json.dumps(read_card(path) | fact))
    assert read_card(path) is None
    assert newest_checkpoint(tmp_path, "minigpt4") == good
    drop_old(path.parent, 1)


def test_a_disk_that_turns_read_only_is_named_as_the_cause(disk, monkeypatch, caplog):
    path, content = disk / "checkpoint_0.pth", {"model": {"w": torch.ones(3)}}
    save_checkpoint(path, content, {"iteration": 1})
    old = disk / "checkpoint_iter_0.pth"
    save_checkpoint(old, content, {"iteration": 0})
    save_checkpoint(disk / "checkpoint_iter_1.pth", content, {"iteration": 1})
    (disk / ".checkpoint_1.pth.1.tmp").write_bytes(b"half")
    replace = type(path).replace

    def turn_read_only(old, new):
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        return replace(old, new)

    monkeypatch.setattr(type(path), "replace", turn_read_only)
    with pytest.raises(WeightsError, match=r"checkpoint_iter_2.pth: could not be saved: .*Read-only file system"):
        save_checkpoint(disk / "checkpoint_iter_2.pth", content, {"iteration": 2})
    with pytest.raises(WeightsError, match=r"checkpoint_0.json: could not be written: .*Read-only"):
        amend_card(path, valid_loss=1.0)
    drop_leftovers(disk)
    drop_old(disk, 1)
    assert f"{old}: cannot be deleted (Read-only file system)" in caplog.text
    assert read_checkpoint(path)["model"]["w"].sum() == 3

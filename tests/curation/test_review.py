"""Reviewing without a browser: whom a record is shown to, what is kept of verdicts, and what they say of the set."""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from minigpt4.common.errors import ConfigError, RunError, SampleError
from minigpt4.curation import review as module
from minigpt4.curation.records import FILES
from minigpt4.curation.review import Review, VerdictFile, add_arguments, main, near_rules
from minigpt4.evaluation.bootstrap import agreement, wilson

REPOSITORY = Path(__file__).parents[2]
RECORDS, REVIEWS = FILES["filter"], FILES["review"]
WRITER = """
import sys
from pathlib import Path
from minigpt4.curation.review import Review, VerdictFile
assert "torch" not in sys.modules  # which a page of texts should not wait for
records = [{"id": str(number), "image": "a.jpg", "text": "A dog."} for number in range(5_000)]
review = Review(records, VerdictFile(Path(sys.argv[1])))
for number in range(int(sys.argv[3])):
    review.judge(sys.argv[2], str(number), "edit", f"A dog, number {number}. " * 400)
    print(number, flush=True)
"""


def records(count, **fields):
    return [{"id": str(n), "image": "a.jpg", "text": f"A dog and {n} cats.", **fields} for n in range(count)]


def line(key, reviewer="anna", verdict="accept", **fields):
    return json.dumps({"id": key, "reviewer": reviewer, "verdict": verdict, **fields}) + "\n"


def said(path):
    """What counts, by record and reviewer."""
    file = VerdictFile(path)
    file.refresh()
    return {(key, name): one["verdict"] for key, own in file.latest.items() for name, one in own.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / REVIEWS


@pytest.fixture
def review(path):
    return Review(records(20), VerdictFile(path))


def work(review, *names):
    """Everybody accepts what they are shown, in turn, while there is something; what each judged, in order."""
    judged = {name: [] for name in names}
    while shown := {name: keys[0] for name in names if (keys := review.show(name))}:
        for name, key in shown.items():
            review.judge(name, key, "accept")
            judged[name].append(key)
    return judged


# Whom a record is shown to


def test_the_order_is_that_of_a_hash_and_a_sample_is_its_beginning(path):
    everything = Review(records(50), VerdictFile(path)).show("anna")
    order = list(Review(records(50), VerdictFile(path)).records)
    assert everything == order[:4]
    assert order != sorted(order, key=int)
    assert list(Review(records(50)[::-1], VerdictFile(path)).records) == order
    assert list(Review(records(50), VerdictFile(path), sample=7).records) == order[:7]
    assert [key for key in Review(records(60), VerdictFile(path)).records if int(key) < 50] == order


def test_worst_first_goes_by_failed_and_near_rules(path):
    given = records(5)
    given[1]["near_rules"] = ["too long"]
    given[3] |= {"failed_rules": ["too long"], "near_rules": ["signs"]}
    given[3]["review"] = [{"step": "filter", "rule": "caption", "evidence": "dog"}]
    order = list(Review(given, VerdictFile(path), order="worst").records)
    assert order[:2] == ["3", "1"]
    assert order[2:] == [key for key in Review(given, VerdictFile(path)).records if key in "024"]
    assert near_rules(given[3]) == ["too long", "signs", "caption (dog)"]


def test_a_tenth_is_judged_by_two_and_all_else_by_one(path):
    review = Review(records(200), VerdictFile(path), overlap=0.1)
    twice = [place for place, key in enumerate(review.records) if review.wanted[key] == 2]
    assert len(twice) == 20
    assert [place // 10 for place in twice] == list(range(20))  # evenly spread
    judged = work(review, "anna", "ben", "carl", "dora")
    assert Counter(key for keys in judged.values() for key in keys) == Counter(review.wanted)
    assert all(len(keys) > 40 for keys in judged.values())


def test_copies_whose_records_are_dealt_can_be_joined(tmp_path):
    names, joined = ["anna", "ben", "carl"], b""
    for name in names:
        review = Review(records(200), VerdictFile(tmp_path / name), overlap=0.1, reviewers=names)
        assert work(review, name)[name]
        joined += (tmp_path / name).read_bytes()
    (tmp_path / REVIEWS).write_bytes(joined)
    review = Review(records(200), VerdictFile(tmp_path / REVIEWS), overlap=0.1, reviewers=names)
    assert not any(map(review.show, names))
    latest = review.verdicts.latest
    assert {key: len(own) for key, own in latest.items()} == review.wanted
    assert len({frozenset(own) for own in latest.values() if len(own) == 2}) == 3  # everybody with everybody


def test_two_at_once_see_different_records_until_one_has_gone(review, monkeypatch):
    first, second = review.show("anna"), review.show("ben")
    assert second == first[1:] + second[-1:]
    assert review.show("anna") == [first[0], *second[1:]]
    monkeypatch.setattr(module, "HELD", 0)
    assert review.show("ben")[0] == first[0]


def test_skipped_records_come_last_and_back_goes_through_what_was_judged(review):
    order = list(review.records)
    assert review.back("anna", order[0]) == order[0]
    review.skip("anna", order[0])
    for key in order[1:4]:
        assert review.show("anna")[0] == key
        review.judge("anna", key, "accept")
    review.skip("anna", order[4])
    assert review.queue("anna") == [*order[5:], order[0], order[4]]
    assert [review.back("anna", order[place]) for place in (5, 3, 1)] == [order[3], order[2], order[1]]
    assert review.show("anna", order[2]) == [order[2], *order[5:8]]


# What is kept


def test_a_verdict_is_a_line_and_the_next_start_goes_on_there(review, path):
    keys = list(review.records)
    text = review.records[keys[0]]["text"]
    review.show("Änna")
    review.judge("Änna", keys[0], "edit", f" {text}\n", ["repeats"])
    review.judge("Änna", keys[1], "edit", "A dog — <b>& two cats</b>.")
    review.judge("Änna", keys[2], "reject", "ignored", ["other", "invented", "no such reason"])
    lines = [json.loads(one) for one in path.read_text().splitlines()]
    assert [one.pop("id") for one in lines] == keys[:3]
    assert all(0 <= one.pop("seconds") < 60 and one.pop("time").startswith("20") for one in lines)
    assert lines == [
        {"reviewer": "Änna", "verdict": "accept", "reasons": []},
        {"reviewer": "Änna", "verdict": "edit", "text": "A dog — <b>& two cats</b>.", "reasons": []},
        {"reviewer": "Änna", "verdict": "reject", "reasons": ["invented", "other"]},
    ]
    again = Review(records(20), VerdictFile(path))
    assert again.show("Änna") == keys[3:7]
    assert again.progress("Änna").startswith("3 of 20 · ")
    assert again.progress("ben") == "0 of 16"  # one is before somebody else
    again.judge("Änna", keys[0], "reject")
    review.verdicts.refresh()
    assert review.verdicts.latest[keys[0]]["Änna"]["verdict"] == "reject"


def test_pace_and_time_left_do_without_pauses(review, path):
    path.write_text("".join(line(str(n), seconds=seconds, time=n) for n, seconds in enumerate((20, 40, 9_999))))
    assert review.progress("anna") == "3 of 20 · 1.0 verdicts a minute · 17 min left"


@pytest.mark.parametrize(
    ("key", "verdict", "text", "reason"),
    [("20", "accept", "", "no such record"), ("", "reject", "", "no such record"), ("1", "edit", " \n", "is empty")],
)
def test_verdicts_that_cannot_be(review, path, key, verdict, text, reason):
    with pytest.raises(SampleError, match=reason):
        review.judge("anna", key, verdict, text)
    assert not path.exists()


def test_a_disk_that_refuses_is_told(review, path):
    path.mkdir()
    with pytest.raises(RunError, match="give the verdict again"):
        review.verdicts.append({"id": "1"})


EARLY, LATE = {"time": "2026-01-01T23:59:00.000+00:00"}, {"time": "2026-01-02T00:00:00.500+00:00"}


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (line("1") + line("1", verdict="reject"), ["1 anna reject"]),
        (line("1", **LATE) + line("1", verdict="reject", **EARLY), ["1 anna accept"]),
        (line("1") + line("1", "ben", "reject"), ["1 anna accept", "1 ben reject"]),
        (line("1") + line("2")[:-9], ["1 anna accept"]),
        (line("1")[:-9] + line("2", text='{"id": "3"}'), ["2 anna accept"]),  # joined after a kill
        (line("1") + "\n[]\n{}\n" + line("2", verdict="maybe") + line(3), ["1 anna accept", "3 anna accept"]),
    ],
)
def test_what_counts_of_a_file(path, content, wanted):
    path.write_text(content)
    assert [f"{key} {name} {verdict}" for (key, name), verdict in said(path).items()] == wanted


def test_nothing_is_lost_when_two_processes_write_and_one_is_killed_at_any_moment(path):
    path.write_bytes(line("1").encode()[:-9])
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    start = [sys.executable, "-c", WRITER, str(path)]
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    killed = subprocess.Popen([*start, "anna", "5000"], **pipes)
    other = subprocess.Popen([*start, "ben", "100"], **pipes)
    written = [killed.stdout.readline() for _ in range(60)]
    killed.kill()
    written += killed.stdout.readlines()
    assert len(other.communicate()[0].split()) == 100
    keys = [key for key, name in said(path) if name == "anna"]
    assert len(keys) - len(written) in (0, 1)  # one may be written and not told
    assert {int(one) for one in written} <= {int(key) for key in keys}
    assert {int(key) for key, name in said(path) if name == "ben"} == set(range(100))


# What verdicts say


def test_the_summary(path):
    review = Review(records(40), VerdictFile(path), sample=30)
    keys = list(review.records)
    texts = [line(key, seconds=5, time=1) for key in keys[:20]]
    texts += [line(key, verdict="reject", reasons=["invented", "other"]) for key in keys[20:25]]
    texts += [line(keys[25], verdict="edit", text="A cat.")]
    texts += [
        line(key, "ben", verdict) for key, verdict in zip(keys[18:21], ("accept", "reject", "reject"), strict=True)
    ]
    texts += [line("outside", "carl")]
    path.write_text("".join(texts))
    found = review.summary()
    assert (found["records"], found["reviewed"]) == (30, 26)
    assert found["good"] == {"share": 19 / 26, "interval": wilson(19, 26)}
    assert found["good_with_edits"] == {"share": 20 / 26, "interval": wilson(20, 26)}
    assert found["reviewers"] == {"anna": {"accept": 20, "reject": 5, "edit": 1}, "ben": {"accept": 1, "reject": 2}}
    assert found["reasons"] == {"invented": 5, "other": 5}
    assert found["agreement"] == agreement([("accept", "accept"), ("accept", "reject"), ("reject", "reject")])


def test_a_part_that_is_no_random_sample_estimates_nothing(path):
    path.write_text(line("1"))
    assert Review(records(3), VerdictFile(path)).summary()["good"]["share"] == 1
    assert Review(records(3), VerdictFile(path), order="worst").summary()["good"] is None
    path.write_text("".join(map(line, "012")))
    assert Review(records(3), VerdictFile(path), order="worst").summary()["good"]["share"] == 1
    path.unlink()
    found = Review(records(3), VerdictFile(path)).summary()
    assert (found["good"], found["agreement"]) == (None, None)


# The command


def run(folder, *options):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    main(parser.parse_args([str(folder), *options]))


GONE = {"dropped": {"step": "filter", "rule": "signs", "evidence": "***"}}


def test_the_summary_is_printed_and_leaves_out_what_was_dropped(tmp_path, path, capsys):
    given = [*records(3), records(5)[3] | GONE, {"id": "4", **GONE}]
    (tmp_path / RECORDS).write_text("".join(json.dumps(one) + "\n" for one in given))
    path.write_text(line("1", verdict="reject"))
    run(tmp_path, "--summary")
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], found["reviewed"], found["good"]["share"]) == (3, 1, 0)


@pytest.mark.parametrize(
    ("content", "options", "error", "reason"),
    [
        (None, [], ConfigError, "4_filtered.jsonl is not there; the step `filter` writes it"),
        ([{"image": "a.jpg", "text": "A."}], [], SampleError, "4_filtered.jsonl, line 1, id: Field required"),
        (records(2, **GONE), [], ConfigError, "no records were kept"),
        (records(2), ["--overlap", "1.1"], ConfigError, "--overlap: 1.1 must be between 0 and 1"),
        (records(2), ["--sample", "0"], ConfigError, "--sample: 0 must be above 0"),
        (records(2), ["--auth", "me"], ConfigError, "USER:PASSWORD"),
    ],
)
def test_what_cannot_be_is_told(tmp_path, content, options, error, reason):
    if content:
        (tmp_path / RECORDS).write_text("".join(json.dumps(one) + "\n" for one in content))
    with pytest.raises(error, match=reason):
        run(tmp_path, *options)

"""Bad samples are counted exactly, written down, and stop the run when they are too many."""

import logging
from collections import Counter
from pathlib import Path

import pytest

from minigpt4.common.errors import SampleError
from minigpt4.common.utils import JsonLines
from minigpt4.datasets import BadSample, BadSampleMonitor

BROKEN = Path(__file__).parents[1] / "data" / "images"


def _monitor(folder=None, max_share=1.0, max_in_a_row=1000, **keys):
    return BadSampleMonitor(folder, max_share=max_share, max_in_a_row=max_in_a_row, **keys)


def _bad(count, reason="it is broken"):
    return [BadSample("birds/train", f"k{index}", "birds.json, line 3", reason) for index in range(count)]


def _written(folder):
    return JsonLines(folder / "bad_samples.jsonl").read()


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_counts_and_writes_every_bad_sample_of_each_source(workers, files, loaders, tools, tmp_path):
    monitor = _monitor(tmp_path, rank=1)
    members = [member for key in range(6) for member in files.pair(key)]
    members[3] = (members[3][0], b"{")
    members[6] = (members[6][0], (BROKEN / "avif_cut_in_transfer.jpg").read_bytes())
    shards = files.dataset("image_caption_shards", storage=str(files.tar("b.tar", members)))
    loader = loaders.train(
        files.records(10, missing=[2, 7]), shards, batch_size=1, num_workers=workers, ledger=monitor, seed=3
    )
    read = Counter(batch["source"] for batch in tools.take(loader, 60))
    counts = monitor.state_dict()
    assert {name: counts[f"{name}/train"][0] for name in read} == read
    written = Counter(record["source"] for record in _written(tmp_path))
    assert written == {source: bad for source, (_, bad) in counts.items()}
    assert min(written.values()) > 1


def test_share_above_the_limit_stops_with_counts_places_and_reasons_and_all_is_written(tmp_path):
    monitor = _monitor(tmp_path, max_share=0.01, rank=3)
    monitor.add("cats/train", good=100_000, bad=[], in_a_row=0)
    monitor.add("birds/train", good=1881, bad=_bad(19), in_a_row=1)
    with pytest.raises(SampleError) as error:
        monitor.add("birds/train", good=9, bad=_bad(1, "birds.json, line 3: no image"), in_a_row=1)
    for text in (
        "birds/train: 20 of 1,910 samples are bad (1.05%)",
        "run.max_bad_share, 1.00%",
        "birds.json, line 3: no image",
        "bad_samples.jsonl",
    ):
        assert text in str(error.value)
    where = {"source": "birds/train", "key": "k0", "file": "birds.json, line 3"}
    assert _written(tmp_path)[0] == {"rank": 3, **where, "reason": "it is broken"}
    assert len(_written(tmp_path)) == 20


def test_log_grows_with_the_logarithm_of_the_count_also_where_the_file_cannot_be_written(tmp_path, caplog):
    (tmp_path / "bad_samples.jsonl").mkdir()
    monitor = _monitor(tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            monitor.add("birds/train", good=99, bad=_bad(1), in_a_row=1)
    assert "cannot be written" in caplog.records[0].message
    assert len(caplog.records) == 1 + 10
    assert "512 of 51,200 samples are bad (1.00%)" in caplog.records[-1].message
    assert monitor.state_dict() == {"birds/train": [99_000, 1000]}


@pytest.mark.parametrize(
    ("max_share", "before", "good", "bad", "is_error"),
    [
        (0.01, [0, 0], 1980, 20, False),  # just at the limit
        (0.01, [0, 0], 3, 5, False),  # too few to judge
        (0.0, [0, 0], 3000, 1, True),
        (0.5, [10, 10], 0, 10, True),  # counted on from a checkpoint
    ],
)
def test_share_is_judged_from_twenty_bad_samples_on_unless_none_is_allowed(max_share, before, good, bad, is_error):
    monitor = _monitor(max_share=max_share)
    monitor.load_state_dict({"birds/train": before})
    if is_error:
        with pytest.raises(SampleError, match="run.max_bad_share"):
            monitor.add("birds/train", good=good, bad=_bad(bad), in_a_row=1)
    else:
        monitor.add("birds/train", good=good, bad=_bad(bad), in_a_row=1)
    assert monitor.state_dict() == {"birds/train": [before[0] + good, before[1] + bad]}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_in_a_row_stop_the_run(workers, files, loaders, tools):
    dataset = files.records(60, missing=range(5, 60))
    loader = loaders.train(dataset, num_workers=workers, ledger=_monitor(max_in_a_row=10))
    with pytest.raises(SampleError, match=r"1\d in a row, the limit run.max_bad_in_a_row") as error:
        tools.take(loader, 50)
    assert ".jpg does not exist" in str(error.value)


@pytest.mark.parametrize(("kind", "workers"), [("records", 0), ("records", 2), ("shards", 0), ("gone", 0)])
def test_source_without_one_good_sample_ends_with_an_error(kind, workers, files, loaders):
    storage = str(files.tar("bad.tar", [("a.json", b"{}"), ("b.json", b"{}")]))
    storage = f"{files.folder}/gone-{{0..2}}.tar" if kind == "gone" else storage
    records = kind == "records"
    dataset = files.records(3, missing=range(3)) if records else files.dataset("image_caption_shards", storage=storage)
    with pytest.raises(SampleError, match="100 of 100 samples are bad"):
        next(loaders.train(dataset, num_workers=workers, ledger=_monitor(max_in_a_row=100)))


def test_reader_gives_up_even_where_the_limits_allow_everything(files, loaders, monkeypatch):
    monkeypatch.setattr("minigpt4.datasets.datasets.dataloader_utils.MAX_BAD_IN_A_ROW", 1000)
    loader = loaders.train(files.records(2, missing=range(2)), ledger=_monitor(max_in_a_row=10**9))
    with pytest.raises(SampleError, match="nothing could be read, 1,000 samples in a row are bad"):
        next(loader)

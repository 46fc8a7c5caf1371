"""How a run begins: from scratch, from a file of the original code, with another number of processes."""

import json
import shutil

AUTO = "run.resume_ckpt_path=auto"


def test_auto_starts_from_scratch_leaves_a_finished_run_alone_and_goes_on_for_more_epochs(warm, make, tools):
    tiny = make("json")
    assert "No checkpoint of job minigpt4" in warm.train(tiny, AUTO).text()
    (run,) = tiny.runs()
    assert [step for step, _, _ in tools["logged"](run)] == list(range(14))
    before = {path.name: path.read_bytes() for path in run.glob("*.pth")}
    assert "Training finished" in warm.train(tiny, AUTO).text()
    assert {path.name: path.read_bytes() for path in run.glob("*.pth")} == before
    assert len(tools["logged"](run)) == 14
    warm.train(tiny, AUTO, "run.max_epoch=3")
    assert tiny.runs() == [run]
    assert [step for step, _, _ in tools["logged"](run)] == list(range(21))
    resumed = json.loads((run / "run.json").read_text())["resumed"]
    warm.train(tiny, AUTO, "run.job_name=other")
    _, second = tiny.runs()
    assert json.loads((second / "checkpoint_0.json").read_text())["job_name"] == "other"
    assert json.loads((run / "run.json").read_text())["resumed"] == resumed


def test_file_of_the_original_code_goes_on_at_the_next_epoch(warm, make, tools, parity_dir, tmp_path):
    tiny = make("json")
    published = shutil.copy(parity_dir / "train_main_checkpoint_0.pth", tmp_path)
    run = warm.train(tiny, f"run.resume_ckpt_path={published}")
    assert "holds no random state and no data position: the run goes on at the next epoch" in run.text()
    (folder,) = tiny.runs()
    assert [step for step, _, _ in tools["logged"](folder)] == list(range(7, 14))
    old = tools["final"](tmp_path, name="train_main_checkpoint_0.pth")
    state = tools["final"](folder)["optimizer"]["state"]
    assert [float(state[key]["step"]) for key in state] == [
        float(entry["step"]) + 7 for entry in old["optimizer"]["state"].values()
    ]


def test_other_number_of_processes_warns_and_goes_on_with_new_data(warm, make, tools):
    tiny = make("mixed")
    warm.train(tiny, "run.max_epoch=1")
    run = warm.train(tiny, AUTO, processes=2)
    assert "was saved by 1 processes, this run has 2" in run.text()
    assert "world_size (1 -> 2)" in run.text()
    (folder,) = tiny.runs()
    state = tools["final"](folder)["state"]
    assert len(state["ranks"]) == 2
    assert {source["era"] for rank in state["ranks"] for source in rank["data"]["sources"].values()} == {1}
    assert [step for step, _, _ in tools["logged"](folder)] == list(range(14))


def test_runs_started_together_have_folders_of_their_own(warm, make):
    tiny = make("json")
    runs = [warm.start(tiny, "run.max_epoch=1") for _ in range(3)]
    assert [run.wait() for run in runs] == [[0]] * 3
    assert len(tiny.runs()) == 3
    assert all((folder / "checkpoint_0.json").exists() for folder in tiny.runs())


def test_damaged_newest_checkpoint_is_passed_over_by_auto_and_refused_by_its_path(warm, make, tools):
    tiny = make("json")
    warm.train(tiny, "run.save_every_iters=3")
    (run,) = tiny.runs()
    whole = tools["final"](run)
    damaged = run / "checkpoint_1.pth"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    refused = warm.start(tiny, f"run.resume_ckpt_path={damaged}")
    assert refused.wait() == [2]
    assert "take an earlier checkpoint" in refused.text()
    again = warm.train(tiny, "run.save_every_iters=3", AUTO)
    assert f"{damaged} is damaged and is passed over" in again.text()
    assert f"Going on from {run / 'checkpoint_iter_12.pth'} at epoch 1, iteration 5" in again.text()
    assert tools["alike"](tools["final"](run), whole)


def test_count_of_updates_that_were_not_finite_goes_on(warm, make, tools):
    tiny = tools["plug_in"](make("json"), "not_finite", task="not_finite")
    options = ("run.save_every_iters=1", "run.max_nonfinite_steps=5")
    warm.train(tiny, *options, "run.iters_per_epoch=3", "run.max_epoch=1")
    run = warm.start(tiny, *options, "run.iters_per_epoch=3", "run.max_epoch=4", AUTO)
    assert run.wait() == [2]
    assert "update 4 was skipped: its loss is not finite (4 so far)" in run.text()
    assert "5 updates in a row were not finite" in run.text()

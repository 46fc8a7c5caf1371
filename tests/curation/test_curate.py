"""`scripts/curate.py`: images in, a folder for stage 2 out, through every step, kills and changes of mind."""

import csv
import io
import json
import re
import shutil
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageEnhance

from minigpt4.common.config import Config
from minigpt4.common.curation_schema import PROMPT, ExportConfig, SelectConfig
from minigpt4.common.errors import SampleError
from minigpt4.common.utils import write_lines
from minigpt4.curation.export import export
from minigpt4.curation.images import describe, select
from minigpt4.curation.records import CurationFolder
from minigpt4.curation.report import write_report
from minigpt4.datasets.builders import build_datasets
from minigpt4.inference.pipeline import pipeline
from minigpt4.processors import process_image

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "curate.py"
IMAGES = 6
DYING = """
import os, signal
from minigpt4.common import utils
from minigpt4.inference.captioning import AnswerStore

left, replace, add = int(os.environ["LEFT"]), utils.replace_durably, AnswerStore.add
def count():
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
def replace_or_die(part, path):
    count()
    replace(part, path)
def add_or_die(self, lines):
    lines = list(lines)
    if lines:
        with self.path.open("a") as file:
            file.write('{"image_id": "torn')
        count()
        self.keep()
    add(self, lines)
utils.replace_durably, AnswerStore.add = replace_or_die, add_or_die
"""


def picture(number: int) -> Image.Image:
    """Coarse noise: pHashes far apart."""
    pixels = np.random.default_rng(number).integers(20, 200, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((160, 120), Image.BICUBIC)


def jpeg(number: int) -> bytes:
    picture(number).save(buffer := io.BytesIO(), "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def script(load_script) -> ModuleType:
    return load_script("scripts/curate.py")


@pytest.fixture
def place(tmp_path, tiny_section) -> Path:
    """A folder with a shard, `tiny.yaml`, and the same images as files."""
    torch.set_num_threads(1)
    (tmp_path / "photos").mkdir()
    with tarfile.open(tmp_path / "00.tar", "w") as shard:
        for number in range(IMAGES):
            content = jpeg(number)
            (tmp_path / "photos" / f"10{number}.jpg").write_bytes(content)
            for ending, own in (("jpg", content), ("txt", f"caption {number}".encode())):
                entry = tarfile.TarInfo(f"./10{number}.{ending}")
                entry.size = len(own)
                shard.addfile(entry, io.BytesIO(own))
    template = {"end_sym": "###", "prompt_template": "###Human: {} ###Assistant: "}
    model = tiny_section(arch="minigpt4", model_type="pretrain_vicuna0", **template)
    run = {"num_workers": 0, "device": "cpu", "batch_size_eval": 2, "generation": {"max_new_tokens": 6}}
    off = ("least_tokens", "ngram_share", "signs", "language", "text_jaccard", "opening", "image_distance_review")
    curation = {
        "select": {"images": str(tmp_path / "00.tar"), "limit": None},
        "refine": {"by": "none"},
        "filter": dict.fromkeys(off) | {"failures": False, "caption": False},
    }
    whole = {"model": model, "datasets": {}, "run": run, "curation": curation}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(whole))
    return tmp_path


def arguments(place: Path, step: str, name: str = "curation", *more: str) -> list[str]:
    return [step, "--cfg-path", str(place / "tiny.yaml"), "--output", str(place / name), *more]


def files(folder: Path) -> dict[str, bytes]:
    """What a curation made, by name; not how it got there, nor the hidden part of a file that a kill leaves."""
    found = [file for file in folder.rglob("*") if file.is_file() and "progress" not in file.parts]
    found = [file for file in found if file.suffix not in (".lock", ".part")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


# Images


def test_images_come_from_folders_lists_and_shards_with_ids_that_stay(place):
    seed, photos = 0, place / "photos"
    (photos / "torn.jpg").write_bytes(b"no image")
    entries = [{"image": f"10{number}.jpg", "image_id": f"a/{number}", "caption": "x"} for number in range(IMAGES)]
    (place / "list.json").write_text(json.dumps(entries))
    by_source = {}
    for source, own in (("photos", {}), ("list.json", {"image_folder": str(photos)}), ("00.tar", {})):
        folder = CurationFolder(place / "of" / source)
        by_source[source] = select(folder, SelectConfig(str(place / source), limit=None, **own), seed)
        assert all(folder.image(one).read_bytes() for one in by_source[source])
        assert folder.read("select") == by_source[source]
    torn = by_source["photos"].pop()
    assert (torn["id"], torn["dropped"]["rule"]) == ("torn", "unreadable image")
    for key in ("sha256", "width", "height", "phash", "contrast"):
        assert len({json.dumps([one[key] for one in own]) for own in by_source.values()}) == 1
    ids = {source: [one["id"] for one in own] for source, own in by_source.items()}
    assert ids["photos"] == ids["00.tar"] == [f"10{number}" for number in range(IMAGES)]
    assert ids["list.json"] == [f"a_{number}" for number in range(IMAGES)]
    assert [one.get("caption") for one in by_source["00.tar"]] == [f"caption {number}" for number in range(IMAGES)]
    chosen = [select(CurationFolder(place / "drawn"), SelectConfig(str(photos), limit=3), seed) for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 3


def test_hashes_find_copies_of_images_and_no_others(tmp_path):
    distances = []
    for number in range(20):
        image = picture(number)
        made = {"half": image.resize((80, 60)), "bright": ImageEnhance.Brightness(image).enhance(1.2), "jpeg": image}
        for name, own in {"own": image, **made}.items():
            own.save(tmp_path / f"{number}{name}.jpg", quality=30 if name == "jpeg" else 95)
        hashes = [int(describe(tmp_path / f"{number}{name}.jpg")["phash"], 16) for name in ("own", *made)]
        distances += [(hashes[0] ^ other).bit_count() for other in hashes[1:]]
    assert max(distances) <= 6
    others = [int(describe(tmp_path / f"{number}own.jpg")["phash"], 16) for number in range(20)]
    assert min((one ^ other).bit_count() for one in others for other in others if one != other) > 10


# The whole way


def test_run_makes_a_folder_that_stage_2_reads_and_again_the_same_bytes(place, script, capsys):
    assert script.main(arguments(place, "run")) == 0
    folder = place / "curation"
    made, said = files(folder), capsys.readouterr().out
    assert all(f"{step}: {IMAGES} of {IMAGES} records" in said for step in ("select", "generate", "refine", "filter"))
    records = CurationFolder(folder).read("filter")
    for one in records:
        assert one["text"] == " ".join(one[name].strip() for name in ("first", "second"))
        assert 0 < one["tokens_first"] <= 80
        assert one["refined"] == one["text"]
    exported = json.loads(made["cc_sbu_align/filter_cap.json"])["annotations"]
    assert exported == [{"image_id": one["id"], "caption": one["text"]} for one in records]
    facts = json.loads(made["cc_sbu_align/curation.json"])
    assert (facts["records"], facts["selected"], facts["removed"]) == (IMAGES, IMAGES, {})
    assert facts["made_from"]["generate"]["decoding"]["max_new_tokens"] == 6
    report = json.loads(made["report.json"])
    assert [one["entered"] for one in report["funnel"]] == [IMAGES] * 4
    assert (report["second_turns"], report["lengths"]["kept"]["texts"]) == (IMAGES, IMAGES)
    assert script.main(arguments(place, "run")) == 0
    assert files(folder) == made


def test_run_by_an_endpoint_pays_once_and_the_report_counts_what_the_server_saw(place, script, chat_server):
    steps = [500, "length", "answer", "garbage", *["answer"] * IMAGES]
    chat_server.steps, chat_server.answer = list(steps), lambda request: request["messages"][-1]["content"]
    chat_server.headers, chat_server.usage = {"Retry-After": "0.01"}, {"prompt_tokens": 30, "completion_tokens": 7}
    endpoint = {"url": chat_server.url, "model": "mender", "at_once": 1, "price_in": 1.0, "price_out": 2.0}
    own = [f"curation.refine.{name}=0" for name in ("least_characters", "least_share")]
    own += [f"curation.refine.endpoint.{name}={value}" for name, value in endpoint.items()]
    command = arguments(place, "run", "curation", "--refine", "endpoint", "--options", *own)
    assert script.main(command) == 0
    report, requests = json.loads((place / "curation" / "report.json").read_text()), IMAGES + 2
    assert len(chat_server.requests) == requests
    counts = {"requests": requests, "retries": 1, "tokens_in": 30 * IMAGES, "tokens_out": 7 * IMAGES}
    faults = {"broken JSON": 1, "cut at the length limit": 1, "status 500": 1}
    assert report["requests"] == {**counts, "faults": faults, "price": pytest.approx(44 * IMAGES / 1e6)}
    by_step = {one["step"]: (one["entered"], one["left"], one["rules"]) for one in report["funnel"]}
    assert by_step["refine"] == (IMAGES, 1, {"cut at the length limit": 1})
    assert by_step["filter"] == (IMAGES - 1, 0, {})
    assert (report["exported"]["records"], report["refining"]["unchanged"]) == (IMAGES - 1, 1.0)
    before = files(place)
    assert script.main(command) == 0
    assert files(place) == before
    assert len(chat_server.requests) == requests


def test_second_turn_comes_up_to_the_limit_and_a_change_leaves_the_old_file(place, script, caplog):
    for step in ("select", "generate"):
        assert script.main(arguments(place, step)) == 0
    folder = CurationFolder(place / "curation")
    old, fewest = folder.file("generate").read_bytes(), min(one["tokens_first"] for one in folder.read("generate"))
    limit = ("--options", f"curation.generate.more_up_to={fewest}")
    assert script.main(arguments(place, "generate", "curation", *limit)) == 0
    records = folder.read("generate")
    assert all(("second" in one) == (one["tokens_first"] <= fewest) for one in records)
    alone = [one for one in records if "second" not in one]
    assert 0 < len(alone) < IMAGES
    assert all(one["text"] == one["first"].strip() for one in alone)
    facts = json.loads(folder.made_from_file("generate").read_text())["differs_from"]
    assert facts["changes"] == ["more_up_to"]
    assert facts["ids"] == [one["id"] for one in alone]
    assert (folder.path / facts["file"]).read_bytes() == old
    assert script.main(arguments(place, "generate")) == 0
    assert folder.file("generate").read_bytes() == old


@pytest.mark.parametrize(
    ("step", "kills"), [("select", (2, 5)), ("generate", (3, 4)), ("filter", (0, 1)), ("export", (1, 5))]
)
def test_after_kills_a_step_goes_on_and_makes_the_same_bytes(place, script, warm, step, kills):
    before = ("select", "generate", "refine", "filter")
    for earlier in before[: before.index(step)] if step in before else before:
        assert script.main(arguments(place, earlier, "whole")) == 0
    if step != "select":
        shutil.copytree(place / "whole", place / "torn")
    assert script.main(arguments(place, step, "whole")) == 0
    (place / "dying.py").write_text(DYING)
    (place / "dying.yaml").write_text("imports: [dying]\n" + (place / "tiny.yaml").read_text())
    command = [str(SCRIPT), *arguments(place, step, "torn")]
    command[command.index("--cfg-path") + 1] = str(place / "dying.yaml")
    for after in kills:
        assert warm.script(*command, cwd=REPOSITORY, path=(place,), env={"LEFT": str(after)}).wait() == [-9]
    assert script.main(arguments(place, step, "torn")) == 0
    whole, torn = (files(place / name) for name in ("whole", "torn"))
    assert whole == torn


def test_two_processes_make_what_one_makes(place, script, warm):
    assert script.main(arguments(place, "select", "one")) == 0
    shutil.copytree(place / "one", place / "two")
    assert script.main(arguments(place, "generate", "one")) == 0
    run = warm.script(SCRIPT, *arguments(place, "generate", "two"), cwd=REPOSITORY, processes=2)
    assert run.wait() == [0, 0], run.text()[-4000:]
    assert files(place / "one") == files(place / "two")


def test_rules_that_need_the_model_ask_it_once_and_features_come_from_the_cache(place, script, monkeypatch):
    Image.open(place / "photos" / "100.jpg").save(place / "photos" / "twin.jpg", quality=80)
    options = [f"run.feature_cache={place / 'cache'}", "curation.filter.image_distance=null"]
    step = lambda name, *more: script.main(  # noqa: E731
        arguments(place, name, "curation", "--images", str(place / "photos"), "--options", *options, *more)
    )
    assert step("run") == 0
    shutil.rmtree(place / "cache")  # what is missing is computed
    folder, own = CurationFolder(place / "curation"), pipeline(place / "tiny.yaml", device="cpu")
    records = {one["id"]: one for one in folder.read("filter")}
    with torch.inference_mode():
        pixels = {key: process_image(own.processor, folder.image(one))[None] for key, one in records.items()}
        features = {key: own.model.image_features(image)[0].mean(dim=0) for key, image in pixels.items()}
        own.model.end_sym, prompt = "", own.cfg.model.prompt_template.format(PROMPT)
        loss = {True: {}, False: {}}
        for key, one in records.items():
            for seen in (True, False):
                images = [own.model.encode_img(pixels[key])[0]] if seen else []
                asked = prompt if seen else prompt.replace("<Img><ImageHere></Img>", "")
                loss[seen][key] = np.mean(own.model.choice_losses(images, asked, [one["text"]])[0])
    cosine = lambda key: float(torch.cosine_similarity(features["100"], features[key], dim=0))  # noqa: E731
    nearest = max(cosine(key) for key in records if key not in ("100", "twin"))
    assert nearest < cosine("twin")
    more = [f"curation.filter.image_alike={(nearest + cosine('twin')) / 2}", "curation.filter.likelihood=0.2"]
    assert step("filter", *more) == 0
    found = {one["id"]: one for one in folder.read("filter")}
    (gone,) = [key for key, one in found.items() if "image alike" in one["failed_rules"]]
    assert gone in ("100", "twin")
    gains = {key: one["measures"]["image_gain"] for key, one in found.items()}
    assert gains == pytest.approx({key: loss[False][key] - loss[True][key] for key in found}, abs=2e-3)
    piled = {key for key, one in found.items() if any(why["rule"] == "likelihood" for why in one.get("review", ()))}
    lowest = min(gains.keys() - {gone}, key=gains.get)
    assert piled == {lowest} | {key for key, gain in gains.items() if gain < 0 and key != gone}
    before = files(place)
    monkeypatch.setattr("minigpt4.curation.generation.Pipeline", None)
    assert step("filter", *more) == 0
    assert files(place) == before
    assert step("filter", *more, "run.feature_cache=null") == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--refine", "endpoint"), r"curation\.refine\.endpoint: is missing"),
        (("--dry-run",), "--dry-run: is for the step refine"),
        (("--ckpt", "nowhere.pth"), r"model\.ckpt: nowhere\.pth does not exist"),
        (("--options", "curation.filter.too_long=3"), r"curation\.filter\.too_long: unknown key"),
        (("--images", "nowhere"), "nowhere"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_made(place, script, capsys, more, words):
    assert script.main(arguments(place, "run", "curation", *more)) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (place / "curation" / "1_images.jsonl").exists()


def test_missing_package_and_step_before_are_named(place, script, capsys, monkeypatch):
    assert script.main(arguments(place, "filter")) == 2
    assert "3_refined.jsonl is not there; the step `refine` writes it" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "rensa", None)  # as if it were not installed
    assert script.main(arguments(place, "filter")) == 2
    assert 'needs rensa; pip install -e ".[curation]"' in capsys.readouterr().err


# Export and report


def filtered(place: Path) -> CurationFolder:
    """A curation up to `4_filtered.jsonl`, without a model."""
    folder = CurationFolder(place / "made")
    records = select(folder, SelectConfig(str(place / "00.tar"), limit=None), 0)
    for number, one in enumerate(records):
        text = f"The image shows thing number {number}, and that is all."
        one |= {"first": text, "tokens_first": 12, "ended_first": True, "text": text, "refined": text, "kept": True}
        one |= {"refiner": "rules", "changed": False, "similarity": 1.0, "tokens_in": None, "tokens_out": None}
        one |= {"failed_rules": [], "measures": {}}
    why = {"step": "filter", "rule": "signs", "evidence": "30% of the characters: ***"}
    records[0] |= {"kept": False, "dropped": why, "evidence": {"signs": why["evidence"], "too long": "200 tokens"}}
    records[1] |= {"review": [why | {"rule": "caption"}]}
    records[2] |= {"review": [why | {"rule": "caption"}]}
    for step in ("generate", "refine", "filter"):
        write_lines(folder.file(step), records)
    return folder


def test_verdicts_of_people_decide_and_nothing_is_drawn(place):
    folder = filtered(place)
    verdicts = [("102", "ann", "accept"), ("103", "ann", "accept"), ("103", "bob", "reject"), ("104", "ann", "reject")]
    lines = [
        {"id": key, "reviewer": who, "verdict": verdict, "reasons": ["invented"]} for key, who, verdict in verdicts
    ]
    lines += [{"id": "104", "reviewer": "ann", "verdict": "edit", "text": "Better."}]  # the last of a person counts
    write_lines(folder.file("review"), lines)
    with folder.file("review").open("a") as file:
        file.write('{"id": "105", "reviewer": "ann", "verd')
    facts = export(folder, ExportConfig(), 42)
    target = folder.path / "cc_sbu_align"
    annotations = json.loads((target / "filter_cap.json").read_text())["annotations"]
    assert [one["image_id"] for one in annotations] == ["102", "104", "105"]
    assert annotations[1]["caption"] == "Better."
    rows = list(csv.DictReader(io.StringIO((target / "removed.csv").read_text())))
    assert {row["image_id"]: (row["step"], row["rule"]) for row in rows} == {
        "100": ("filter", "signs"),
        "101": ("review", "waits: caption"),
        "103": ("review", "rejected"),
    }
    assert (facts["records"], facts["edited"], facts["reviewed"]) == (3, 1, 3)
    assert sorted(file.name for file in (target / "image").iterdir()) == ["102.jpg", "104.jpg", "105.jpg"]
    assert (target / "image" / "102.jpg").read_bytes() == jpeg(2)
    kept = export(folder, ExportConfig(review_pile="keep"), 42)
    assert kept["records"] == 4


@pytest.mark.parametrize("change", ["missing", "another"])
def test_image_that_is_not_as_it_was_is_refused_before_anything_is_written(place, change):
    folder = filtered(place)
    file = folder.path / "images" / "104.jpg"
    file.unlink() if change == "missing" else file.write_bytes(jpeg(77))
    with pytest.raises(SampleError, match=r"1 images have changed since `select`, such as .*104\.jpg, wh"):
        export(folder, ExportConfig(), 42)
    assert not (folder.path / "cc_sbu_align").exists()


def test_report_counts_hits_alone_and_shows_examples(place):
    folder = filtered(place)
    results = write_report(folder, {"requests": 7, "faults": {"status 429": 2}})
    counts = {"hit": 1, "review": 0, "examples": []}
    assert results["rules"]["signs"] | {"examples": []} == {"step": "filter", **counts, "alone": 0}
    assert results["rules"]["caption"] | {"examples": []} == {
        **{"step": "filter", "examples": []},
        **{"hit": 2, "alone": 2, "review": 2},
    }
    assert results["rules"]["signs"]["examples"][0]["id"] == "100"
    assert results["funnel"][-1] == {"step": "filter", "entered": 6, "left": 1, "rules": {"signs": 1}}
    assert results["review"]["pile"] == 2
    assert results["openings"]["kept"] == [("the image shows thing number", 5)]
    page = (folder.path / "report.html").read_text()
    assert all(text in page for text in ("status 429: 2", "thing number 0", "data:image/jpeg"))


def test_exported_folder_is_a_dataset(place):
    export(filtered(place), ExportConfig(), 42)
    whole = yaml.safe_load((place / "tiny.yaml").read_text())
    whole["datasets"] = {"cc_sbu_align": {"build_info": {"storage": str(place / "made" / "cc_sbu_align")}}}
    (place / "train.yaml").write_text(yaml.safe_dump(whole))
    config = Config(SimpleNamespace(cfg_path=str(place / "train.yaml"), options=None)).validate(training=False)
    dataset = build_datasets(config.datasets, ["train"])["cc_sbu_align"]["train"]
    texts = [sample.load()["answer"] for sample in dataset.quick_samples()]
    assert texts == [f"The image shows thing number {number}, and that is all." for number in (3, 4, 5)]

"""Benchmarks of visual question answering as a command: on the published scorers' cases, and asked of tiny weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from minigpt4.common.binding import bind
from minigpt4.common.checkpoint import file_sha256
from minigpt4.common.config_files import load_yaml
from minigpt4.common.schemas import VqaPrompts
from minigpt4.evaluation.vqa import BENCHMARKS
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.processors import open_image
from minigpt4.processors.blip_processors import Blip2ImageEvalProcessor

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "vqa_cases.json").read_text())
SCIENCE = DATA / "llava_eval" / "scienceqa"
QUESTIONS = CASES["vqa"]["questions"]
LISTED = [{key: one[key] for key in ("image_id", "question", "question_id")} for one in QUESTIONS["questions"]]
NUMBERS = [f"{one['image_id']:012}.jpg" for one in LISTED]
GQA = CASES["gqa"]["questions"]
POPE = [
    {"question_id": n, "image": f"COCO_val2014_{n // 2:012}.jpg", "text": f"Is there a {thing}?", "label": label}
    for n, (thing, label) in enumerate([("dog", "yes"), ("cat", "no"), ("bus", "yes"), ("cup", "no")])
]
AOKVQA = CASES["aokvqa"]["dataset"]
VIZWIZ, ICONQA, VSR, MEMES = (CASES[name]["annotations"] for name in ("vizwiz", "iconqa", "vsr", "hateful_memes"))
FILES = {
    "vqav2": ("vqav2.json", QUESTIONS, [f"COCO_{QUESTIONS['data_subtype']}_{name}" for name in NUMBERS]),
    "okvqa": ("okvqa_test_split.json", LISTED, NUMBERS),
    "aokvqa": ("aokvqa_v1p0_val.json", AOKVQA, [f"val2017/{one['image_id']:012}.jpg" for one in AOKVQA]),
    "gqa": ("testdev_balanced_questions.json", GQA, [f"{one['imageId']}.jpg" for one in GQA.values()]),
    "vizwiz": ("val.json", VIZWIZ, [one["image"] for one in VIZWIZ]),
    "iconqa": ("choose_text_val.json", ICONQA, [f"{one['image_id']}/image.png" for one in ICONQA]),
    "vsr": ("test.jsonl", VSR, [one["image"] for one in VSR]),
    "hateful_memes": ("dev.jsonl", MEMES, [one["img"] for one in MEMES]),
    "pope": ("coco_pope_random.json", POPE, [one["image"] for one in POPE]),
}
"""Of each benchmark file, content and images, as published."""
ASKED = [*FILES, "aokvqa_direct", "science_qa"]


def write(path: Path, content) -> Path:
    """JSON, or JSON lines where a name says so, or POPE's."""
    as_lines = path.suffix == ".jsonl" or "pope" in path.name
    path.write_text("".join(json.dumps(one) + "\n" for one in content) if as_lines else json.dumps(content))
    return path


def read(path: Path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def published(tmp_path_factory, shared) -> Path:
    """The files, and an image of the tiny evaluation in each place of one."""
    folder = tmp_path_factory.mktemp("vqa")
    pictures = sorted((shared.folder / "images").iterdir())
    for name, content, images in FILES.values():
        write(folder / name, content)
        for place, image in enumerate(dict.fromkeys(images)):
            (folder / "images" / image).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(pictures[place % len(pictures)], folder / "images" / image)
    for key, one in read(SCIENCE / "problems.json").items():
        if one["image"]:
            (folder / "images" / key).mkdir(exist_ok=True)
            shutil.copy(pictures[0], folder / "images" / key / one["image"])
    write(folder / "annotations.json", CASES["vqa"]["annotations"])
    write(folder / "choices.json", CASES["gqa"]["choices"])
    return folder


@pytest.fixture(scope="module")
def given(published):
    """`given("gqa")`: the options that name its files."""

    def given(name: str) -> list[str]:
        if name == "science_qa":
            return [name, "--questions", str(SCIENCE)]
        file, _, _ = FILES[name.removesuffix("_direct")]
        more = {"vqav2": ["--annotations", "annotations.json"], "gqa": ["--choices", "choices.json"]}
        more["okvqa"] = more["vqav2"]
        options = [str(published / one) if one.endswith(".json") else one for one in more.get(name, [])]
        return [name, "--questions", str(published / file), *options]

    return given


@pytest.fixture(scope="module")
def main(command):
    return command("eval_vqa").main


@pytest.fixture
def score(main, given, tmp_path):
    """`score("gqa", {"case": answers}, *more)`: what the command says about them; asserts success."""

    def score(name: str, said: dict, *more: str) -> dict:
        files = {key: write(tmp_path / (key if "." in key else f"{key}.json"), own) for key, own in said.items()}
        named = [f"{key}={path}" for key, path in files.items()]
        assert main(["score", *given(name), *named, "--save_path", str(tmp_path / "out"), *more]) == 0
        return read(tmp_path / "out" / f"{name}.json")

    return score


# Answers from files


PICKS = zip(ICONQA, CASES["iconqa"]["expected"]["sum"]["picks"], strict=True)
MEMES_SAID = zip(MEMES, CASES["hateful_memes"]["predictions"], strict=True)
SAID = {name: CASES[name]["predictions"] for name in ("vqa", "aokvqa", "gqa", "vizwiz")}
HANDED_IN = SAID | {
    **{"vqav2": SAID["vqa"], "okvqa": SAID["vqa"], "aokvqa_direct": SAID["aokvqa"]},
    "iconqa": [{"image_id": one["image_id"], "answer": one["choices"][pick]} for one, pick in PICKS],
    "vsr": [{"question_id": n, "answer": text} for n, text in enumerate(CASES["vsr"]["predictions"], start=1)],
    "hateful_memes": [{"id": one["id"], "answer": text} for one, text in MEMES_SAID],
}
"""The cases' answers in the publishers' result forms."""
EXPECTED = {name: CASES[name]["expected"] for name in CASES if name != "normalisation"}
THEIRS = {"official": "official", "minigpt4": "minigpt4_okvqa", "lavis": "lavis", "lmms": "evalai"}
VQA_WANTED = {ours: EXPECTED["vqa"][theirs]["overall"] for ours, theirs in THEIRS.items()}
WANTED = {
    "vqav2": VQA_WANTED,
    "okvqa": VQA_WANTED,
    "aokvqa": {"official": EXPECTED["aokvqa"]["official"]["multiple_choice"]},
    "aokvqa_direct": {
        "official": EXPECTED["aokvqa"]["official"]["direct_answer"],
        "lavis": EXPECTED["aokvqa"]["lavis_direct_answer"],
    },
    "gqa": {
        "official": EXPECTED["gqa"]["official"]["accuracy"],
        "llava": EXPECTED["gqa"]["official_after_llava_cleaning"]["accuracy"],
        "minigpt4": EXPECTED["gqa"]["minigpt4"],
        "lavis": EXPECTED["gqa"]["lavis"],
    },
    "vizwiz": {scorer: EXPECTED["vizwiz"][scorer]["overall"] for scorer in ("official", "minigpt4")},
    "iconqa": {"official": EXPECTED["iconqa"]["sum"]["accuracy"]},
    "vsr": {"minigpt4": EXPECTED["vsr"]["minigpt4"]},
    "hateful_memes": {"minigpt4": EXPECTED["hateful_memes"]["minigpt4"]},
}


@pytest.mark.parametrize("name", WANTED)
def test_scores_of_files_are_those_of_the_cases(score, tmp_path, name):
    partial = ["--partial"] if name.startswith("aokvqa") else []  # a missing answer counts 0
    (own,) = score(name, {"case": HANDED_IN[name]}, *partial)["checkpoints"]
    for scorer, wanted in WANTED[name].items():  # published figures have two places
        assert 100 * own["scores"][scorer] == pytest.approx(wanted, abs=0.005001)
    assert own["accuracy"] == own["scores"].get("official", own["accuracy"])
    low, high = own["interval"]
    assert low <= own["accuracy"] <= high
    table = (tmp_path / "out" / "vqa.md").read_text()
    assert f"| case | {100 * own['accuracy']:.2f} ({100 * low:.2f} - {100 * high:.2f}), n " in table
    assert ("published: MiniGPT-4 (protocol not known)" in table) == (name in ("aokvqa", "gqa"))
    assert len(read(tmp_path / "out" / f"answers_{name}_case.json")) == len(HANDED_IN[name]) - len(partial)
    worst = (tmp_path / "out" / f"{name}_worst.md").read_text()
    assert "| question_id | image | question | answer | right | score |" in worst


@pytest.mark.parametrize("name", ["vqav2", "gqa", "vizwiz"])
def test_lines_of_llava_are_scored_as_the_publishers_form(score, name):
    key, text = BENCHMARKS[name].form[1:]
    lines = [{"question_id": one[key], "prompt": "?", "text": one[text], "answer_id": "a"} for one in HANDED_IN[name]]
    published, own = score(name, {"case": HANDED_IN[name], "lines.jsonl": lines})["checkpoints"]
    assert own["scores"] == published["scores"]


def test_figures_and_types_beside_the_accuracy(score, published, tmp_path):
    names = ("gqa", "vqav2", "hateful_memes")
    gqa, vqa, memes = (score(name, {"case": HANDED_IN[name]})["checkpoints"][0] for name in names)
    official = EXPECTED["gqa"]["official"]
    assert round(gqa["figures"]["distribution"], 2) == official["distribution"]
    for figure in ("binary", "open", "consistency", "validity", "plausibility"):
        assert round(100 * gqa["figures"][figure], 2) == official[figure]
    for kind in ("structural type", "semantic type", "steps number", "words number"):
        own = gqa["figures"]["groups"][kind.split()[0]]
        assert {key: [round(100 * mean, 2), n] for key, (mean, n) in own.items()} == official[f"Accuracy / {kind}"]
    assert gqa["groups"]["structural"] == gqa["figures"]["groups"]["structural"]
    by_type = {kind: round(100 * mean, 2) for kind, (mean, _) in vqa["groups"]["answer_type"].items()}
    assert by_type == EXPECTED["vqa"]["official"]["per_answer_type"]
    assert memes["neither"] == 2 / 8  # `Yes.` and `yes it is`
    assert 0 < memes["figures"]["AUROC of yes, neither, no"] < 1
    table = (tmp_path / "out" / "vqa.md").read_text()
    for text in ("| accuracy, % | VQAv2 | GQA | Hateful Memes |", "| structural | n | case |", "scorer official"):
        assert text in table
    assert file_sha256(published / FILES["gqa"][0])[:12] in table


def test_both_forms_of_gqa_and_iconqa_give_the_same(score, tmp_path):
    listed = write(tmp_path / "testdev_balanced_questions.json", CASES["gqa"]["list_form"])
    answers = [one for one in HANDED_IN["gqa"] if GQA[one["questionId"]]["isBalanced"]]
    for one in ICONQA:
        folder = tmp_path / "choose_txt" / one["image_id"]
        folder.mkdir(parents=True)
        write(folder / "data.json", {key: value for key, value in one.items() if key != "image_id"})
    forms = (("gqa", listed, answers, "list"), ("iconqa", tmp_path / "choose_txt", HANDED_IN["iconqa"], "a folder"))
    for name, questions, said, form in forms:
        found = score(name, {"case": said}, "--questions", str(questions))
        assert found["form"].startswith(form)
        wanted = {key: value for key, value in WANTED[name].items() if key in ("official", "minigpt4", "lavis")}
        assert {key: 100 * found["checkpoints"][0]["scores"][key] for key in wanted} == pytest.approx(wanted)


def test_first_lines_partial_answers_and_differences(score, tmp_path):
    whole = SAID["vqa"]
    both = {"first": whole, "second": [one | {"answer": f"{one['answer'].strip()}. It is.\nYes"} for one in whole]}
    found = score("vqav2", both)
    first, second = found["checkpoints"]
    assert first["accuracy"] > second["accuracy"]
    assert first["long"] < second["long"]
    (difference,) = found["comparisons"]
    assert (difference["checkpoint"], difference["baseline"]) == ("second", "first")
    assert difference["difference"] == pytest.approx(second["accuracy"] - first["accuracy"])
    assert difference["interval"][1] < 0
    assert difference["p"] < 0.05
    found = score("vqav2", both, "--answer", "first-line", "--scorer", "lmms")
    assert found["checkpoints"][1]["long"] <= first["long"]
    assert found["scorer"] == "lmms"
    assert found["checkpoints"][1]["accuracy"] == found["checkpoints"][1]["scores"]["lmms"]
    found = score("vqav2", {"few": whole[:20], "whole": whole}, "--partial")
    assert (found["questions"], found["comparisons"]) == (20, [])
    assert "PARTIAL: 20 of 42" in (tmp_path / "out" / "vqa.md").read_text()


def test_the_nearest_choice_by_the_users_vectors(score, tmp_path):
    vectors = tmp_path / "glove.txt"
    vectors.write_text("taxi 1 0.1\ncab 1 0\nbus 0 1\ntrain -1 1\nboat -1 0\n")
    said = {one["question_id"]: {"direct_answer": "taxi"} for one in AOKVQA}
    (own,) = score("aokvqa_direct", {"said": said}, "--vectors", str(vectors))["checkpoints"]
    right = []
    for one in AOKVQA:  # of words without vectors none is near
        near = [one["choices"].index(word) for word in ("taxi", "cab", "bus") if word in one["choices"]]
        right.append(([*near, 0])[0] == one["correct_choice_idx"])
    assert own["figures"]["multiple choice by nearest choice"] == sum(right) / len(right)


# What is wrong is named


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("vqav2", lambda c: c["questions"][3].update(image_id="70004"), "[3].image_id"),
        ("aokvqa", lambda c: c[2].pop("choices"), "[2].choices: Field required"),
        ("aokvqa", lambda c: c[2].update(correct_choice_idx=4), "4 is not the index of a choice"),
        ("aokvqa", lambda c: c.append(c[0]), "comes twice"),
        ("gqa", lambda c: c["1001"].pop("types"), "1001.types: Field required"),
        ("vizwiz", lambda c: c[0].update(answers=[]), "[0].answers"),
        ("iconqa", lambda c: c[1].update(answer="1"), "[1].answer"),
        ("vsr", lambda c: c[1].update(label=2), "line 2, label"),
        ("hateful_memes", lambda c: c[1].pop("img"), "line 2, img"),
    ],
)
def test_bad_records_are_named(main, given, tmp_path, capsys, name, change, words):
    file, content, _ = FILES[name]
    content = json.loads(json.dumps(content))
    change(content)
    more = ["--questions", str(write(tmp_path / file, content)), "--save_path", str(tmp_path)]
    assert main(["score", *given(name), str(write(tmp_path / "case.json", HANDED_IN[name])), *more]) == 2
    error = capsys.readouterr().err
    assert file in error
    assert words in error


@pytest.mark.parametrize(
    ("name", "said", "words"),
    [
        ("vqav2", SAID["vqa"][:2], "40 questions have no answer: question_id 7003, 7004, 7005, 7006, 7007, ...; with"),
        ("vqav2", [one | {"question_id": str(one["question_id"])} for one in SAID["vqa"]], "question_id '7001'"),
        ("vqav2", [*SAID["vqa"], SAID["vqa"][0]], "comes twice"),
        ("vqav2", {"7001": "yes"}, "list"),
        ("gqa", [{"questionId": "1001"}], "[0].prediction"),
        ("aokvqa", {one["question_id"]: {"multiple_choice": "A"} for one in AOKVQA}, "none of the choices"),
        ("vqav2 alone", SAID["vqa"], "scoring needs --annotations"),
    ],
)
def test_bad_answers_are_named(main, given, tmp_path, capsys, name, said, words):
    files, results = given(name.removesuffix(" alone")), write(tmp_path / "case.json", said)
    files = files[:3] if "alone" in name else files
    assert main(["score", *files, str(results), "--save_path", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


# Prompts


def test_prompts_go_by_benchmark_and_model(command):
    file = command("eval_vqa").PROMPTS
    prompts = bind(VqaPrompts, load_yaml(file)["vqa_prompts"], section="vqa_prompts", source=str(file))
    assert prompts.benchmarks.keys() == set(ASKED)
    assert all("[vqa]" not in prompts.of(name, "pretrain_vicuna0", "minigpt4")[1] for name in ASKED)
    assert prompts.of("gqa", "pretrain_llama2", "minigpt4")[0] == "short_answer"
    name, text = prompts.of("gqa", "v1.5", "llava")
    assert (name, text.splitlines()[1]) == ("llava", "Answer the question using a single word or phrase.")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prompt", "short_answr"], "did you mean 'short_answer'"),
        (["--prompt", "Where? {}"], "--prompt"),
        (["--prompts", "texts: {a: '<ImageHere> {} {}'}"], "vqa_prompts.texts.a: must hold {} and <ImageHere>"),
        (["--prompts", "benchmarks: {gqa: {default: b}}"], "vqa_prompts.benchmarks.gqa.default: 'b' is none"),
        (["--prompts", "benchmarks: {vsr: {default: a}}"], "vqa_prompts.benchmarks has no gqa"),
        (["--annotations", "a.json"], "--annotations: gqa has no such file"),
        (["--image-path", "/nowhere"], "images are not in /nowhere: 8001.jpg, "),
    ],
)
def test_bad_prompts_and_missing_images_are_named(main, arguments, tmp_path, capsys, more, words):
    if more[0] == "--prompts":
        base = {"texts": {"a": "<ImageHere> {}"}, "benchmarks": {"gqa": {"default": "a"}}}
        write(tmp_path / "prompts.json", {"vqa_prompts": base | yaml.safe_load(more[1])})
        more = ["--prompts", str(tmp_path / "prompts.json")]
    assert main([*arguments("gqa", "wrong"), *more]) == 2
    assert words in capsys.readouterr().err


# A model is asked


@pytest.fixture(scope="module")
def arguments(shared, given, published):
    """`arguments("gqa", "folder")`: the command that asks the tiny checkpoints."""

    def arguments(name: str, folder: str, *more: str) -> list[str]:
        asking = [*given(name)[1:], "--image-path", str(published / "images")]
        own = replace(shared, more=asking, checkpoints=shared.checkpoints[1:])
        return ["answer", name, *own.arguments(folder, *more, "--options", "run.generation.max_new_tokens=4")]

    return arguments


@pytest.fixture(scope="module")
def asked(shared, arguments, main):
    """The folder of all benchmarks."""
    for name in ASKED:
        assert main(arguments(name, "vqa")) == 0
    return shared.folder / "vqa"


@pytest.mark.parametrize("name", ASKED)
def test_answers_of_checkpoints_score_the_same_from_their_files(asked, main, given, tmp_path, name):
    found = read(asked / f"{name}.json")
    assert [one["name"] for one in found["checkpoints"]] == ["epoch 0", "epoch 1"]
    assert len(found["comparisons"]) == 1
    assert found["setup"]["prompt"].count("{}") == found["setup"]["prompt"].count("<ImageHere>") == 1
    assert found["sha256"]
    files = [str(asked / one["answers"]) for one in found["checkpoints"]]
    assert main(["score", *given(name), *files, "--save_path", str(tmp_path)]) == 0
    again = read(tmp_path / f"{name}.json")
    for one, other in zip(found["checkpoints"], again["checkpoints"], strict=True):
        for key in ("accuracy", "interval", "long", "empty", "groups", "figures"):
            assert one[key] == other[key]


def test_the_table_has_all_benchmarks(asked):
    head, _, *rows = [line for line in (asked / "vqa.md").read_text().splitlines() if line.startswith("| ")][:20]
    assert len(head.split("|")) == 2 + 1 + len(ASKED)
    assert [row.split(" | ")[0] for row in rows[:2]] == ["| epoch 0", "| epoch 1"]
    assert all(" - " in cell and ", n " in cell for cell in rows[0].split(" | ")[1:])


def test_answers_are_those_of_generate(asked, alone, published):
    prompt = "###Human: <Img><ImageHere></Img> Based on the image, is this statement true or false? {} ###Assistant: "
    for one, said in zip(VSR[:3], read(asked / "answers_vsr_epoch_1.json"), strict=False):
        picture = (published / "images" / one["image"]).resolve()
        assert said["answer"] == alone(str(picture), prompt.format(one["caption"]), max_new_tokens=4)


SHORT = "###Human: <Img><ImageHere></Img> Based on the image, respond to this question with a short answer:"


def test_ranking_is_a_plain_loop_over_the_losses_and_does_not_depend_on_company(
    asked, arguments, main, shared, last_model, published, tmp_path, monkeypatch
):
    last, model, processor = shared.folder / "checkpoint_1.pth", last_model, Blip2ImageEvalProcessor(image_size=56)
    kept = losses_of(asked, last)
    for one in ICONQA[:3]:
        embeds, _ = model.encode_img(processor(open_image(published / "images" / one["image_id"] / "image.png"))[None])
        prompt_1TD = model.get_context_emb(f"{SHORT} {one['question']} ###Assistant: ", [embeds])
        for choice, own in zip(one["choices"], kept[one["image_id"]], strict=True):
            ids = model.llama_tokenizer(f"{choice}###", add_special_tokens=False)["input_ids"]
            assert len(own) == len(ids)
            for place, token in enumerate(ids):
                before = model.llama_model.get_input_embeddings()(torch.tensor([ids[:place]], dtype=torch.long))
                logits_1V = model.llama_model(inputs_embeds=torch.cat([prompt_1TD, before], dim=1)).logits[:, -1]
                assert own[place] == pytest.approx(-logits_1V.log_softmax(dim=-1)[0, token].item(), abs=1e-4)
    picks = {"sum": [], "mean": []}
    for one in ICONQA:
        for rule, found in picks.items():
            losses = [sum(own) / (len(own) if rule == "mean" else 1) for own in kept[one["image_id"]]]
            found.append(one["choices"][min(range(len(losses)), key=losses.__getitem__)])
    assert [one["answer"] for one in read(asked / "answers_iconqa_epoch_1.json")] == picks["sum"]
    (own,) = [one for one in read(asked / "iconqa.json")["checkpoints"] if one["name"] == "epoch 1"]
    right = [one["choices"][one["answer"]] for one in ICONQA]
    for rule, found in picks.items():
        assert own["scores"][rule] == sum(map(str.__eq__, found, right)) / len(right)
    # Fewer questions in another order, other choices beside them, another batch size: the same bits.
    few = [{**one, "choices": one["choices"][::-1], "answer": 0} for one in ICONQA[:4][::-1]]
    given = arguments("iconqa", "few", "--questions", str(write(tmp_path / "few.json", few)))
    assert main([*given, "run.batch_size_eval=2"]) == 0
    for key, losses in losses_of(shared.folder / "few", last).items():
        assert losses == kept[key][::-1]
    # The batch size is no part of what answers depend on: nothing is asked again.
    monkeypatch.setattr(MiniGPT4, "choice_losses", None)
    assert main([*arguments("iconqa", "vqa", "--rank", "mean"), "run.batch_size_eval=5"]) == 0
    assert [one["answer"] for one in read(asked / "answers_iconqa_epoch_1.json")] == picks["mean"]


def losses_of(folder: Path, checkpoint: Path) -> dict[str, list[list[float]]]:
    """A checkpoint's losses of IconQA's choices, by question, in the order of the file."""
    digest, kept = file_sha256(checkpoint), {}
    for made_from in folder.glob("predictions/*/made_from.json"):
        facts = read(made_from)
        if facts["checkpoint"] == digest and "11" in facts.get("choices", {}):
            for line in (made_from.parent / "rank0.jsonl").read_text().splitlines():
                one = json.loads(line)
                kept[one["image_id"]] = json.loads(one["caption"])
    return kept

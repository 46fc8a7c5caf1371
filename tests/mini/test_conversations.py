"""The mini world in LLaVA's format: every answer is true of its scene, and the data set reads every record."""

import json
import re

import pytest

from minigpt4.common.binding import bind
from minigpt4.common.schemas import DatasetConfig
from minigpt4.datasets import EvalLoader, builder_of
from minigpt4.datasets.datasets.dataloader_utils import BadSampleMonitor
from minigpt4.mini.files import ConversationSize, main, write_conversations
from minigpt4.mini.report import measure, named_things, stated_order
from minigpt4.mini.scenes import BACKGROUNDS, COLUMN, KINDS, ROW, THINGS, alt_text, conversation, sample_scenes

SIZE = ConversationSize(captions=6, instruct=5, test=3, kinds=6, seed=7)
SCENES = list(sample_scenes("train", 400, seed=0))
NUMBER = {word: number for number, word in enumerate(("no", "one", "two", "three", "four"))}
FILES = ("questions", "answers")
COUNT = "one|two|three|four|no"


def asked(scene, kind):
    """Questions without `<image>` and their answers."""
    texts = [turn["value"] for turn in conversation(scene, kind)]
    return list(zip([text.replace("<image>", "").strip() for text in texts[::2]], texts[1::2], strict=True))


def group_of(scene, text):
    """The group of the only kind that a text names."""
    (name,) = named_things(text)
    return next((group for group in scene.groups if group.thing.name == name), None)


def said_counts(scene, text):
    """Names of kinds, with the numbers that a text gives them."""
    found = re.findall(rf"\b({COUNT}) ([a-z ]+?)(?= in the picture|[,.]| and )", text.lower())
    return {next(iter(named_things(what))): NUMBER[word] for word, what in found if named_things(what)}


@pytest.mark.parametrize("kind", KINDS)
def test_turns_alternate_with_the_image_once_at_either_end_of_the_first_question(kind):
    places = set()
    for scene in SCENES:
        turns = conversation(scene, kind)
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert 3 <= len(turns) // 2 <= 5 if kind == "conversation" else len(turns) == 2
        assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
        places |= {place for place in ("startswith", "endswith") if getattr(turns[0]["value"], place)("<image>")}
        questions = [question for question, _ in asked(scene, kind)]
        assert len(set(questions)) == len(questions)
        assert turns == conversation(scene, kind)
    assert places == {"startswith", "endswith"}


@pytest.mark.parametrize("kind", ["caption", "detail"])
def test_descriptions_are_true_by_the_measures_and_count_right(kind):
    scenes = {str(index): scene for index, scene in enumerate(SCENES)}
    texts = {key: asked(scene, kind)[0][1] for key, scene in scenes.items()}
    result = measure(texts, {key: scene.record() for key, scene in scenes.items()})
    assert result.things_named == result.background == result.left_right == result.above_below == 1.0
    assert result.things_wrong == 0.0
    for key, scene in scenes.items():
        total = re.search(rf"There (is|are) ({COUNT}) things? in all\.$", texts[key])
        assert (kind == "caption") == (total is None) == (texts[key] == alt_text(scene))
        assert total is None or NUMBER[total[2]] == scene.count


def test_short_answers_are_true():
    seen = set()
    for scene in SCENES:
        there = {group.thing.name: group.count for group in scene.groups}
        order = list(there)
        for question, answer in asked(scene, "conversation"):
            word = " ".join(question.split()[:2])
            if question == "What can be seen?":
                word = question
                assert named_things(answer) == there.keys()
            elif word == "What colour":
                assert set(re.findall("|".join(BACKGROUNDS), answer)) == {scene.background}
            elif word in ("How many", "Is there"):
                group = group_of(scene, question)
                if group is None:
                    word = "no"
                    assert answer.startswith("No, there is no ")
                    assert named_things(answer) == named_things(question)
                else:
                    assert said_counts(scene, answer) == {group.thing.name: group.count}
            elif word == "What is":
                word = f"What is {scene.layout}"
                named = [name for name in order if name in named_things(answer)]
                target = group_of(scene, question).thing.name
                assert named == order[: order.index(target) + 1]
                assert (target, order[0]) not in stated_order(answer, scene.layout)
                assert ("left" in answer, "above" in answer) == (scene.layout == ROW, scene.layout == COLUMN)
            else:
                word = "size"
                group = group_of(scene, question)
                assert question.startswith("Is" if group.count == 1 else "Are")
                assert group.size in answer
            seen.add(word)
    assert seen == {
        *("What can be seen?", "What colour", "How many", "Is there", "no", "What is row", "What is column", "size")
    }


def test_reasoning_ends_in_what_follows_from_the_scene():
    seen = set()
    for scene in SCENES:
        ((question, answer),) = asked(scene, "complex_reasoning")
        seen.add(" ".join(question.split()[:3]).split(" picture")[0])
        first, last = scene.groups[0], scene.groups[-1]
        numbers = [NUMBER[word] for word in re.findall(rf"\b({COUNT})\b", answer.lower())]
        if question.startswith("How many more"):
            assert numbers == [first.count, 4, first.count, 4 - first.count, 4 - first.count]
        elif question.startswith("How many things"):
            taken = group_of(scene, question).count
            assert numbers == [scene.count, taken, scene.count - taken]
        elif question.startswith("If the picture"):
            now, then = answer.split(".")[:2]
            ends = {ROW: ("on the left", "on the right"), COLUMN: ("at the top", "at the bottom")}[scene.layout]
            assert ends[0] in question
            assert (ends[1] in now, ends[0] in then) == (True, True)
            assert named_things(now) == named_things(then) == {last.thing.name}
        else:
            assert said_counts(scene, answer) == {group.thing.name: group.count for group in (first, last)}
            assert answer.startswith("Yes") == (first.count > last.count)
            assert ("as many" in answer) == (first.count == last.count)
            assert ("fewer" in answer) == (first.count < last.count)
    assert seen == {"How many more", "How many things", "If the", "Are there more"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    assert write_conversations(folder, SIZE)
    return folder


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_files_are_the_same_wherever_they_are_written_and_left_alone_when_there(folder, tmp_path):
    main([str(tmp_path), "--captions=6", "--instruct=5", "--test=3", "--kinds=6", "--seed=7"])
    assert contents(tmp_path) == contents(folder)
    assert not write_conversations(folder, SIZE)
    (tmp_path / "world.json").unlink()
    (tmp_path / "detail.json").write_text("[")
    assert write_conversations(tmp_path, SIZE)
    assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize(
    ("name", "records"),
    [("caption", 6), ("conversation", 5), ("detail", 5), ("complex_reasoning", 5), ("instruct", 15)]
    + [("instruct_test", 9)],
)
def test_data_set_reads_every_record_and_finds_its_image(name, records, folder):
    info = {"ann_path": str(folder / f"{name}.json"), "image_path": str(folder / "images"), "id_field": "id"}
    processor = {part: {"name": f"blip2_image_{part}", "image_size": 56} for part in ("train", "eval")}
    section = {"builder": "llava_conversations", "build_info": info, "vis_processor": processor}
    dataset = builder_of("mini", bind(DatasetConfig, section, section="mini", source="test")).build("train")
    strict = BadSampleMonitor(None, max_share=0.0, max_in_a_row=1)
    batches = list(EvalLoader(dataset, 4, num_workers=0, ledger=strict))
    assert sum(len(batch["conversations"]) for batch in batches) == dataset.size == records
    assert all(batch["image"].shape[1:] == (3, 56, 56) for batch in batches)
    truth = json.loads((folder / "scenes_test.json").read_text())
    assert len(truth) == SIZE.test
    if name == "instruct_test":
        assert {identity.partition("_")[0] for batch in batches for identity in batch["image_id"]} == truth.keys()


def test_scenes_and_questions_know_the_wanted_kinds_alone(folder):
    records = [record for file in ("caption", "instruct", "instruct_test") for record in read(folder / f"{file}.json")]
    named = set().union(*(named_things(turn["value"]) for record in records for turn in record["conversations"]))
    assert len(named) > 3
    assert named <= {thing.name for thing in THINGS[:6]}


def test_questions_of_the_test_stand_one_a_line_with_their_answers(folder):
    questions, answers = ([json.loads(line) for line in (folder / f"{name}_test.jsonl").open()] for name in FILES)
    turns = [turn["value"] for record in read(folder / "instruct_test.json") for turn in record["conversations"]]
    assert [one["text"] for one in questions] == [text.replace("<image>", "").strip() for text in turns[::2]]
    assert [one["text"] for one in answers] == turns[1::2]
    assert (
        [one["question_id"] for one in questions] == [one["question_id"] for one in answers] == [*range(len(answers))]
    )
    assert {one["category"] for one in questions} == {"conv", "detail", "complex"}
    assert all((folder / "images" / one["image"]).is_file() for one in questions)

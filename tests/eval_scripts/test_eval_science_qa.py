"""ScienceQA against the published code's results, and asked of tiny weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.evaluation import science_qa
from minigpt4.evaluation.questions import read_answer_lines
from minigpt4.inference.image_list import cut

DATA = Path(__file__).parents[1] / "data" / "llava_eval"
GOLDEN = json.loads((DATA / "golden.json").read_text())
SCIENCE = GOLDEN["scienceqa"]
FOLDER = DATA / "scienceqa"
PREDICTIONS, FULL = FOLDER / "predictions.jsonl", FOLDER / "predictions_full.jsonl"
GPT4 = ("--gpt4-result", str(FOLDER / "gpt4_result.json"))


@pytest.fixture
def main(command):
    return command("eval_science_qa").main


@pytest.fixture(scope="module")
def problems():
    return science_qa.read_problems(FOLDER, "test")


def read(path: Path):
    return json.loads(path.read_text())


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Records


@pytest.mark.parametrize("prompt_format", SCIENCE["convert"])
def test_records_are_the_published_ones(main, tmp_path, prompt_format):
    output = tmp_path / "records.json"
    arguments = ["convert", str(FOLDER), "--prompt-format", prompt_format, "--output"]
    assert main([*arguments, str(output)]) == 0
    assert read(output) == SCIENCE["convert"][prompt_format]
    if prompt_format in SCIENCE["convert_jsonl"]:
        assert main([*arguments, str(tmp_path / "records.jsonl")]) == 0
        assert lines_of(tmp_path / "records.jsonl") == SCIENCE["convert_jsonl"][prompt_format]


@pytest.mark.parametrize(
    ("changes", "prompt_format", "question", "answer"),
    [
        ({}, "QCMLE-AEL", "Q?\nContext: N/A\nOptions: (A) x (B) y\nBECAUSE: L S", "The answer is B. BECAUSE: S L"),
        ({}, "QCEM-ELA", "Q?\nContext: N/A\nBECAUSE: S\nOptions: (A) x (B) y", "S L The answer is B."),
        ({"solution": ""}, "QCLEM-AL", "Q?\nContext: N/A\nBECAUSE: L \nOptions: (A) x (B) y", "The answer is B."),
        ({"lecture": "a\\nb"}, "CQM-LA", "Context: N/A\nQuestion: Q?\nOptions: (A) x (B) y", "a\nb The answer is B."),
        ({"question": "Question: a  b"}, "QCM-A", "a b\nContext: N/A\nOptions: (A) x (B) y", "The answer is B."),
        ({"hint": " h "}, "QCME-EA", "Q?\nContext: h\nOptions: (A) x (B) y\nBECAUSE: S", "S The answer is B."),
    ],
)
def test_other_formats(changes, prompt_format, question, answer):
    problem = {"question": "Q?", "choices": ["x", "y"], "answer": 1, "hint": "", "lecture": "L", "solution": "S"}
    assert science_qa.question_and_answer(problem | changes, prompt_format) == (question, answer)


def test_chunks_of_the_published_scripts_are_batches():
    for case in GOLDEN["chunks"]:
        size = -(-case["n_items"] // case["num_chunks"])
        assert list(map(len, cut(range(case["n_items"]), size))) == case["sizes"]


# Scores


def test_scores_files_and_subjects_are_the_published_ones(main, tmp_path, capsys):
    assert main(["score", str(FOLDER), str(PREDICTIONS), "--save_path", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert SCIENCE["accuracy"]["printed"] in printed.splitlines()
    assert "predictions: 1 of 11 have no answer and are wrong (ids 60)" in printed
    assert "| predictions | 40.00 | 33.33 | 0.00 | 40.00 | 50.00 | 0.00 | 33.33 | 20.00 | 27.27 |" in printed
    assert "| published: LLaVA 13B | 90.36 | 95.95 | 88.00 |" in printed
    assert read(tmp_path / "predictions_output.json") == SCIENCE["accuracy"]["output_file"]
    assert read(tmp_path / "predictions_result.json") == SCIENCE["accuracy"]["output_result"]
    assert read(tmp_path / "predictions_subjects.json") == SCIENCE["by_subject"]
    assert (tmp_path / "science_qa.md").read_text() in printed


def test_letters_are_found_in_the_published_order():
    letters = {"E": "E", "C. ": "C", "F. The answer is A.": "A", "B. The answer is A.": "B", "The answer is A).": "A"}
    letters |= {"The answer is Z.": "Z", "The answer is A.B": "A"}
    letters |= dict.fromkeys(("F", "", "A.", "The answer is A\n", "the answer is A.", "BC"), "FAILED")
    assert {text: science_qa.find_letter(text) for text in letters} == letters


def test_answers_of_a_larger_split_count_for_a_smaller_one(main, capsys):
    assert main(["score", str(FOLDER), str(FULL), "--split", "minitest"]) == 0
    printed = capsys.readouterr().out
    assert "all 3 have an answer; 8 answers are not of this split" in printed
    assert "Total: 3, Correct: 2, Accuracy: 66.67%, IMG-Accuracy: 50.00%" in printed


# Ensembles


def test_ensembles_are_the_published_ones(main, tmp_path, capsys):
    final = ("--requery", str(FOLDER / "requery.jsonl"))
    assert main(["gpt4", str(FOLDER), str(FULL), *GPT4, *final, "--save_path", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name, case in (("GPT-4 complement", "gpt4_complement"), ("GPT-4 judge", "gpt4_requery")):
        assert "\n".join([f"+ {name}:", *SCIENCE[case]["printed"]]) in printed
    assert read(tmp_path / "GPT-4_judge_result.json") == SCIENCE["gpt4_requery"]["output_result"]


def test_random_choices_are_seeded(problems):
    silent = dict.fromkeys(problems, "I cannot tell.")
    runs = [science_qa.complement(problems, silent, silent, seed).results for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_questions_without_both_answers_are_left_out_of_the_complement_and_refused_by_the_judge(problems):
    ours = {key: line["text"] for key, line in read_answer_lines(PREDICTIONS).items()}
    gpt4 = science_qa.read_outputs(FOLDER / "gpt4_result.json")
    assert science_qa.complement(problems, ours, gpt4).lines[0].startswith("Total: 10, ")
    with pytest.raises(SampleError, match="our answers: 1 questions have no answer: question_id 60"):
        science_qa.judged(problems, ours, gpt4, {})


def test_the_judge_is_asked_only_where_both_differ(main, chat_server, tmp_path, capsys):
    chat_server.answer = lambda request: "<think>The answer is A. Or not?</think>\nIt flies. The answer is B."
    judge = ("--judge-url", chat_server.url, "--judge-model", "tiny", "--judge-cache", str(tmp_path / "cache.jsonl"))
    output = tmp_path / "requery.jsonl"
    arguments = ["gpt4", str(FOLDER), str(FULL), *GPT4, *judge, "--requery", str(output)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert [line["question_id"] for line in lines_of(output)] == ["7", "12", "19", "55", "60"]
    assert {line["text"] for line in lines_of(output)} == {"It flies. The answer is B."}
    asked = [request["messages"][0]["content"] for request in chat_server.requests]
    assert len(asked) == 5
    question = "Which object is heavier?\nContext: Weigh them.\nOptions: (A) stone"
    (heavier,) = [text for text in asked if question in text]
    assert "so The answer is A." in heavier
    assert "\nThe answer is B.\n" in heavier
    assert main(arguments) == 0
    assert (len(chat_server.requests), capsys.readouterr().out) == (5, printed)


# What is wrong


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("problems.json", '"answer": 1', '"answer": 2', "problem 3: the field 'answer' must be the number of a choice"),
        ("problems.json", '"dog",', "", "problem 3, choices:"),
        ("problems.json", '"lecture": "L1"', '"lecture": null', "problem 41, lecture:"),
        ("problems.json", '"41": {', '"42": {', "problem 41: is not there, but in the split 'test'"),
        ("problems.json", '"41": {', '"3": {', "problems.json: cannot be read.*'3' stands twice"),
        ("pid_splits.json", '"test"', '"tests"', "has no ids of 'test'; did you mean"),
        ("predictions.jsonl", '"text": "B",', "", "predictions.jsonl, line 1, text: Field required"),
        ("predictions.jsonl", '"question_id": "7"', '"question_id": "3"', "line 2: the question_id 3 comes twice"),
        ("predictions.jsonl", '"x", "model_id": "tiny", "metadata": {}}\n{"question_id": "7"', "", "line 1: not JSON"),
    ],
)
def test_files_that_are_wrong_are_named(tmp_path, file, old, new, words):
    folder = Path(shutil.copytree(FOLDER, tmp_path / "scienceqa"))
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    with pytest.raises((ConfigError, SampleError), match=words):
        science_qa.score("tiny", science_qa.read_problems(folder, "test"), read_answer_lines(folder / PREDICTIONS.name))


@pytest.mark.parametrize("prompt_format", ["QCM", "QMC-A", "QCM-AEE", ""])
def test_unknown_formats_are_refused(problems, prompt_format):
    with pytest.raises(ConfigError, match="--prompt-format"):
        science_qa.records(problems, prompt_format)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"id": "3", "conversations": []}]', r"\[0\]\.conversations"),
        ('[{"id": 3, "conversations": [{"value": "Q?"}]}]', r"\[0\]\.id"),
        ('[{"id": "3", "conversations": [{"value": "Q?"}]}, {"id": "3", "conversations": [{"value": "Q?"}]}]', "twice"),
        ("{}", "Input should be a valid list"),
        ('[{"id": "3"', "cannot be read"),
    ],
)
def test_questions_that_are_wrong_are_named(tmp_path, content, words):
    path = tmp_path / "records.json"
    path.write_text(content)
    with pytest.raises((ConfigError, SampleError), match=words):
        science_qa.read_questions(path)


# A model is asked


def test_questions_of_every_checkpoint_go_with_their_image_or_as_text_alone(shared, main, alone):
    """The form of the answers, LLaVA-Bench's too, is that of test_llava_answers.py."""
    pictures, records = iter(range(11)), [dict(one) for one in SCIENCE["convert"]["CQM-A"]]
    for record in records:
        if "image" in record:
            record["image"] = f"10{next(pictures)}.jpg"
    questions = shared.folder / "science.json"
    questions.write_text(json.dumps(records))
    asking = ("--questions", str(questions), "--image-path", str(shared.folder / "images"), "--single-pred-prompt")
    assert main(["answer", *replace(shared, more=asking).arguments("science")]) == 0
    said = [lines_of(shared.folder / "science" / f"answers_{name}.jsonl") for name in ("pretrained", "epoch_1")]
    assert [[one["question_id"] for one in answers] for answers in said] == [[one["id"] for one in records]] * 2
    assert [one["text"] for one in said[0]] != [one["text"] for one in said[1]]
    for record, answer in zip(records, said[1], strict=True):
        image = record.get("image")
        text = record["conversations"][0]["value"].replace("\n<image>", "") + f"\n{science_qa.LETTER_ALONE}"
        assert answer["prompt"] == ("<image>\n" if image else "") + text
        prompt = f"<Img><ImageHere></Img> {text}" if image else text
        assert answer["text"] == alone(image, f"###Human: {prompt} ###Assistant: ")
    setup = read(shared.folder / "science" / "setup.json")
    assert [one["name"] for one in setup["checkpoints"]] == ["pretrained", "epoch 0", "epoch 1"]

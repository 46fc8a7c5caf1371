"""LLaVA-Bench against the published code's results, with a judge behind a real server."""

import json
import signal
from pathlib import Path

import pytest

from minigpt4.common.errors import ConfigError, RunError, SampleError
from minigpt4.evaluation import llava_bench
from minigpt4.evaluation.judge import Judge, JudgeEndpoint
from minigpt4.evaluation.llava_bench import parse_score, read_comparisons, review, summarise

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "tests" / "data" / "llava_eval"
GOLDEN = json.loads((DATA / "golden.json").read_text())
KINDS = ("in_the_wild", "coco")


def inputs(kind: str, folder: Path = DATA) -> list[Path]:
    """Questions, contexts, rules, reference and answers of a golden case."""
    case = GOLDEN["judge"][kind]
    names = [case["questions"], case["context"], case["rule"], *case["answers"]]
    return [folder / name.removeprefix("eval/") for name in names]


@pytest.fixture
def make(chat_server, tmp_path):
    """`make(cache)`: a judge on this machine, one request at a time."""

    def make(cache: str = "cache.jsonl", **changes) -> Judge:
        values = {"url": chat_server.url, "model": "gpt-4-0314", "temperature": llava_bench.TEMPERATURE}
        return Judge(JudgeEndpoint(**{**values, "at_once": 1, "attempts": 3, **changes}), tmp_path / cache)

    return make


def answer_in_turn(chat_server, kind: str) -> list[str]:
    """Let the server give the canned replies by what it is asked; returns them."""
    case = GOLDEN["judge"][kind]
    texts = [request["messages"][1]["content"] for request in case["requests"]]
    replies = dict(zip(texts, case["replies"], strict=False))
    chat_server.answer = lambda request: replies[request["messages"][1]["content"]]
    return list(replies.values())


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def as_text(pair) -> list[str]:
    return [str(float(score)) for score in pair]  # nan is no nan


def test_scores_are_read_as_published_also_behind_thoughts():
    for case in GOLDEN["parse_score"]:
        assert as_text(parse_score(case["review"])) == as_text(case["scores"]), case
    for thought in ("<think>\n1 2\n</think>\n\n", "Hm. 1 2\n</think>\n"):
        assert parse_score(f"{thought}8 9.5\nBoth are good.") == [8, 9.5]
        assert parse_score(thought.partition("</think>")[0]) == [-1, -1]


@pytest.mark.parametrize("kind", KINDS)
def test_requests_and_review_are_the_published_ones(chat_server, make, tmp_path, kind):
    case, output = GOLDEN["judge"][kind], tmp_path / "reviews" / "review.jsonl"
    answer_in_turn(chat_server, kind)
    comparisons = read_comparisons(*inputs(kind))
    assert review(make(), comparisons, output) == case["review_lines"]
    assert lines_of(output) == case["review_lines"]
    assert chat_server.requests == case["requests"]
    chat_server.requests.clear()
    whole = output.read_bytes()
    review(make("another.jsonl"), comparisons, output)
    assert (len(chat_server.requests), output.read_bytes()) == (case["requests_when_run_again"], whole)
    first, *others = whole.splitlines(keepends=True)
    # Two lines, in no order, and one that a kill cut off: by question, not by count.
    output.write_bytes(others[1] + first + b'{"id": 3, "question_id": 2, "ans')
    review(make("third.jsonl"), comparisons, output)
    assert (len(chat_server.requests), output.read_bytes()) == (case["requests_after_two_lines"], whole)


def test_no_reply_is_counted_and_asked_for_again(chat_server, make, tmp_path):
    output, comparisons = tmp_path / "review.jsonl", read_comparisons(*inputs("in_the_wild"))
    chat_server.answer = lambda request: None if "painter" in request["messages"][1]["content"] else "8 6"
    review(make(), comparisons, output)
    found = summarise(output)
    assert (found.unread, found.scored["all"].reference, found.read.relative) == (["3"], 5.75, 75.0)
    assert "1 of 4 judgements are no two scores from 1 to 10 (questions 3)" in found.note()
    chat_server.requests.clear()
    chat_server.answer = lambda request: " 8 8\nA blank in front.\n"
    review(make("another.jsonl"), comparisons, output)
    assert [len(chat_server.requests), summarise(output).unread] == [1, ["3"]]
    assert [line["content"] for line in lines_of(output) if line["tuple"] == [-1, -1]] == [" 8 8\nA blank in front.\n"]


def test_a_judge_that_refuses_costs_no_judgement(chat_server, make, tmp_path):
    output, comparisons = tmp_path / "review.jsonl", read_comparisons(*inputs("coco"))
    replies = answer_in_turn(chat_server, "coco")
    chat_server.steps = ["answer", "answer", 401]
    with pytest.raises(RunError, match=chat_server.url):
        review(make(), comparisons, output)
    assert len(lines_of(output)) == 2
    chat_server.requests.clear()
    review(make("another.jsonl"), comparisons, output)
    assert [line["content"] for line in lines_of(output)] == replies
    asked = {request["messages"][1]["content"] for request in chat_server.requests}
    assert asked == {one.message for one in comparisons[2:]}


def test_killed_in_the_middle_it_goes_on(chat_server, tmp_path, command, warm):
    output, names = tmp_path / "review.jsonl", ("questions", "context", "rule", "reference", "answers")
    arguments = ["judge", "--judge-url", chat_server.url, "--judge-model", "tiny", "--judge-at-once", "1"]
    for name, path in zip(names, inputs("coco"), strict=True):
        arguments += [f"--{name}", str(path)]
    arguments += ["--output", str(output), "--judge-cache"]
    script = REPOSITORY / "eval_scripts" / "eval_llava_bench.py"
    answer_in_turn(chat_server, "coco")
    answer = chat_server.answer

    def answer_or_kill(request):
        if len(chat_server.requests) == 4:
            run.send(signal.SIGKILL)
        return answer(request)

    chat_server.answer = answer_or_kill
    run = warm.script(script, *arguments, tmp_path / "cache.jsonl", cwd=tmp_path)
    assert run.wait() == [-signal.SIGKILL], run.text()
    written = len(lines_of(output))
    assert written in (2, 3)  # the fourth question may be asked before the third line stands
    with output.open("a") as file:
        file.write(f'{{"id": {written + 1}, "question_id": {written}, "ans')
    assert command("eval_llava_bench").main([*arguments, str(tmp_path / "another.jsonl")]) == 0
    assert lines_of(output) == GOLDEN["judge"]["coco"]["review_lines"]
    assert len(chat_server.requests) == 4 + 6 - written


# What does not fit


@pytest.fixture
def files(tmp_path):
    """A copy of the inputs of In-the-Wild: `files(name, old, new)` changes one of them; returns them all."""

    def files(name: str = "", old: str = "", new: str = "") -> list[Path]:
        paths = []
        for source in inputs("in_the_wild"):
            text = source.read_text()
            assert source.name != name or old in text
            paths.append(tmp_path / source.name)
            paths[-1].write_text(text.replace(old, new) if source.name == name else text)
        return paths

    return files


MODEL, GPT4 = "bench_answers_model.jsonl", "bench_answers_gpt4.jsonl"
LAST = '{"question_id": 3, "prompt": "p", "text": "A man.", "answer_id": "tiny3", "model_id": "tiny", "metadata": {}}\n'


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        (MODEL, LAST, "", rf"{MODEL}, for .*bench_questions.jsonl: 1 questions have no answer: question_id 3"),
        (MODEL, '"question_id": 3', '"question_id": 9', "1 questions have no answer: question_id 3"),
        (GPT4, '"text": "Not known.", ', "", f"{GPT4}, line 4, text: Field required"),
        ("bench_questions.jsonl", LAST[:16] + "3", LAST[:16] + "9", "1 questions have no answer: question_id 9"),
        ("bench_questions.jsonl", '"category": "detail", ', "", "bench_questions.jsonl, line 2, category: Field"),
        ("bench_questions.jsonl", '"detail"', '"coding"', "rule.json: has no 'llava_bench_coding'"),
        ("bench_context.jsonl", '"002.jpg"', '"003.jpg"', "has nothing about the image 002.jpg of question 2"),
        ("bench_context.jsonl", '"caption": "A', '"captions": "A', "bench_context.jsonl, line 1, captions: "),
        ("rule.json", "}\n}", "}\n", "rule.json: cannot be read"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name_and_line(files, name, old, new, words):
    with pytest.raises((SampleError, ConfigError), match=words):
        read_comparisons(*files(name, old, new))


def test_order_of_lines_does_not_matter(files):
    wanted = read_comparisons(*files())
    paths = files()
    paths[-1].write_text("".join(reversed(paths[-1].read_text().splitlines(keepends=True))))
    assert read_comparisons(*paths) == wanted


def test_a_review_of_others_is_not_gone_on_with(chat_server, make, tmp_path, files):
    output = tmp_path / "review.jsonl"
    chat_server.answer = lambda request: "8 7"
    review(make(), read_comparisons(*files()), output)
    chat_server.requests.clear()
    others = read_comparisons(*files(MODEL, '"tiny1"', '"other1"'))
    with pytest.raises(SampleError, match="question 1: its line is about other answers"):
        review(make(), others, output)
    with pytest.raises(ConfigError, match=r"other judge \(review.made_from.json\)"):
        review(make(model="another"), read_comparisons(*files()), output)
    with pytest.raises(ConfigError, match="other messages"):
        review(make(), read_comparisons(*files("rule.json", "explain", "explain why")), output)
    assert chat_server.requests == []


# Summary


def reviews(arguments: list[str]) -> list[Path]:
    """The files that the published arguments choose, with the ids that they leave out."""
    folder = DATA / "reviews"
    if arguments[0] == "-d":
        return sorted(folder.glob("*.jsonl"))
    return sorted(folder / Path(name).name for name in arguments if name.endswith(".jsonl"))


@pytest.mark.parametrize("case", GOLDEN["summary"], ids=lambda case: " ".join(case["arguments"])[:40])
def test_summary_is_the_published_one(case, command, capsys):
    given = case["arguments"]
    select = [given[given.index(name) + 1] for name in ("-s", "-v") if name in given]
    ignore = given[given.index("-i") + 1 :] if "-i" in given else []
    arguments = ["summary", *map(str, reviews(given))]
    for name, values in (("--select", select), ("--ignore", ignore)):
        arguments += [name, *values] if values else []
    assert command("eval_llava_bench").main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[: len(case["printed"])] == case["printed"]
    assert printed[len(case["printed"])] == ""


def test_table_has_intervals_and_the_published_results(command, tmp_path, capsys):
    output = tmp_path / "scores.json"
    assert command("eval_llava_bench").main(["summary", str(DATA / "reviews"), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    for row in (
        "| tiny-a | 93.3 | 57.9 | 100.0 | 82.5 |",
        "| published, COCO: LLaVA 13B, full data | 83.1 | 75.3 | 96.5 | 85.1 |",
        "| published, In-the-Wild: LLaVA 13B | 57.3 | 52.5 | 81.7 | 67.3 |",
    ):
        assert row in printed
    assert "reviews_tiny-b-0613: 1 of 5 judgements are no two scores from 1 to 10 (questions 2)" in printed
    scores = json.loads(output.read_text())
    low, high = scores["tiny-a"]["scores"]["all"]["interval"]
    assert low < scores["tiny-a"]["scores"]["all"]["relative"] < high
    assert scores["reviews_tiny-b-0613"]["all_without_unread"] == round(27 / 34 * 100, 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"question_id": 1, "tuple": [8]}', "line 1: the field 'tuple' must hold two numbers"),
        ('{"question_id": 1, "category": "conv"}', "line 1: the field 'tuple' must hold two numbers"),
        ('{"question_id": 1, "tuple": [8, 7]}\n{"question_id": 2, "tup', "line 2: not JSON"),
        ("", "holds no judgements"),
    ],
)
def test_bad_reviews_are_named(tmp_path, content, words):
    path = tmp_path / "review.jsonl"
    path.write_text(content)
    with pytest.raises(SampleError, match=words):
        summarise(path)

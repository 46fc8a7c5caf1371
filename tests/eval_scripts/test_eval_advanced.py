"""Judged tasks from checkpoints to the page: answers of tiny weights, a judge behind real HTTP, people's verdicts."""

import base64
import hashlib
import html
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from PIL import Image
from scipy.stats import binomtest

from minigpt4.common.config import Config
from minigpt4.evaluation import advanced
from minigpt4.evaluation.advanced import TASKS, control, read_answers, read_tasks, read_verdict
from minigpt4.evaluation.bootstrap import agreement, mcnemar, wilson
from minigpt4.models.mini_gpt4 import MiniGPT4

REPOSITORY = Path(__file__).parents[2]
ROWS = ("zebra", "quagga")
COUNTS = {"meme": 3, "odd": 4, "poem": 5}
QUESTION = "What is odd here?"
NASTY = '</script><script>alert(1)</script> @DATA@ <b>"&'


@pytest.fixture(scope="module")
def measurement(shared, command):
    """The shipped configuration with tiny weights, two checkpoints, and a folder of three tasks."""
    tasks = shared.folder / "advanced_tasks"
    pictures = sorted((shared.folder / "images").iterdir())
    for task, count in COUNTS.items():
        (tasks / task).mkdir(parents=True)
        for file in pictures[:count]:
            shutil.copy(file, tasks / task)
    (tasks / "odd" / "question.txt").write_text(f"{QUESTION}\n")
    checkpoints = [f"zebra={shared.folder}/checkpoint_1.pth", f"quagga={shared.folder}/start.pth"]
    own = replace(shared, config=shared.folder / "advanced.yaml", script=command("eval_advanced"))
    own.take(REPOSITORY / "eval_configs" / "minigpt4_failure_eval.yaml")
    return replace(own, checkpoints=checkpoints, more=("--images", str(tasks)))


@pytest.fixture(scope="module")
def answered(measurement) -> Path:
    assert measurement.script.main(["answer", *measurement.arguments("advanced")]) == 0
    return measurement.folder / "advanced"


@pytest.fixture
def folder(answered, tmp_path, monkeypatch) -> Path:
    """A copy of the answers, where a model would be a waste."""
    monkeypatch.setattr(MiniGPT4, "from_config", None)
    return Path(shutil.copytree(answered, tmp_path / "advanced"))


@pytest.fixture
def judge(measurement, chat_server, tmp_path):
    """`judge(folder, *more)`: the status of that command with the test's server, one request at a time."""

    def judge(folder: Path, *more: str) -> int:
        server = ["--judge-url", chat_server.url, "--judge-model", "tiny judge", "--judge-at-once", "1"]
        cache = ["--judge-cache", str(tmp_path / "cache.jsonl")]
        return measurement.script.main(["judge", str(folder), *server, *cache, *more])

    return judge


@pytest.fixture
def report(measurement, capsys):
    """`report(folder, *more)`: asserts success; the printed report and the content of `advanced.json`."""

    def report(folder: Path, *more: str) -> tuple[str, dict]:
        capsys.readouterr()
        assert measurement.script.main(["report", str(folder), *more]) == 0
        return capsys.readouterr().out, json.loads((folder / "advanced.json").read_text())

    return report


def reply(passes: bool, reason: str = "so it is") -> str:
    return json.dumps({"pass": passes, "reason": reason})


def text_of(request: dict) -> str:
    return request["messages"][-1]["content"][0]["text"]


def answer_in(request: dict) -> str:
    return re.search(r"<answer>\n(.*)\n</answer>", text_of(request), re.DOTALL)[1]


def by_image(request: dict) -> str:
    """A judge that knows which image a good answer belongs to, and else passes a third of the answers."""
    uri = request["messages"][-1]["content"][1]["image_url"]["url"]
    seen = hashlib.sha256(base64.b64decode(uri.partition(",")[2])).hexdigest()
    good = {(one.text, hashlib.sha256(Path(one.image).read_bytes()).hexdigest()) for one in control()["good"]}
    known = {text for text, _ in good}
    text = answer_in(request)
    if text in known:
        return reply((text, seen) in good)
    is_control = any(text in (one.text, one.text.strip()) for kind in control().values() for one in kind)
    return reply(not is_control and int(hashlib.sha256(text.encode() + uri.encode()).hexdigest(), 16) % 3 == 0)


# Answers


def test_each_image_is_asked_the_question_of_its_task(answered, alone):
    sets = read_answers(answered)
    assert [one.model for one in sets] == list(ROWS)
    for one in sets:
        assert Counter(answer.task for answer in one.answers) == COUNTS
        questions = {answer.task: answer.question for answer in one.answers}
        assert questions == {"meme": TASKS["meme"].question, "odd": QUESTION, "poem": TASKS["poem"].question}
    asked = f"###Human: <Img><ImageHere></Img> {QUESTION} ###Assistant: "
    (found,) = [one for one in sets[0].answers if one.question_id == "odd: 102.jpg"]
    assert found.text == alone("102.jpg", asked)
    assert found.ended == (alone("102.jpg", asked, 13) == found.text)


# Judging


def test_judge_sees_image_question_answer_and_criterion_and_nothing_of_who_answered(folder, judge, chat_server):
    chat_server.answer = by_image
    assert judge(folder, "--seed", "3") == 0
    answers = {one.key: one for own in read_answers(folder) for one in own.answers}
    asked = chat_server.requests
    assert len(asked) == len(answers) + sum(len(kind) for kind in control().values())
    writers = {one.text: own.model for own in read_answers(folder) for one in own.answers}
    known = {(one.text, one.question): one for one in (*answers.values(), *sum(control().values(), []))}
    order = []
    for request in asked:
        assert request["temperature"] == 0
        assert not re.search(r"zebra|quagga|checkpoint|start|\.pth|\.jpg", json.dumps(request))
        question = re.search(r'was asked: "(.*)"\n', text_of(request))[1]
        one = known[answer_in(request), question]
        assert one.criterion in text_of(request)
        assert ("token limit cut it off here" in text_of(request)) == (one.ended is False)
        order.append(writers.get(answer_in(request)))
    own = [name for name in order if name]
    assert own not in (sorted(own), sorted(own, reverse=True))
    assert order.index(None) < len(own)  # the control stands among them
    chat_server.requests.clear()
    assert judge(folder, "--seed", "4") == 0
    assert chat_server.requests == []  # kept, whatever the order


def test_only_the_object_is_a_verdict():
    assert read_verdict('{"pass": true, "reason": "fine"}')["pass"] is True
    for said in (
        '```json\n{"pass": false, "reason": "prose"}\n```',
        '<think>{"pass": true, "reason": ""}</think>{"pass": false, "reason": ""}',
    ):
        assert read_verdict(said)["pass"] is False
    for said in (
        *('{"pass": "true", "reason": "a word"}', '{"pass": 1, "reason": "a number"}', '{"pass": true}', "pass", ""),
        '{"pass": true, "pass": false, "reason": "both"}',
        'Sure: {"pass": true, "reason": "words before"}',
        '[{"pass": true, "reason": "a list"}]',
    ):
        assert read_verdict(said) is None


def test_what_is_no_verdict_is_asked_again_once_and_never_a_fail(folder, judge, chat_server, report):
    sets = read_answers(folder)
    stubborn, slow = sets[0].answers[0], sets[0].answers[1]

    def answer(request: dict) -> str:
        if answer_in(request) == stubborn.text and stubborn.question in text_of(request):
            return "I like it."
        again = text_of(request).endswith(advanced.AGAIN)
        return "Yes!" if answer_in(request) == slow.text and not again else reply(True)

    chat_server.answer = answer
    assert judge(folder) == 0
    times = Counter(answer_in(request) for request in chat_server.requests)
    assert times[stubborn.text] == times[slow.text] == 2
    assert json.loads((folder / "verdicts_tiny_judge.json").read_text())["verdicts"][stubborn.key] is None
    text, results = report(folder)
    first = results["rows"][0]["tasks"]
    left_out = sum(one.key == stubborn.key for one in sets[0].answers)
    assert (first["all"]["passed"], first["all"]["judged"]) == (12 - left_out, 12 - left_out)
    assert "1 replies were none" in text
    assert results["undecided"] == 1


def test_stopped_judge_goes_on_without_asking_twice(folder, judge, chat_server, capsys):
    chat_server.answer = by_image
    chat_server.steps = ["answer"] * 7 + [401]
    assert judge(folder) == 2
    assert "status 401" in capsys.readouterr().err
    assert not list(folder.glob("verdicts_*"))
    begun = [json.dumps(one) for one in chat_server.requests[:7]]
    chat_server.requests.clear()
    assert judge(folder) == 0
    assert not {*begun} & {json.dumps(one) for one in chat_server.requests}
    verdicts = json.loads((folder / "verdicts_tiny_judge.json").read_text())["verdicts"]
    assert len(chat_server.requests) <= len(verdicts) - len(begun)
    assert all(verdicts.values())


# The table


def test_table_counts_what_the_judge_passed(folder, judge, chat_server, report):
    chat_server.answer = by_image
    assert judge(folder, "--shuffled") == 0
    verdicts = json.loads((folder / "verdicts_tiny_judge.json").read_text())["verdicts"]
    text, results = report(folder)
    sets = read_answers(folder)
    for own, row in zip(sets, results["rows"], strict=True):
        for task, count in {**COUNTS, "all": 12}.items():
            passed = sum(verdicts[one.key]["pass"] for one in own.answers if task in (one.task, "all"))
            assert row["tasks"][task] == {"passed": passed, "judged": count, "interval": [*wilson(passed, count)]}
        low, high = wilson(passed, 12)
        assert f"| {own.model} |" in text
        assert f"| {passed} of 12 ({low:.0%} - {high:.0%}) |\n" in text
        assert row["cut_off"] == sum(one.ended is False for one in own.answers)
        assert f"{own.model} {row['cut_off']} of 12" in text
    assert text.splitlines()[2] == "| model | meme | odd | poem | all |"
    passes = [[verdicts[one.key]["pass"] for one in own.answers] for own in sets]
    only = [sum(a and not b for a, b in zip(*pair, strict=True)) for pair in (passes, passes[::-1])]
    ((pair,),) = [results["pairs"]]
    assert pair["tasks"]["all"] == {"first_only": only[0], "second_only": only[1], "p": mcnemar(*only)}
    assert [row["name"] for row in results["shuffled"]] == [f"{name}, images shuffled" for name in ROWS]
    (known,) = results["judges"]
    passed = {kind: own["passed"] for kind, own in known["control"]["kinds"].items()}
    assert passed == {"good": 12, "description": 0, "images shuffled": 0, "empty": 0, "loop": 0}
    assert not known["control"]["useless"]
    assert "USELESS" not in text
    published = "| MiniGPT-4 | 8 of 25 (17% - 52%) | 18 of 25"
    for words in (f"prompt {known['prompt_sha256']}", "max_new_tokens 12", published, "| 65 of 100 (55% - 74%) |"):
        assert words in text
    assert (folder / "advanced.md").read_text() + "\n" == text
    before = {file.name: file.read_bytes() for file in folder.glob("advanced.*")}
    report(folder)
    assert before == {file.name: file.read_bytes() for file in folder.glob("advanced.*")}


@pytest.mark.parametrize("judgement", [True, False])
def test_judge_that_passes_everything_or_nothing_is_marked_useless(folder, judge, chat_server, report, judgement):
    chat_server.answer = lambda request: reply(judgement)
    assert judge(folder) == 0
    text, results = report(folder)
    assert results["judges"][0]["control"]["useless"]
    assert "USELESS JUDGE: tiny judge" in text.splitlines()[0]


def verdicts_of(folder: Path, name: str, passes: dict[str, bool], said: str = "") -> None:
    """A person's file; `said` stands for the name, and as the reason."""
    verdicts = {key: {"pass": own, "reason": said} for key, own in passes.items()}
    content = {"judge": said or name, "kind": "person", "verdicts": verdicts}
    (folder / f"verdicts_{name}.json").write_text(json.dumps(content))


def test_majority_of_several_judges_and_their_agreement(folder, report):
    keys = sorted({one.key for own in read_answers(folder) for one in own.answers})
    said = {"Ann": keys[::2], "Bob": keys[::3], "Cem": keys[::2]}
    for name, passed in said.items():
        verdicts_of(folder, name, {key: key in passed for key in keys[:-1]})
        if name == "Bob":  # of two, where they differ there is no majority
            _, results = report(folder)
            both = [(key in said["Ann"], key in said["Bob"]) for key in keys[:-1]]
            assert results["undecided"] == 1 + sum(first != second for first, second in both)
            assert results["agreement"]["measure"] == "Cohen's kappa"
            assert results["agreement"]["value"] == pytest.approx(agreement(both)["value"])
    text, results = report(folder)
    assert (results["agreement"]["measure"], results["undecided"]) == ("Krippendorff's alpha", 1)
    for own, row in zip(read_answers(folder), results["rows"], strict=True):
        judged = [one.key for one in own.answers if one.key in keys[:-1]]
        counts = (sum(key in said["Ann"] for key in judged), len(judged))
        assert (row["tasks"]["all"]["passed"], row["tasks"]["all"]["judged"]) == counts
    assert "Judge Cem (person)" in text


def test_mcnemar_is_the_exact_binomial_test():
    for first, second in product(range(7), repeat=2):
        wanted = binomtest(first, first + second).pvalue if first + second else 1
        assert mcnemar(first, second) == pytest.approx(wanted, abs=1e-12)


def test_agreement_is_that_of_published_examples():
    table = [[88, 14, 18], [10, 40, 10], [2, 6, 12]]  # Cohen 1960: kappa .492
    pairs = [(row, column) for row in range(3) for column in range(3) for _ in range(table[row][column])]
    assert agreement(pairs)["value"] == pytest.approx(0.492, abs=5e-4)
    observers = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [[None if one == "." else one for one in unit] for unit in zip(*observers, strict=True)]
    alpha = agreement(units)  # Krippendorff, Computing Krippendorff's Alpha-Reliability, nominal data: .743
    assert (alpha["value"], alpha["judged"]) == (pytest.approx(0.743, abs=5e-4), 11)
    both = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    kappa = agreement([*both, (True, None), (None, None)])
    assert (kappa["value"], kappa["judged"], kappa["same"]) == (pytest.approx(0.4), 50, 0.7)
    assert kappa["interval"][0] < 0.2 < 0.4 < 0.6 < kappa["interval"][1] < 0.7  # 0.4 +- 1.96 x 0.13
    same = agreement([(True, True), (True, True)])
    assert (same["value"], same["interval"], same["same"]) == (None, None, 1)
    assert agreement([(True, None), (None, False)]) is None


# Other results


def test_failure_rates_coverage_and_chair_join_the_report(folder, report, tmp_path):
    verdicts_of(folder, "Ann", {one.key: True for one in read_answers(folder)[0].answers})
    rate = {"rate": 0.25, "interval": [0.1, 0.5]}
    failures = {"images": 4, "tasks": {"detail": "detailed description"}, "failures": []}
    failures["checkpoints"] = [{"name": "before", "tasks": {"detail": rate}}]
    coverage = {"results": "a.json", "protocol": "captions", "score": 2.5, "interval": [2.0, 3.0], "mean_words": 80.25}
    chair = {"results": "a.json", "scores": {"CHAIR-i": 0.125, "words": 80.25}}
    files = []
    for number, content in enumerate((failures, coverage, chair)):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(content))
    text, _ = report(folder, "--join", *map(str, files))
    assert "| before | 25.0% (10.0% - 50.0%) |" in text
    assert "| a.json | 2.5000 (95% 2.0000 - 3.0000) | - | 80.2 | 0.1250 |" in text
    assert "| published: MiniGPT-4 | 2.22 | 0.662 | 175 | 0.096 |" in text
    assert "<td>a.json</td>" in (folder / "advanced.html").read_text()


# Pages


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def test_page_shows_every_answer_and_texts_cannot_become_markup(folder, report):
    file = folder / "answers_zebra.json"
    content = json.loads(file.read_text())
    content["answers"][0]["text"] = content["model"] = NASTY
    file.write_text(json.dumps(content))
    verdicts_of(folder, "a", {read_answers(folder)[0].answers[0].key: False}, NASTY)
    report(folder)
    page = (folder / "advanced.html").read_text()
    assert len(re.findall("<script", page)) == 3
    assert NASTY not in page
    assert page.count(html.escape(NASTY)) >= 2
    cards = data_of(page)["cards"]
    assert len(cards) == 24
    (card,) = [one for one in cards if one["text"] == NASTY]
    assert (card["model"], card["pass"]) == (NASTY, False)
    assert card["verdicts"] == [{"judge": NASTY, "pass": False, "reason": NASTY}]
    assert data_of(page)["pictures"][card["picture"]].startswith("data:image/jpeg;base64,")
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"|@import|url\(', page) == []


def test_page_for_people_hides_who_wrote_what(folder, measurement):
    pages = []
    for seed in ("0", "0", "1"):
        assert measurement.script.main(["page", str(folder), "--seed", seed]) == 0
        pages.append((folder / "judge.html").read_text())
    assert pages[0] == pages[1] != pages[2]
    texts = {one.text for own in read_answers(folder) for one in own.answers}
    cards = data_of(pages[0])["cards"]
    assert {card["text"] for card in cards} == texts
    whole = json.dumps([{**card, "text": ""} for card in cards])
    assert not re.search("zebra|quagga|checkpoint|start|pth", whole)
    models = {one.key: own.model for own in read_answers(folder) for one in own.answers}
    order = [models[card["key"]] for card in cards]
    assert order not in (sorted(order), sorted(order, reverse=True))


def test_verdicts_that_a_person_saves_in_a_browser_are_read_back(folder, measurement, browser, report, tmp_path):
    assert measurement.script.main(["page", str(folder)]) == 0
    context = browser.new_context(accept_downloads=True)
    context.set_default_timeout(120_000)
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((folder / "judge.html").resolve().as_uri())
    keys = [card["key"] for card in data_of((folder / "judge.html").read_text())["cards"]]
    for key, choice in zip(keys, ("pass", "fail", "skip"), strict=False):
        page.locator(f"input[name='{key}']").nth(["pass", "fail", "skip"].index(choice)).check()
    page.locator("article").nth(1).locator("input[placeholder]").fill("prose <b>")
    page.reload()  # what was judged stays
    assert page.locator("#count").inner_text() == f"{len(keys)} shown, 2 of {len(keys)} judged"
    page.locator("#verdict").select_option("fail")
    assert page.locator("article").count() == 1
    page.locator("#name").fill("Ann B")
    with page.expect_download() as download:
        page.locator("#save").click()
    assert download.value.suggested_filename == "verdicts_Ann_B.json"
    download.value.save_as(folder / download.value.suggested_filename)
    text, results = report(folder)
    assert results["judges"][0]["given"] == 2
    assert "Judge Ann B (person): 2 verdicts" in text
    page.goto((folder / "advanced.html").resolve().as_uri())
    page.locator("#verdict").select_option("fail")
    assert page.locator("article").first.locator("p", has_text="Ann B: fail. prose <b>").count() == 1
    page.locator("#task").select_option("meme")
    assert page.locator("article").count() <= 6
    assert errors == []
    context.close()


# Questions and refusals


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(file)


def test_list_names_image_task_and_perhaps_a_question(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / "pictures" / name)
    own = [{"task": "poem"}, {"task": "meme", "question": "Why?"}, {"task": "care", "question": "How do I water it?"}]
    entries = [{"image": "b.png", "task": "poem"}, *({"image": "a.png"} | one for one in (*own[1:], own[0]))]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    base, found = read_tasks(tmp_path / "list.json", tmp_path / "pictures", {}, None, 0)
    assert base == tmp_path / "pictures"
    assert [one.question_id for one in found] == ["poem: b.png", "poem: a.png", "meme: a.png", "care: a.png"]
    assert [one.text for one in found] == [TASKS["poem"].question] * 2 + ["Why?", "How do I water it?"]
    assert [one.criterion for one in found[2:]] == [TASKS["meme"].criterion, advanced.AdvancedTask("").criterion]


def test_mini_configuration_asks_every_drawing_all_its_tasks(measurement):
    config, images = REPOSITORY / "eval_configs" / "mini_advanced_eval.yaml", measurement.folder / "images"
    given = ["--cfg-path", str(config), "--images", str(images), "--save_path", "unused", "--limit", "3"]
    args = measurement.script.parse_args(["answer", *given])
    own = Config(args).validate(training=False).run.advanced_tasks
    _, found = read_tasks(args.images, None, own, args.limit, 42)
    assert Counter(one.task for one in found) == dict.fromkeys(own, 3)
    assert not set(own) & set(TASKS)
    assert {one.text for one in found if one.task == "odd"} == {"What is odd about this picture?"}


BAD_TASKS = [
    ({}, "has no images"),
    ({"meme/a.png": None, "b.png": None}, "'b.png' has no question"),
    ({"care/a.png": None}, r"care/a\.png: the task 'care' has no question \(question\.txt\)"),
    ({"meme/a.png": None, "recipe/question.txt": "How?"}, "recipe has no images"),
    ({"care/a.png": None, "care/question.txt": " "}, r"question: String should have"),
    ({"all/a.png": None, "all/question.txt": "Q?"}, "no task can be called 'all'"),
    ({"a.png": None}, r"names no tasks; see --help, or set run\.advanced_tasks"),
    ({"list.json": [{"image": "a.png", "task": "poem"}]}, r"entry 1: the image .*a\.png does not exist"),
    ({"a.png": None, "list.json": [{"image": "a.png", "task": "poem"}] * 2}, "entry 2: poem: a.png comes twice"),
    ({"a.png": None, "list.json": [{"image": "a.png", "task": "poem"}, "a.png"]}, "entry 2: Input should be"),
    ({"a.png": None, "list.json": [{"image": "a.png", "task": 3}]}, "entry 1, task: Input should be a valid string"),
]


@pytest.mark.parametrize(("files", "message"), BAD_TASKS, ids=[message for _, message in BAD_TASKS])
def test_bad_tasks_are_refused_before_a_model_loads(measurement, tmp_path, monkeypatch, capsys, files, message):
    monkeypatch.setattr(MiniGPT4, "from_config", None)
    images = tmp_path / "images"
    images.mkdir()
    for name, content in files.items():
        if content is None:
            picture(images / name)
        else:
            (images / name).parent.mkdir(exist_ok=True)
            (images / name).write_text(content if isinstance(content, str) else json.dumps(content))
    source = images / "list.json" if "list.json" in files else images
    arguments = ["answer", *measurement.arguments("errors")[:-2], "--images", str(source)]
    assert measurement.script.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_bad_files_of_answers_and_verdicts_are_named(folder, measurement, capsys):
    def refused(words: str, *command: str) -> None:
        assert measurement.script.main([*command]) == 2
        assert words in capsys.readouterr().err

    report, page, other = ("report", str(folder)), ("page", str(folder)), folder / "verdicts_Ann (1).json"
    refused("no verdicts_*.json", *report)
    verdicts_of(folder, "Ann", {"ffff": True})
    refused("none of the verdicts are about these answers", *report)
    shutil.copy(folder / "verdicts_Ann.json", other)
    refused("the judge 'Ann' has verdicts in another file", *report)
    other.write_text('{"judge": "Bob", "kind": "person", "verdicts": {"a": {"pass": 1}}}')
    refused("verdicts_Ann (1).json, verdicts.a.pass:", *report)
    refused("--join", *report, "--join", str(folder / "verdicts_Ann.json"))
    refused("no answers_*.json", "page", str(folder / "nothing"))
    file = folder / "answers_quagga.json"
    whole = json.loads(file.read_text())
    first, *others = whole["answers"]
    for content, words in (
        (whole | {"answers": [first | {"image": "gone.jpg"}, *others]}, "gone.jpg: the image is gone"),
        (whole | {"answers": [first | {"task": "all"}, *others]}, "answers_quagga.json: no task can be called 'all'"),
        (whole | {"answers": others}, "zebra and quagga were not asked the same"),
        ([1], "answers_quagga.json: Input should be"),
    ):
        file.write_text(json.dumps(content))
        refused(words, *page)

"""Mending by rules and by an endpoint: guards against what language models do, faults by name, kills."""

import json
import time
from pathlib import Path

import pytest

from minigpt4.common.curation_schema import RefineConfig
from minigpt4.common.errors import ConfigError
from minigpt4.common.schemas import EndpointConfig
from minigpt4.common.utils import write_lines
from minigpt4.curation import refine
from minigpt4.curation.records import CurationFolder
from minigpt4.curation.refine import ALREADY, EXPLAINS, INVENTS, SHORT, Refiner, clean, guard, stem

REPOSITORY = Path(__file__).parents[2]
TEXT = (
    "The image shows a brown dog on a green couch beside a window. The dog looks at a red ball that lies on the floor. "
    "Behind the couch hangs a picture of the sea."
)
LOOP = "The dog is on the couch. " * 12

# Rules


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (TEXT, TEXT),
        (f"{TEXT} The dog looks at a red ball that lies on the floor.", TEXT),
        (LOOP, "The dog is on the couch."),
        (f"{TEXT} It is very very very very very big.", f"{TEXT} It is very big."),
        (f"{TEXT} And the cat and", TEXT),
        (f"### {TEXT}###", TEXT),
        (f"{TEXT} Una mujer camina por la calle con su perro.", TEXT),
        (f"{TEXT} 桌子上有一本打开的书，旁边放着一杯热茶。", TEXT),
        (f"{TEXT} The boyâ€™s hat is blue.", f"{TEXT} The boy’s hat is blue."),
        (f"{TEXT} A red lamp, green pears and yellow plums.", f"{TEXT} A red lamp, green pears and yellow plums."),
        ("no end at all", ""),
        ("", ""),
    ],
)
def test_what_is_wrong_goes_and_nothing_is_rewritten(text, cleaned):
    assert clean(text) == cleaned


def test_answers_are_mended_by_how_they_ended(tmp_path):
    refiner = Refiner(CurationFolder(tmp_path), RefineConfig())
    phrase = {"first": "two cows on a pink field", "ended_first": True, "text": "x"}
    cut = {"second": "a cat that sits on", "ended_second": False}
    assert refiner._by_rules(phrase)["refined"] == "Two cows on a pink field."
    assert refiner._by_rules(phrase | cut)["refined"] == "Two cows on a pink field."
    gone = refiner._by_rules({"first": "two cows on a", "ended_first": False, "text": "two cows on a"})
    assert gone["dropped"]["rule"] == "nothing left"


@pytest.mark.parametrize(
    "words", ["cat cats", "smile smiles smiling", "run running", "box boxes", "body bodies", "stop stopped"]
)
def test_stems_join_forms_of_a_word(words):
    assert len({stem(word) for word in words.split()}) == 1


# Guards

INVENTED = " A woman with a yellow umbrella walks past, carrying heavy groceries from the supermarket."
LONG = f"{TEXT}{INVENTED} A lamp with a green shade stands in the corner, and a carpet of leaves covers the floor."


@pytest.mark.parametrize(
    ("text", "answer", "left", "rule"),
    [
        (TEXT, TEXT, TEXT, ""),
        (TEXT, f'"{TEXT}"', TEXT, ""),
        (TEXT, f"Sure! Here is the corrected paragraph:\n\n{TEXT}", TEXT, ""),
        (TEXT, f"**Corrected paragraph:** {TEXT}", TEXT, ""),
        (TEXT, f"Here's the text with no errors:\n“{TEXT}”\n\nLet me know if you need more!", TEXT, ""),
        (TEXT, f"{TEXT}\n\n(Note: I removed a sentence.)", TEXT, ""),
        (TEXT, f"I have corrected the errors.\n\n{TEXT}", TEXT, ""),
        (TEXT, f"Here is what I made of it {TEXT}", None, EXPLAINS),
        (TEXT, f"```text\n{TEXT}\n```", TEXT, ""),
        *((TEXT, answer, None, EXPLAINS) for answer in (json.dumps({"text": TEXT}), f"- {TEXT}", f"<p>{TEXT}</p>")),
        (TEXT, f"```json\n{json.dumps([TEXT])}\n```", None, EXPLAINS),
        (f"[{TEXT}]", f"[{TEXT}]", f"[{TEXT}]", ""),
        (f"Here is a dog. {TEXT}", f"Here is a dog. {TEXT}", f"Here is a dog. {TEXT}", ""),
        (TEXT, "The paragraph is already correct.", TEXT, ""),
        (TEXT, "There are no errors in it.", TEXT, ""),
        (LOOP, "The paragraph is already correct.", LOOP, ALREADY),
        (TEXT, "A dog on a couch.", None, SHORT),
        (LONG, f"{TEXT[:60]}.", None, SHORT),
        (LOOP * 4, "The dog is on the couch, and there the dog is, on the couch of the dog.", None, ""),
        (TEXT, TEXT + INVENTED, None, INVENTS),
        (TEXT, TEXT.replace("looks", "is looking").replace("shows", "showing"), None, ""),
    ],
    ids=range(23),
)
def test_guards_tell_texts_from_remarks_losses_and_inventions(text, answer, left, rule):
    found = guard(text, answer, RefineConfig())
    assert found.rule == rule
    if left is not None:
        assert found.text == left
    if rule == INVENTS:
        assert "woman, yellow, umbrella" in found.evidence


# Over HTTP


def records(count: int) -> list[dict]:
    texts = [TEXT.replace("dog", f"dog number {number}") for number in range(count)]
    return [{"id": f"{number:03d}", "text": text, "tokens_first": 50} for number, text in enumerate(texts)]


def curation(folder: Path, own: list[dict]) -> CurationFolder:
    made = CurationFolder(folder)
    write_lines(made.file("generate"), own)
    return made


def settings(server, **changes) -> RefineConfig:
    endpoint = {"url": server.url, "model": "mender", "timeout": 1.0, "attempts": 2, "at_once": 4}
    return RefineConfig("endpoint", endpoint=EndpointConfig(**(endpoint | changes)))


def run(folder: CurationFolder, own: RefineConfig, **options) -> dict[str, dict]:
    refiner = Refiner(folder, own)
    found = refiner.run(folder.read("generate"), {"input": folder.sha256("generate")}, **options)
    return {one["id"]: one for one in found}


ORDERS = ("429", "500", "hang", "half", "garbage", "empty", "length", "explains", "explains once", "invents", "already")


class Misbehaving:
    """What a server does with the record of each name; faults come once, those in `always` each time."""

    def __init__(self, always: bool) -> None:
        self.always, self.seen = always, {}

    def step(self, request: dict):
        name = self.name(request)
        self.seen[name] = self.seen.get(name, 0) + 1
        once = self.seen[name] == 1 or self.always
        steps = {"429": 429, "500": 500, "hang": "hang", "half": "half", "garbage": "garbage"}
        return "length" if name == "length" else steps.get(name, "answer") if once else "answer"

    def answer(self, request: dict) -> str | None:
        name, text = self.name(request), request["messages"][-1]["content"].removesuffix(refine.AGAIN)
        if name == "empty":
            return None if self.seen[name] == 1 or self.always else text
        if name.startswith("explains") and (name == "explains" or self.seen[name] == 1):
            return f"Here is what I made of it {text}"
        return {"invents": text + INVENTED, "already": "It is already correct."}.get(name, text)

    @staticmethod
    def name(request: dict) -> str:
        return ORDERS[int(request["messages"][-1]["content"].split("dog number ")[1].split()[0])]


@pytest.mark.parametrize("always", [False, True])
def test_each_fault_of_an_endpoint_is_handled_and_counted_by_its_name(chat_server, tmp_path, always):
    misbehaving = Misbehaving(always)
    chat_server.rule, chat_server.answer = misbehaving.step, misbehaving.answer
    chat_server.headers, chat_server.usage = {"Retry-After": "0.01"}, {"prompt_tokens": 90, "completion_tokens": 40}
    folder = curation(tmp_path, records(len(ORDERS)))
    found = dict(zip(ORDERS, run(folder, settings(chat_server)).values(), strict=True))
    rules = {name: one["dropped"]["rule"] for name, one in found.items() if "dropped" in one}
    faults = {"429": "status 429", "500": "status 500", "hang": "time-out", "half": "broken connection"}
    faults |= {"garbage": "broken JSON", "empty": "empty"}
    stay = {"length": "cut at the length limit", "explains": EXPLAINS}
    assert rules == (faults | stay if always else stay)
    assert {name: one["review"][0]["rule"] for name, one in found.items() if "review" in one} == {"invents": INVENTS}
    assert found["already"]["refined"] == found["already"]["text"]
    ledger = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    counted = {name: sum(line.get("fault") == name for line in ledger) for name in {*faults.values(), *stay.values()}}
    assert counted == dict.fromkeys(faults.values(), 2 if always else 1) | {stay["length"]: 1, EXPLAINS: 3}
    kept = [json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(kept) == (2 if always else 8)
    assert not any("yellow umbrella" in text or "I made of it" in text for text in kept)
    before, requests = folder.file("refine").read_bytes(), len(chat_server.requests)
    run(folder, settings(chat_server))
    assert (folder.file("refine").read_bytes(), len(chat_server.requests)) == (before, requests)
    if always:  # the failed ones, and nothing else, are asked once more when that is asked for
        misbehaving.always = False
        again = dict(zip(ORDERS, run(folder, settings(chat_server), retry_failed=True).values(), strict=True))
        assert {name for name, one in again.items() if "dropped" in one} <= {*stay, "empty"}
        assert len(chat_server.requests) - requests == 5


def test_request_has_instruction_room_and_text_and_dry_run_sends_nothing(chat_server, tmp_path):
    folder = curation(
        tmp_path, [*records(3), {"id": "gone", "dropped": {"step": "select", "rule": "x", "evidence": "y"}}]
    )
    own = settings(chat_server, price_in=1.0, price_out=2.0)
    chat_server.answer = lambda request: request["messages"][-1]["content"]
    plan = Refiner(folder, own).plan(folder.read("generate"), len)
    assert (plan["done"], plan["requests"], plan["cached"], plan["tokens_out"]) == (0, 3, 0, 3 * 132)
    instruction = Path("prompts/refine.txt").read_text().strip()
    assert plan["tokens_in"] == sum(len(instruction) + len(one["text"]) for one in records(3))
    assert plan["examples"][0][0] == {"role": "system", "content": instruction}
    assert not chat_server.requests
    assert not folder.file("refine").exists()
    found = run(folder, own)
    assert [one["max_tokens"] for one in chat_server.requests] == [132] * 3
    assert (found["000"]["changed"], found["000"]["similarity"], found["000"]["refiner"]) == (False, 1.0, "mender")
    assert len(found["000"]["request"]) == 64
    assert "refined" not in found["gone"]
    assert Refiner(folder, own).plan(folder.read("generate"), len)["done"] == 3
    with pytest.raises(ConfigError, match=r"curation\.refine\.endpoint\.url: 'nowhere' is no URL"):
        Refiner(folder, settings(chat_server, url="nowhere"))
    with pytest.raises(ConfigError, match=r"curation\.refine\.endpoint: is missing"):
        Refiner(folder, RefineConfig("endpoint"))


def test_another_instruction_or_model_makes_a_new_file_beside_the_old_one_and_back_costs_nothing(
    chat_server, tmp_path, monkeypatch
):
    folder, own = curation(tmp_path, records(4)), settings(chat_server)
    chat_server.answer = lambda request: request["messages"][-1]["content"].replace("brown ", "")
    run(folder, own)
    first = folder.file("refine").read_bytes()
    chat_server.answer = lambda request: request["messages"][-1]["content"]
    run(folder, settings(chat_server, model="another"))
    facts = json.loads(folder.made_from_file("refine").read_text())["differs_from"]
    assert set(facts["changes"]) == {"refiner"}
    assert facts["ids"] == ["000", "001", "002", "003"]
    assert (tmp_path / facts["file"]).read_bytes() == first
    assert len(chat_server.requests) == 8
    run(folder, own)
    assert folder.file("refine").read_bytes() == first
    run(folder, settings(chat_server, at_once=2, requests_per_minute=6000))  # nothing that answers depend on
    assert len(chat_server.requests) == 8


KILLED = """
import sys
from pathlib import Path
from minigpt4.common.curation_schema import RefineConfig
from minigpt4.common.schemas import EndpointConfig
from minigpt4.curation.records import CurationFolder
from minigpt4.curation.refine import Refiner
folder, endpoint = CurationFolder(Path(sys.argv[1])), EndpointConfig(sys.argv[2], "mender", at_once=2)
refiner = Refiner(folder, RefineConfig("endpoint", endpoint=endpoint))
refiner.run(folder.read("generate"), {"input": folder.sha256("generate")})
"""


def test_after_kills_nothing_that_was_answered_is_asked_again_and_the_bytes_are_the_same(chat_server, warm, tmp_path):
    count, script = 60, tmp_path / "refining.py"
    script.write_text(KILLED)
    start = lambda folder: warm.script(script, folder.path, chat_server.url, cwd=REPOSITORY)  # noqa: E731
    chat_server.answer = lambda request: time.sleep(0.01) or request["messages"][-1]["content"].replace("brown ", "")
    whole = curation(tmp_path / "whole", records(count))
    assert start(whole).wait() == [0]
    assert len(chat_server.requests) == count
    chat_server.requests.clear()
    torn = curation(tmp_path / "torn", records(count))
    for until in (15, 40):
        process = start(torn)
        while len(chat_server.requests) < until:
            time.sleep(0.005)
            assert process.alive(), process.text()
        process.kill()
        with (torn.path / "answers.jsonl").open("ab") as file:
            file.write(b'{"key": "torn')
    assert start(torn).wait() == [0]
    assert torn.file("refine").read_bytes() == whole.file("refine").read_bytes()
    assert count <= len(chat_server.requests) <= count + 2 * 2  # those under way at a kill

"""Instruction data from captions and boxes: what is asked, what is refused, and a whole run on the mini world, whose
teacher is an endpoint that knows the truth and has planted faults."""

import json
import signal
from collections import Counter
from pathlib import Path

import pytest

from minigpt4.common.binding import bind
from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.schemas import DatasetConfig
from minigpt4.curation import instructions
from minigpt4.curation.instructions import KINDS, RefusedAnswer, assign, read_answer, read_images, read_prompts
from minigpt4.datasets import EvalLoader, builder_of
from minigpt4.datasets.datasets.dataloader_utils import BadSampleMonitor
from minigpt4.evaluation.hallucination import COCO_OBJECTS, read_synonyms
from minigpt4.mini.files import _OWN_SCENES, ConversationSize, write_conversations
from minigpt4.mini.scenes import THINGS, conversation, five_captions, sample_scenes

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "prompts" / "instructions"
PROMPTS = read_prompts(FOLDER)
NAMES = read_synonyms(COCO_OBJECTS)
LONG = "The picture shows a brown dog that sleeps on a red blanket in front of a window, and a cat beside it."


def blocks(*turns):
    """Turns in the form that is asked for."""
    return "\n".join(f"{('Question', 'Answer')[n % 2]}:\n{turn}\n===" for n, turn in enumerate(turns))


def image(number=1, captions=("A dog.",), boxes=()):
    return instructions.DescribedImage(str(number), f"{number:012d}.jpg", captions, boxes)


# What is read

BOX = {"image_id": 9, "category_id": 18, "bbox": [64.0, 120, 160, 372.5], "iscrowd": 0}
IMAGES = [{"id": 9, "file_name": "9.jpg", "width": 640, "height": 480}, {"id": 25, "file_name": "25.jpg"}]
IMAGES[1] |= {"width": 100, "height": 200}


def coco(folder, **changes):
    """COCO's two files about two images; `changes` of the instances' fields."""
    said = [{"id": n, "image_id": 9, "caption": f"  Caption {n}\nof a dog. \n"} for n in range(7)]
    said.append({"id": 7, "image_id": 25, "caption": "A zebra."})
    boxes = [BOX, {"image_id": 9, "category_id": 24, "bbox": [0.5, 0, 10.25, 1]}]
    names = [{"id": 18, "name": "dog"}, {"id": 24, "name": "zebra"}]
    instances = {"images": IMAGES, "annotations": boxes, "categories": names, **changes}
    for name, content in {"captions": {"images": IMAGES, "annotations": said}, "instances": instances}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / "captions.json", folder / "instances.json"


def test_teacher_reads_five_captions_a_line_each_and_boxes_as_shares_of_the_picture(tmp_path):
    dog, zebra = read_images(*coco(tmp_path))
    captions = "\n".join(f"Caption {n} of a dog." for n in range(5))
    assert dog.text(boxes=False) == captions
    assert dog.text(boxes=True) == f"{captions}\n\ndog: [0.1, 0.25, 0.35, 1.0]\nzebra: [0.001, 0.0, 0.017, 0.002]"
    assert (zebra.text(boxes=True), zebra.file) == ("A zebra.", "25.jpg")


DAMAGES = [
    *({"image_id": 77}, {"category_id": 1}, {"bbox": [0, 0, -1, 1]}, {"bbox": [0, 0, "1", 1]}, {"bbox": [0, 0, 1]}),
    *({"bbox": None}, {"bbox": [0, 0, 1, float("nan")]}),
]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"categories": None}, ConfigError, "instances.json: is not COCO's instances_"),
        ({"images": [{"id": 9}]}, ConfigError, "is not COCO's instances_"),
        ({"images": [IMAGES[0] | {"id": 1}], "annotations": []}, ConfigError, "must be of the same split"),
        *(({"annotations": [BOX, BOX | own]}, SampleError, "annotation 2 is not a box") for own in DAMAGES),
    ],
)
def test_damaged_boxes_are_named_before_anything_is_asked(changes, error, words, tmp_path):
    with pytest.raises(error, match=words):
        read_images(*coco(tmp_path, **changes))


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("detail", "system: |", "sistem: |", r"detail.yaml:\n.*detail.sistem: unknown key; .*did you mean 'system'"),
        ("detail", "pairs: none", "pairs: one", r"detail.questions: go with `pairs: none`"),
        ("detail", "pairs: none", "pairs: many", r"detail.pairs: 'many'"),
        ("conversation", "  - context: |", "  - contents: |", r"conversation.examples\[0\]"),
        ("refused", "i apologi[sz]e", "i apologi[sze", r"refused.yaml: `refused` must be lists of regular"),
    ],
)
def test_prompt_that_is_wrong_is_named(name, old, new, words, tmp_path):
    for file in FOLDER.glob("*.yaml"):
        text = file.read_text()
        (tmp_path / file.name).write_text(text.replace(old, new, 1) if file.stem == name else text)
    with pytest.raises(ConfigError, match=words):
        read_prompts(tmp_path)


def records_of(images, counts=None):
    return [record for _, record in assign(images, PROMPTS, counts)]


def test_kind_of_an_image_is_its_own_and_counts_take_other_images_only_where_they_must(script):
    images = [image(number) for number in range(1580)]
    whole = records_of(images)
    shares = Counter(record["kind"] for record in whole)
    assert all(abs(shares[kind] - 10 * share) < 60 for kind, share in KINDS.items())
    assert records_of(images[::-1]) == whole
    assert {one["id"] for one in records_of(images[::2])} < {one["id"] for one in whole}
    chosen = records_of(images, dict.fromkeys(KINDS, 500))
    assert Counter(record["kind"] for record in chosen) == dict.fromkeys(KINDS, 500)
    assert len({record["image"] for record in chosen}) == 1500
    assert len({record["id"] for record in records_of(images[:3], dict.fromkeys(KINDS, 3))}) == 9
    assert script.read_counts(["158"]) == KINDS
    assert sum(script.read_counts(["1000"]).values()) == 1000


# What is refused

CAT = ("What is it?", "A cat.")
SOURCES, UNSURE = "it speaks of its sources", "no definite answer"
OUTSIDE, NONE, NUMBER = "text outside the turns", "no question and answer", "wrong number of questions"
REFUSED = {
    "conversation": [
        *((text, NONE) for text in ("", "<think>Question: a", "A cat.", '[{"question": "What')),
        (blocks(*CAT, "Where is it?"), "odd turns"),
        (blocks(*CAT) + "\nAnswer: Yes.", "odd turns"),
        (blocks("What is it?", "", "Where?", "Here."), "an empty turn"),
        (blocks(*CAT, "Where is it?", "On a mat.") + "\nI can write more.", OUTSIDE),
        (blocks(*CAT), NUMBER),
        (blocks(*CAT, "What is IT?", "It is a cat."), "a question twice"),
        *((blocks(*CAT, "Where?", f"There {sign}"), "cannot be trained on") for sign in ("<image>", "\ufffd")),
        (blocks(*CAT, "Where is it?", "It is on the mat that lies in front of the"), "fragment"),
        (blocks(*CAT, "Where is it?", "On a m").removesuffix("\n==="), "fragment"),
        (blocks(*CAT, "Who?", "yes " * 9), "repetition"),
        (blocks(*CAT, "Whose is it?", "It may be his."), "a guess"),
        (blocks(*CAT, "Und?", "Das ist eine Katze, die auf einer Matte liegt und dort ruht."), "not English"),
    ],
    "detail": [
        *((" ", "empty"), ("A dog and a cat.", "fragment"), (LONG[:60], "fragment"), (f"{LONG} {LONG}", "repetition")),
        *((blocks("What is it?", LONG), OUTSIDE), (f"{LONG} There are five captions.", SOURCES)),
        *((json.dumps(own), "it is JSON or code") for own in ({"answer": LONG}, [LONG], LONG)),
        (f"```\n{LONG}\n```", "it is JSON or code"),
        (f"Sure! Here is a detailed description of the picture:\n{LONG}", "it explains itself"),
    ],
    "complex_reasoning": [(blocks(*CAT, "Where is it?", "On a mat."), NUMBER)],
}
SAYS = {
    SOURCES: "The caption says that it sleeps. | Its bounding box is large. | It is at [0.1, 0.25, 0.5, 0.75]. | Based "
    "on the description, it sleeps. | According to the given sentences it is warm. | From the information provided it "
    "is warm. | As mentioned it sleeps.",
    UNSURE: "It cannot be determined. | It\u2019s not clear. | It is hard to tell. | The breed is not specified. | "
    "There is no information about it.",
    "an apology or a refusal": "I'm sorry, this is not for me. | As an AI I know no cats. | I cannot see the picture.",
}
for reason, texts in SAYS.items():
    answers = [blocks("Why is it here?", f"{text} Cats like warm places.") for text in texts.split(" | ")]
    REFUSED["complex_reasoning"] += [(answer, reason) for answer in answers]


@pytest.mark.parametrize(
    ("kind", "answer", "reason"), [(kind, *one) for kind, answers in REFUSED.items() for one in answers]
)
def test_answer_is_refused_under_its_reason(kind, answer, reason):
    with pytest.raises(RefusedAnswer) as found:
        read_answer(answer, PROMPTS[kind], "1")
    assert found.value.args[0] == reason


GOOD = [
    ("conversation", blocks(*CAT, "Is there a dog?", "No"), "|".join((*CAT, "Is there a dog?", "No"))),
    ("conversation", "Well:\n**Question 1:** Q?\n**Answer 1:** A\nB.\nQuestion: R?\nAnswer: C.", "Q?|A\nB.|R?|C."),
    ("conversation", "Question: Q? === Answer: A. === Question: R? === Answer: B.", "Q?|A.|R?|B."),
    ("complex_reasoning", f"<think>Hm.</think>{blocks('Why?', LONG)}", f"Why?|{LONG}"),
    ("complex_reasoning", blocks("Why?", "They carry boxes. They might move, perhaps."), None),
    ("detail", f"{LONG} It\u2019s a calm scene, and a text on the wall gives the date.", None),
    *((kind, own["answer"], None) for kind, prompt in PROMPTS.items() for own in prompt.examples),
]


@pytest.mark.parametrize(("kind", "answer", "turns"), GOOD)
def test_good_answers_and_the_examples_of_the_prompts_pass(kind, answer, turns):
    values = [turn["value"].replace("<image>", "").strip() for turn in read_answer(answer, PROMPTS[kind], "1")]
    assert turns in (None, "|".join(values))
    said = {read_answer(answer, PROMPTS[kind], str(n))[0]["value"] for n in range(99)}
    questions = PROMPTS[kind].questions or values[:1]
    assert said == {text for own in questions for text in (f"<image>\n{own}", f"{own}\n<image>")}


def test_objects_that_neither_captions_nor_boxes_know_are_possible_inventions():
    texts = {
        "Two puppies lie on a sofa.": ["couch"],
        "There is no cat. No, it is a horse. A man is not there.": ["horse"],
        "A dog without a frisbee. The ball isn't round.": [],
        "A hot dog lies beside the dog, on a chair.": ["hot dog"],
    }
    for text, invented in texts.items():
        turns = [{"value": "Where is the zebra?"}, {"value": text}]
        assert instructions.possible_inventions(turns, image(boxes=[("chair", [0, 0, 1, 1])]), NAMES) == invented


# A whole run on the mini world

SIZE = ConversationSize(captions=1, instruct=48, test=1, seed=3)
RECORDS = SIZE.instruct
PASSING = dict(enumerate(([429], [500, 503], ["hang"], ["half"], ["garbage"])))
"""What happens to the first scenes: they are asked for again."""
STAYS, CUT_ONCE, CUT, TELLS_ONCE, TELLS, HALF_ONCE, SILENT = range(6, 13)
"""Numbers of scenes with other faults; those of INVENTS name a thing that is not there."""
INVENTS = range(13, RECORDS, 4)


class Teacher:
    """Answers the truth about the scenes, but for planted faults, which depend on the request alone."""

    def __init__(self, server, passing):
        server.answer, server.rule, server.usage = self.answer, self.rule, {"prompt_tokens": 9, "completion_tokens": 7}
        server.headers, self.passing = {"Retry-After": "0.01"}, {number: [*own] for number, own in passing.items()}
        known = THINGS[: SIZE.kinds]
        scenes = list(sample_scenes("train", RECORDS, SIZE.seed, _OWN_SCENES + SIZE.captions, known))
        self.scenes = [(scene, "\n".join(five_captions(scene))) for scene in scenes]
        there = [{group.thing for group in scene.groups} for scene in scenes]
        self.invented = [next(thing.name for thing in known if thing not in own) for own in there]
        self.asked = 0

    def scene(self, request):
        """Number, scene, kind, and whether it is the second request."""
        system, text = (request["messages"][place]["content"] for place in (0, -1))
        number = next(n for n, (_, captions) in enumerate(self.scenes) if text.startswith(captions))
        kind = next(kind for kind, prompt in PROMPTS.items() if prompt.system == system)
        return number, self.scenes[number][0], kind, "refused" in text

    def rule(self, request):
        number, _, _, again = self.scene(request)
        if number == STAYS:
            return 500
        self.asked += 1
        if self.passing.get(number):
            return self.passing[number].pop(0)
        return "length" if number == CUT or (number == CUT_ONCE and not again) else "answer"

    def answer(self, request):
        number, scene, kind, again = self.scene(request)
        turns = [turn["value"].replace("<image>", "").strip() for turn in conversation(scene, kind)]
        if number in INVENTS:
            turns[-1] += f" Behind it stands {self.invented[number]}."
        if number == TELLS or (number == TELLS_ONCE and not again):
            turns[-1] += " The captions say so."
        text = turns[1] if kind == "detail" else blocks(*turns)
        half = number == HALF_ONCE and not again
        return None if number == SILENT else text[: text.rfind(".") - 9] if half else text


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("scripts/make_instructions.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    write_conversations(folder, SIZE)
    return folder


@pytest.fixture
def arguments(world, chat_server):
    """`arguments(folder)`: of a run there."""

    def arguments(folder, *more):
        files = ["--captions", world / "captions_train.json", "--instances", world / "instances_train.json"]
        judge = ["--judge-url", chat_server.url, "--judge-model", "tiny", "--judge-cache", folder / "cache.jsonl"]
        return [
            *map(str, files + judge),
            f"--output={folder / 'made'}",
            "--judge-timeout=3",
            "--options",
            "attempts=3",
            *more,
        ]

    return arguments


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.json*") if file.name != "requests.jsonl"}


def test_every_fault_is_counted_and_the_rest_is_a_dataset(script, arguments, chat_server, world, tmp_path, capsys):
    teacher, made = Teacher(chat_server, PASSING), tmp_path / "made"
    images = read_images(world / "captions_train.json", world / "instances_train.json")
    for one, (scene, captions) in zip(images, teacher.scenes, strict=True):
        assert one.text(boxes=False) == captions
        assert Counter(name for name, _ in one.boxes) == {group.thing.name: group.count for group in scene.groups}
    assert script.main(arguments(tmp_path, "--dry-run")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["records"], plan["requests"], plan["cached"], plan["price"]) == (RECORDS, RECORDS, 0, None)
    assert chat_server.requests == []
    assert script.main(arguments(tmp_path)) == 0
    report = json.loads((made / "report.json").read_text())["kinds"]["all"]
    cut, silent = "cut at the length limit", "empty"
    assert report["dropped"] == {"status 500": 1, cut: 1, SOURCES: 1, silent: 1}
    assert report["refused_answers"] == {cut: 3, SOURCES: 3, "fragment": 1, "status 500": 1, silent: 1}
    assert (report["asked"], report["kept"], report["kept_at_second"]) == (RECORDS, RECORDS - 4, 3)
    assert report["tokens_out"] == 7 * (RECORDS - 1 + 5)
    records, review = (
        {record["id"]: record for record in map(json.loads, (made / f"{name}.jsonl").open())}
        for name in ("records", "review")
    )
    assert {record["prompt"] for record in records.values()} == {prompt.digest for prompt in PROMPTS.values()}
    wanted = {f"{SIZE.captions + number:06d}": [teacher.invented[number]] for number in INVENTS}
    found = {key[:6]: record["possible_inventions"] for key, record in review.items()}
    assert found == wanted  # all that were planted, and no other
    for name in (*KINDS, "instruct"):
        info = {"ann_path": str(made / f"{name}.json"), "image_path": str(world / "images"), "id_field": "id"}
        vision = {part: {"name": "blip2_image_eval", "image_size": 28} for part in ("train", "eval")}
        section = {"builder": "llava_conversations", "build_info": info, "vis_processor": vision}
        dataset = builder_of(name, bind(DatasetConfig, section, section=name, source="test")).build("train")
        strict = BadSampleMonitor(None, max_share=0.0, max_in_a_row=1)
        read = [key for batch in EvalLoader(dataset, 8, num_workers=0, ledger=strict) for key in batch["image_id"]]
        whole = [key for key, own in records.items() if "dropped" not in own and name in (own["kind"], "instruct")]
        assert read == whole
    asked, before = len(chat_server.requests), contents(made)
    assert script.main(arguments(tmp_path)) == 0
    assert len(chat_server.requests) == asked + 3  # the scene whose request fails, with its repeats
    assert contents(made) == before
    assert script.main(arguments(tmp_path, "--leave-out-review")) == 0
    left = {record["id"] for record in json.loads((made / "instruct.json").read_text())}
    assert left == {key for key, record in records.items() if "dropped" not in record} - review.keys()


def test_killed_it_ends_with_the_same_bytes_and_asks_nothing_twice(script, arguments, chat_server, warm, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    Teacher(chat_server, {})
    assert script.main(arguments(whole)) == 0
    teacher = Teacher(chat_server, {})
    chat_server.requests.clear()
    answer, limits = teacher.answer, [9, RECORDS + 4]  # in the first requests, and in the second ones

    def answer_or_die(request):
        if limits and len(chat_server.requests) >= limits[0]:
            limits.pop(0)
            run.send(signal.SIGKILL)
        return answer(request)

    chat_server.answer = answer_or_die
    while limits:
        run = warm.script(script.__file__, *arguments(folder, "--judge-at-once", "1"), cwd=REPOSITORY)
        assert run.wait() == [-signal.SIGKILL], run.text()
    (progress,) = (folder / "made/progress").iterdir()
    with progress.open("a") as file:
        file.write('{"text": "torn')
    assert script.main(arguments(folder)) == 0
    assert contents(folder / "made") == contents(whole / "made")
    assert teacher.asked <= RECORDS - 1 + 5 + 1 + 2  # silence is asked twice; two were under way


COMPLAINTS = {
    "--count detial=3": "did you mean 'detail'",
    "--count 3 4": "--count 3: write a number, or KIND=NUMBER",
    "--count detail=99": "detail=99, but there are 48 images",
    "--prompts nowhere": "conversation.yaml: no such file",
    f"--synonyms {COCO_OBJECTS}": "coco_objects.txt lacks",
    "--judge-url ftp://x": "--judge-url",
    "--options cost_limit=1": "cost_limit: needs price_in",
    "--options max_token=1": "did you mean 'max_tokens'",
}


@pytest.mark.parametrize("words", COMPLAINTS)
def test_option_that_cannot_be_is_refused(script, words, arguments, chat_server, tmp_path, capsys):
    assert script.main([*arguments(tmp_path), *words.split()]) == 2
    assert COMPLAINTS[words] in capsys.readouterr().err
    assert chat_server.requests == []

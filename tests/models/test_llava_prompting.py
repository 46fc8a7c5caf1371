"""Conversations become the ids and masks of the LLaVA reference, and are trained where it drops them by mistake."""

import copy
import functools
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken

from minigpt4.common.errors import SampleError
from minigpt4.common.llava_schema import LlavaConfig
from minigpt4.conversation.llava import LLAVA_TEMPLATES, LlavaConversation, single_turn
from minigpt4.models.llava_prompting import IMAGE_TOKEN_INDEX, LlavaPrompts
from minigpt4.models.tokenizer import load_tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "parity_llava" / "model.json").read_text(encoding="utf-8"))
CONVERSATIONS = {
    name: (case["turns"], case["has_image"]) for name, case in GOLDEN["preprocess"]["conversations"].items()
}
CASES = GOLDEN["preprocess"]["cases"] + GOLDEN["preprocess"]["truncation"]
ROLE_CASES = GOLDEN["preprocess"]["role_cases"]
DROPPED = [case for case in CASES if "printed" in case]
IMAGE = (0, 4)


@pytest.fixture(scope="session")
def tokenizer_with(tmp_path_factory, llava_dir):
    """`tokenizer_with(key=value)`: the tiny tokenizer with these keys in its tokenizer_config.json."""

    @functools.cache
    def load(**keys):
        folder = Path(shutil.copytree(llava_dir / "vicuna_tiny", tmp_path_factory.mktemp("llm") / "vicuna"))
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | keys))
        return load_tokenizer(folder, published=False)

    return load


@pytest.fixture
def prompts(tokenizer_with):
    """`prompts(version, legacy=..., **keys)`: what the model of these keys of `model:` makes prompts with."""

    def build(version="v1", legacy=True, **keys):
        tokenizer = tokenizer_with(legacy=legacy)
        if version in ("mpt", "chatml_direct"):
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        return LlavaPrompts(tokenizer, LlavaConfig(conv_template=version, **keys))

    return build


def dialogue(turns):
    return [{"from": role, "value": text} for role, text in turns]


def tokens_of(builder, turns, has_image) -> tuple[list[int], list[list[int]]]:
    """Ids of a conversation with -200 for an image, and the spans trained on, in the form of the golden data."""
    row = builder.dialogue_row(dialogue(turns), [IMAGE] if has_image else [], lambda: "it")
    ids, trained = [], []
    for token, target, image in zip(row.ids, row.targets, row.images, strict=True):
        if image <= IMAGE[0]:
            ids.append(token if image < 0 else IMAGE_TOKEN_INDEX)
            trained.append(target != -100)
            assert target in (-100, token)
    edges = [place for place in range(len(ids) + 1) if [*trained, False][place] != [False, *trained][place]]
    return ids, [list(span) for span in zip(edges[::2], edges[1::2], strict=True)]


def trained_places(ids, spans) -> list[int]:
    """Without images, which the reference takes out of its mask later."""
    return [place for first, last in spans for place in range(first, last) if ids[place] != IMAGE_TOKEN_INDEX]


def title(case) -> str:
    return "-".join(str(case[key]) for key in ("version", "legacy", "conversation", "model_max_length") if key in case)


@pytest.mark.parametrize("case", CASES, ids=title)
def test_ids_and_masks_are_those_of_the_reference(prompts, case):
    turns, has_image = CONVERSATIONS[case["conversation"]]
    limit = case["model_max_length"] if not has_image else 2048
    builder = prompts(case["version"], case["legacy"], tokenizer_model_max_length=limit)
    if "error" in case:
        with pytest.raises(SampleError, match="it: "):
            tokens_of(builder, turns, has_image)
        return
    ids, spans = tokens_of(builder, turns, has_image)
    assert ids == case["input_ids"]
    if "printed" not in case:
        assert spans == case["supervised"]


@pytest.mark.parametrize("name", GOLDEN["dataset"])
def test_records_of_a_file_are_those_of_the_reference(prompts, llava_dir, name):
    expected = GOLDEN["dataset"][name]
    records = json.loads((llava_dir / expected["file"]).read_text())
    for record, item in zip(records, expected["items"], strict=True):
        turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        own = tokens_of(prompts(expected["version"]), turns, "image" in record)
        assert own == (item["input_ids"], item["supervised"])


@pytest.mark.parametrize("case", DROPPED, ids=title)
def test_what_the_reference_drops_is_trained_or_dropped_as_the_switch_says(prompts, case):
    turns, has_image = CONVERSATIONS[case["conversation"]]
    assert case["supervised"] == []
    ids, spans = tokens_of(prompts(case["version"], case["legacy"]), turns, has_image)
    assert tokens_of(prompts(case["version"], case["legacy"], reference_masks=True), turns, has_image)[1] == []
    trained = [prompts().tokenizer.decode(ids[first:last]) for first, last in spans]
    answers = [text for role, text in turns if role == "gpt" and text]
    assert ["".join(text.split()) for text in trained] == ["".join(f"{text}</s>".split()) for text in answers]


@pytest.mark.parametrize("case", [case for case in CASES if "error" not in case], ids=title)
def test_the_switch_changes_no_other_mask(prompts, case):
    turns, has_image = CONVERSATIONS[case["conversation"]]
    builder = prompts(
        case["version"], case["legacy"], reference_masks=True, tokenizer_model_max_length=case["model_max_length"]
    )
    ids, train = builder.tokens(builder._turns(dialogue(turns), has_image), has_image)
    ids = [*builder.start, *ids]
    spans = case["supervised"]
    if not has_image:
        ids, train = ids[: case["model_max_length"]], train[: case["model_max_length"] - 1]
    assert ids == case["input_ids"]
    assert [place for place, is_trained in enumerate([False, *train]) if is_trained] == trained_places(ids, spans)


@pytest.mark.parametrize("case", ROLE_CASES, ids=title)
def test_roles(prompts, case):
    names = {role for role, _ in case["turns"]}
    is_right = names <= {"human", "gpt"} and any("<image>" in text for _, text in case["turns"])
    for published in (False, True):
        builder = prompts(case["version"], reference_masks=published)
        if "error" in case or not (is_right or published):
            with pytest.raises(SampleError, match="it: "):
                tokens_of(builder, case["turns"], has_image=True)
        else:
            ids, spans = tokens_of(builder, case["turns"], has_image=True)
            assert ids == case["input_ids"]
            assert trained_places(ids, spans) == trained_places(ids, case["supervised"])


@pytest.mark.parametrize("case", GOLDEN["preprocess"]["im_start_end"], ids=title)
def test_tokens_around_an_image(llava_dir, case):
    tokenizer = load_tokenizer(llava_dir / "vicuna_tiny", published=False)
    names = [AddedToken(name, normalized=False) for name in GOLDEN["preprocess"]["im_start_end_ids"]]
    tokenizer.add_tokens(names, special_tokens=True)
    builder = LlavaPrompts(tokenizer, LlavaConfig(conv_template=case["version"], mm_use_im_start_end=True))
    assert tokens_of(builder, *CONVERSATIONS[case["conversation"]]) == (case["input_ids"], case["supervised"])


@pytest.mark.parametrize("case", GOLDEN["tokenizer_image_token"], ids=lambda case: repr(case["prompt"])[:40])
def test_prompts_with_placeholders_become_the_ids_of_the_reference(tokenizer_with, case):
    tokenizer = tokenizer_with(legacy=case["legacy"], add_bos_token=case["add_bos_token"])
    builder = LlavaPrompts(tokenizer, LlavaConfig())
    images = [[(number, 1) for number in range(case["prompt"].count("<image>"))]]
    (row,) = builder.prompt_rows([case["prompt"]], images, str, builder.start)
    ids = [token if image < 0 else IMAGE_TOKEN_INDEX for token, image in zip(row.ids, row.images, strict=True)]
    assert ids == case["ids"]


# Templates


@pytest.mark.parametrize("case", GOLDEN["templates"]["prompts"], ids=lambda case: f"{case['template']}-{case['case']}")
def test_conversations_read_as_those_of_the_reference(case):
    messages = GOLDEN["templates"]["cases"][case["case"]]
    if "error" in case or case["case"] == "picture_tuple":
        return  # turns after a caption; a widget's state
    conversation = LlavaConversation(case["template"])
    for role, text in messages:
        conversation.append_message(conversation.roles["ua".index(role)], text)
    assert conversation.get_prompt() == case["prompt"]


@pytest.mark.parametrize("name", LLAVA_TEMPLATES)
def test_single_questions_and_conversations_are_the_same_to_the_model(prompts, name):
    builder, conversation = prompts(name), LlavaConversation(name)
    conversation.add_image()
    conversation.add_image()
    conversation.ask("Which is {older}?")
    conversation.open_answer()
    tags = builder.image
    said = single_turn(name).format(f"{tags}\n{tags}\nWhich is {{older}}?")
    assert builder.split_images(conversation.get_prompt()) == said.split("<image>")
    assert conversation.take_back() == "Which is {older}?"
    conversation.open_answer()
    conversation.fill_answer("The <image> one.")
    assert len(builder.split_images(conversation.get_prompt())) == 3


def test_chatml_is_the_published_text():
    turns = [["human", "<image>\nWhat is it?"], ["gpt", "A dog."], ["human", "Is it small?"], ["gpt", "Yes."]]
    text = (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>"
        "<|im_start|>assistant\nA dog.<|im_end|><|im_start|>user\nIs it small?<|im_end|>"
        "<|im_start|>assistant\nYes.<|im_end|>"
    )
    assert LLAVA_TEMPLATES["chatml_direct"].prompt([(role == "gpt", said) for role, said in turns]) == text


def test_system_text_and_placeholders_of_a_chat():
    conversation = LlavaConversation("llava_llama_2")
    conversation.set_system("Be brief.")
    with pytest.raises(SampleError, match="must not hold <image>"):
        conversation.ask("What is <image>?")
    conversation.ask("Hello?")
    conversation.open_answer()
    assert conversation.get_prompt() == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello? [/INST]"


ASKED = ["human", "<image>\nWhat is it?"]


@pytest.mark.parametrize(
    ("turns", "images", "text"),
    [
        ([ASKED, ["gpt", "A <image>."]], 1, "turn 1 of its conversation is an answer, and holds <image>"),
        ([["human", "What is it?"], ["gpt", "A dog."]], 1, "0 of its turns hold <image>, but it has 1 images"),
        ([ASKED, ["gpt", "A."], ASKED, ["gpt", "B."]], 1, "2 of its turns hold <image>, but it has 1 images"),
        ([ASKED, ["gpt", "A."], ASKED, ["gpt", "B."]], 3, "2 of its turns hold <image>, but it has 3 images"),
        ([ASKED, ["gpt", None]], 1, "turn 1 of its conversation must have 'from' and 'value'"),
        ([], 0, "human and gpt must speak in turn"),
        ([["gpt", "Hello."]], 0, "human and gpt must speak in turn"),
        ([ASKED, ["user", "A."]], 1, "turn 1 of its conversation is from 'user', neither human nor gpt"),
    ],
)
def test_what_is_no_conversation_is_refused_with_the_sample(prompts, turns, images, text):
    with pytest.raises(SampleError, match=f"it: {text}"):
        prompts().dialogue_row(dialogue(turns), [IMAGE] * images, lambda: "it")


def test_placeholder_in_text_alone_is_text(prompts):
    row = prompts().dialogue_row(dialogue([["human", "What does <image> mean?"], ["gpt", "An image."]]), [], str)
    assert "<image>" in prompts().tokenizer.decode(row.ids)


def test_published_code_takes_unk_for_padding(prompts):
    turns = [ASKED, ["gpt", "It is <unk> here."]]
    rows = [
        prompts("llava_v0", reference_masks=switch).dialogue_row(dialogue(turns), [IMAGE], str)
        for switch in (False, True)
    ]
    at = rows[0].ids.index(0, rows[0].images.index(3) + 1)
    assert rows[1].ids == rows[0].ids[:at] + rows[0].ids[at + 1 :]


@pytest.mark.parametrize("version", ["v1", "llava_llama_2", "chatml_direct", "v1_mmtag"])
@pytest.mark.parametrize("legacy", [True, False])
def test_several_images_stand_among_the_words_and_answers_alone_are_learned(version, legacy, prompts):
    turns = [
        *[["human", "Is <image> older than <image>, or <image>?"], ["gpt", "The first is."]],
        *[["human", "And what of\n<image>"], ["gpt", "It is new."]],
    ]
    builder, template = prompts(version, legacy), LLAVA_TEMPLATES[version]
    spans = [(4 * number, 4) for number in range(4)]
    row = builder.dialogue_row(dialogue(turns), spans, str)
    assert [image for image in row.images if image >= 0] == list(range(16))
    turns[2][1] = "<image>\nAnd what of"  # a single place of a question: at its front, as published
    said = [(role == "gpt", text.replace("<image>", builder.image)) for role, text in turns]
    pieces = builder.encode(template.prompt(said).split("<image>"))
    places = [place for place, image in enumerate(row.images) if image >= 0]
    runs = [places[start : start + 4] for start in range(0, 16, 4)]
    assert all(run == list(range(run[0], run[0] + 4)) for run in runs)
    ends = [run[0] for run in runs]
    starts = [len(builder.start), *(run[-1] + 1 for run in runs)]
    between = [row.ids[start:end] for start, end in zip(starts, [*ends, None], strict=True)]
    assert between[:3] == pieces[:3]
    assert between[3] == pieces[3] or version == "chatml_direct"  # there an answer has other ids than in a whole prompt
    last, wanted = (builder.tokenizer.decode(ids).replace(" ", "") for ids in (between[3], pieces[3]))
    assert last == wanted
    learned = [token for token, target in zip(row.ids, row.targets, strict=True) if target >= 0]
    words = builder.tokenizer.decode(learned).replace(" ", "")
    assert words == f"Thefirstis.{template.end}Itisnew.{template.end}"
    assert not any(row.targets[place] >= 0 for place in places)


def test_published_masks_put_all_images_before_a_question(prompts):
    turns = dialogue([["human", "Is <image> older than <image>?"], ["gpt", "Yes."]])
    row = prompts(reference_masks=True).dialogue_row(turns, [(0, 4), (4, 4)], str)
    places = [place for place, image in enumerate(row.images) if image >= 0]
    assert places == list(range(places[0], places[0] + 8))

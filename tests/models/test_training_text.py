"""Samples become rows of the right text: prompts in their template, answers with their end symbol."""

import logging
import random
from pathlib import Path

import pytest

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.models.prompting import PromptBuilder, apply_template, read_prompts, read_samples
from minigpt4.models.tokenizer import load_tokenizer, start_ids

CASES = Path(__file__).parents[1] / "data/cases"
TEMPLATE = "###Human: {} ###Assistant: "
IMAGE = "<Img><ImageHere></Img>"
ANSWER = "A boat on a lake."
QUESTION = "And then? "


@pytest.fixture(scope="module")
def tokenizer(parity_dir):
    return load_tokenizer(parity_dir / "vicuna_tiny")


@pytest.fixture(scope="module")
def ids(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def rules(tokenizer):
    def build(**changes) -> PromptBuilder:
        fields = {
            "tokenizer": tokenizer,
            "prompt_list": [],
            "prompt_template": "",
            "chat_template": False,
            "max_txt_len": 160,
            "max_context_len": 3800,
            "end_sym": "###",
            "truncate_end_sym": False,
        }
        return PromptBuilder(**fields | changes)

    return build


def conversation(answers=(ANSWER, ANSWER)):
    return read_samples(
        {"conv_q": [f"{IMAGE} What? !@#{QUESTION}"], "conv_a": ["!@#".join(answers)], "connect_sym": "!@#"}
    )


# Conditions


def test_condition_without_any_prompt_is_the_image_alone(rules):
    (row,) = rules().condition_rows(read_samples({"answer": ["a"]}), [[(0, 8)]])
    assert row.images == list(range(8))


def test_one_prompt_is_drawn_for_the_whole_batch(rules):
    prompts = [f"{number} {IMAGE}" for number in range(50)]
    samples = read_samples({"answer": ["a"] * 4})
    random.seed(3)
    rows = rules(prompt_list=prompts).condition_rows(samples, [[(0, 2)]] * 4)
    assert rows[0] == rows[1] == rows[2] == rows[3]
    random.seed(3)
    again = random.choice(prompts)
    assert rows == rules(prompt_list=[again]).condition_rows(samples, [[(0, 2)]] * 4)


@pytest.mark.parametrize(("chat_template", "before"), [(False, "Look: "), (True, "###Human: Look: ")])
def test_instructions_go_into_the_template_only_where_asked_for(rules, ids, chat_template, before):
    samples = read_samples({"answer": ["a"], "instruction_input": "Look: <ImageHere>"})
    build = rules(prompt_template=TEMPLATE, chat_template=chat_template)
    (row,) = build.condition_rows(samples, [[(0, 2)]])
    after = " ###Assistant: " if chat_template else ""
    assert row.ids == [*ids(before), 0, 0, *ids(after)]


def test_instructions_come_before_the_prompt_list(rules, ids):
    samples = read_samples({"answer": ["a"], "instruction_input": "Hello. "})
    (row,) = rules(prompt_list=["never"]).condition_rows(samples, [[]])
    assert row.ids == ids("Hello. ")


def test_first_question_of_a_conversation_is_in_the_template(rules, ids):
    (row,) = rules(prompt_template=TEMPLATE).condition_rows(conversation(), [[(0, 2)]])
    assert row.ids == [*ids("###Human: <Img>"), 0, 0, *ids("</Img> What?  ###Assistant: ")]


# Answers at the exact boundary


def test_padding_piece_in_an_answer_is_no_target(rules, ids, tokenizer):
    row = rules().answer_rows(read_samples({"answer": ["a$$b"]}))[0]
    assert tokenizer.pad_token_id in row.ids
    assert tokenizer.pad_token_id not in row.targets
    assert row.attend == [1] * len(row)


def test_padding_piece_in_a_conversation_is_a_target_and_not_attended_to(rules, tokenizer):
    row = rules().answer_rows(conversation(("a$$b", "c")))[0]
    where = row.ids.index(tokenizer.pad_token_id)
    assert (row.targets[where], row.attend[where]) == (tokenizer.pad_token_id, 0)


# Prompts and templates


def test_prompts_are_the_lines_with_a_placeholder_without_line_ends(tmp_path, caplog):
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"{IMAGE} one \r\n\r\nnothing\n{IMAGE} dos ñ".encode())
    with caplog.at_level(logging.INFO, logger="minigpt4.models.prompting"):
        prompts = read_prompts(str(path), "[INST] {} [/INST] ")
    assert prompts == [f"[INST] {IMAGE} one  [/INST] ", f"[INST] {IMAGE} dos ñ [/INST] "]
    assert "2 training prompts, for example: [INST]" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_mark_of_a_prompt_file_is_no_part_of_a_prompt(tmp_path, encoding):
    text = (CASES / "prompts_bom.txt").read_bytes().decode("utf-8-sig")
    (tmp_path / "prompts.txt").write_bytes(text.encode(encoding))
    assert read_prompts(str(tmp_path / "prompts.txt"), TEMPLATE) == [
        f"###Human: {IMAGE} Describe this image. ###Assistant: ",
        f"###Human: {IMAGE} What is 100% of {{this}}? ###Assistant: ",
    ]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (f"{IMAGE} café".encode("cp1252"), "prompts.txt cannot be read: not UTF-8 text .byte 0xe9 in line 1"),
        (f"a\n{IMAGE} caf\ufffd".encode(), "prompts.txt, line 2 cannot be read: character"),
        (f"{IMAGE} a".encode("utf-16-le"), "prompts.txt, line 1 cannot be read: .*UTF-16"),
        (None, "prompts.txt cannot be read: "),
    ],
)
def test_unreadable_prompts_are_refused(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(MiniGPT4Error, match=f"model.prompt_path: .*{complaint}"):
        read_prompts(str(tmp_path / "prompts.txt"), "")


def test_no_prompt_file_means_no_prompts_and_draws_nothing():
    random.seed(0)
    state = random.getstate()
    assert read_prompts(None, TEMPLATE) == read_prompts("", TEMPLATE) == []
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("", "a {} b", "a {} b"),
        ("<{}>", "a", "<a>"),
        ("<{}>", "{x}", "<{x}>"),
        ("{{}}{}", "a", "{}a"),
    ],
)
def test_template_takes_the_text_as_it_is(template, text, expected):
    assert apply_template(template, text) == expected


def test_tokenizer_that_adds_no_bos_starts_with_nothing(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"a": 0, "<s>": 1}, []))
    assert start_ids(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")) == []

"""The prompt template by the chat template of a real tokenizer, one in ChatML's manner and one in LLaMA-2's."""

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from minigpt4.common.errors import ConfigError
from minigpt4.conversation import prompt_template_from_tokenizer

CHATML = (
    "{% for message in messages %}"
    "<|{{ message.role }}|>\n{{ message.content }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
BRACKETS = "{% for message in messages %}{{ bos_token + '[INST] ' + message.content | trim + ' [/INST]' }}{% endfor %}"


def template_of(chat_template: str | None, *, adds_bos: bool = True) -> str:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "name_or_path": "models/tiny"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **tokens)
    return prompt_template_from_tokenizer(tokenizer)


def test_template_holds_the_place_of_the_instruction():
    assert template_of(CHATML) == "<|user|>\n{}<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_leading_bos_is_left_to_a_model_that_puts_it_there_itself(adds_bos):
    assert template_of(BRACKETS, adds_bos=adds_bos) == ("" if adds_bos else "<s>") + "[INST] {} [/INST]"


def test_braces_of_the_chat_template_survive_formatting():
    assert template_of("{{ '{json: {}} ' }}" + CHATML).format("Hi.").startswith("{json: {}} <|user|>\nHi.")


@pytest.mark.parametrize(
    ("chat_template", "complaint"),
    [
        (None, "has no chat template; write model.prompt_template by hand"),
        (CHATML + CHATML, "holds the user's message 2 times, not once"),
        ("{{ raise_exception('too short') }}", "takes no instruction: too short"),
    ],
)
def test_chat_template_that_gives_none_is_refused_with_the_tokenizers_name(chat_template, complaint):
    with pytest.raises(ConfigError, match=f"'models/tiny' {complaint}"):
        template_of(chat_template)

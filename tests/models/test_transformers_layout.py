"""What a folder for transformers says as text: chat templates and tokenizers."""

import json
import random

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from minigpt4.conversation.llava import LLAVA_TEMPLATES, LlavaConversation, as_llava
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER, TemplateConversation, get_template
from minigpt4.models.tokenizer import load_tokenizer, start_ids
from minigpt4.models.transformers_layout import IMAGE_TOKEN, build_tokenizer, chat_template

TALKS = {f"llava {name}": lambda name=name: LlavaConversation(name) for name in LLAVA_TEMPLATES if "plain" not in name}
TALKS |= {name: lambda name=name: get_template(name) for name in ("vicuna0", "llama2", "minigptv2")}
TALKS["of training"] = lambda: TemplateConversation("###Human: {} ###Assistant: ", "###")
TALKS["untagged"] = lambda: TemplateConversation(
    "<|im_start|>user\n{}<|im_end|>\n", "<|im_end|>", image=IMAGE_PLACEHOLDER
)


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("system", [None, 'Be {brief} "x".'])
def test_chat_template_is_our_conversation(name, system):
    new = TALKS[name]
    read = (lambda prompt: as_llava(prompt, IMAGE_TOKEN)) if name.startswith("llava") else (lambda prompt: prompt)
    template = chat_template(new, read)
    talk, messages = new(), []
    if system:
        talk.set_system(system)
        messages.append({"role": "system", "content": system})
    talk.add_image()
    talk.add_image()
    for question, answer in (("What is it?", "A {% dog %}."), ("Und\nnun?", "Ja é.")):
        talk.ask(question)
        pictures = [{"type": "image"}] * 2 if len(messages) <= 1 else []
        messages.append({"role": "user", "content": [{"type": "text", "text": question}, *pictures]})
        for is_open in (True, False):
            if not is_open:
                talk.fill_answer(answer)
                messages.append({"role": "assistant", "content": answer})
            else:
                talk.open_answer()
            prompt = {"conversations": [messages], "chat_template": template, "add_generation_prompt": is_open}
            assert render_jinja_template(**prompt)[0] == [read(talk.get_prompt())]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("strips", [True, False])
def test_tokenizer_json_gives_the_ids_of_slow_llama(legacy, strips, llava_dir, tmp_path):
    source = llava_dir / "vicuna_tiny"
    settings = json.loads((source / "tokenizer_config.json").read_text())
    for file in ("config.json", "tokenizer.model"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    if strips:  # special tokens named without further word lose the blanks beside them
        del settings["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": legacy}))
    own = load_tokenizer(tmp_path, published=False)
    fast = build_tokenizer(own, 2048)
    image, chance = fast.convert_tokens_to_ids(IMAGE_TOKEN), random.Random(0)
    blocks = [*"a1# \n\té日😀", "dog ", "  ", "$$", "###", "</s>", "<s>", "<unk>", "[INST]"]
    for _ in range(500):
        parts = ["".join(chance.choices(blocks, k=chance.randrange(8))) for _ in range(chance.randrange(1, 4))]
        first, *later = own(parts, add_special_tokens=False)["input_ids"]
        wanted = start_ids(own) + first + [token for ids in later for token in (image, image, *ids)]
        assert fast((IMAGE_TOKEN * 2).join(parts))["input_ids"] == wanted, parts

"""LLaVA's conversation templates: what stands around the words of both sides, in training and when it answers.

Liu et al., arXiv 2304.08485 (`v0`, `llava_v0`) and 2310.03744 (`v1`); the texts are the published ones, character by
character. A template answers in one way and is trained in another where the published code does so (`llava_v0`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from minigpt4.common.errors import SampleError
from minigpt4.conversation.templates import IMAGE_MESSAGE, IMAGE_PLACEHOLDER, Turns

IMAGE_TOKEN = "<image>"
"""Where an image stands in LLaVA's files and prompts."""
SPEAKERS = ("human", "gpt")
"""Who speaks, in LLaVA's files."""
_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
_USER = _HUMAN.replace("human", "user")
_TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.The "
    "visual content will be provided with the following format: <Image>visual content</Image>."
)
_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_SAFE = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does not make "
    "any sense, or is not factually coherent, explain why instead of answering something not correct. If you don't "
    "know the answer to a question, please don't share false information."
)
_EXAMPLE = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n",
)


@dataclass(frozen=True)
class LlavaTemplate:
    """What stands around the words of user and assistant."""

    style: str
    """`plain`: image and caption; `two`: v1; `single`: v0; `llama_2`; `mpt`: ChatML without line ends."""
    system: str = ""
    roles: tuple[str, str] = ("USER", "ASSISTANT")
    sep: str = " "
    """Follows system text and questions; in `plain` and `single` every message."""
    end: str = "</s>"
    """Ends an answer."""
    tags: tuple[str, str] = ("", "")
    """Around an image."""
    example: Sequence[str] = ()
    """Question and answer that begin every conversation."""

    def asked(self, text: str | None, is_first: bool) -> str:
        """A user's message, "" or None for an empty one."""
        if self.style == "plain":
            return f"{text}{self.sep}" if text else ""
        if self.style == "llama_2":
            system = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if is_first else ""
            return f"{'' if is_first else '<s>'}[INST] {system}{text} [/INST]" if text else ""
        role = self.roles[0] if self.style == "mpt" else f"{self.roles[0]}:{' ' * bool(text)}"
        return f"{role}{text}{self.sep}" if text else role

    @property
    def answer_role(self) -> str:
        """What an answer follows, after `gap`."""
        return {"two": f"{self.roles[1]}:", "single": f"{self.roles[1]}:", "mpt": self.roles[1]}.get(self.style, "")

    @property
    def gap(self) -> str:
        return "" if self.style in ("plain", "mpt") else " "

    @property
    def before_end(self) -> str:
        return " " if self.style == "llama_2" else ""

    @property
    def opening(self) -> str:
        """What stands before the first message; of `llama_2` it is inside the first message."""
        return f"{self.system}{self.sep}" if self.style in ("two", "single", "mpt") else ""

    def prompt(self, messages: Sequence[tuple[bool, str | None]]) -> str:
        """All messages, (is it an answer, text) each, as the LLM reads them; an open or empty answer is its role."""
        parts = [self.opening]
        for index, (is_answer, text) in enumerate(messages):
            if not is_answer:
                parts.append(self.asked(text, index == 0))
            elif text:
                parts.append(f"{self.answer_role}{self.gap}{text}{self.before_end}{self.end}")
            else:
                parts.append(self.answer_role)
        return "".join(parts)


def _v0(system: str, tags: tuple[str, str] = ("", ""), example: Sequence[str] = ()) -> LlavaTemplate:
    return LlavaTemplate("single", system, ("Human", "Assistant"), "###", "###", tags, example)


def _mpt(system: str) -> LlavaTemplate:
    start, end = "<|im_start|>", "<|im_end|>"
    roles = (f"{start}user\n", f"{start}assistant\n")
    return LlavaTemplate("mpt", f"{start}system\n{system}", roles, end, end)


_IMAGE_TAGS = ("<Image>", "</Image>")
_PLAIN = LlavaTemplate("plain", roles=("", ""), sep="\n", end="\n")
_V0, _V1 = _v0(_HUMAN, example=_EXAMPLE), LlavaTemplate("two", _USER)
LLAVA_TEMPLATES = {
    **dict.fromkeys(("plain", "v0_plain"), _PLAIN),
    **dict.fromkeys(("v0", "default"), _V0),
    **dict.fromkeys(("v1", "vicuna_v1"), _V1),
    "llava_v0": _v0(_HUMAN),
    "llava_v1": LlavaTemplate("two", _HUMAN),
    "llava_llama_2": LlavaTemplate("llama_2", _VISION),
    "llama_2": LlavaTemplate("llama_2", _SAFE),
    "v0_mmtag": _v0(_TAGGED, _IMAGE_TAGS),
    "v1_mmtag": LlavaTemplate("two", _TAGGED, tags=_IMAGE_TAGS),
    "mpt": _mpt(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
    "chatml_direct": _mpt("Answer the questions."),
}
"""By the names of the published code."""


class LlavaConversation(Turns):
    """A conversation in one of the templates; `template` is its name.

    Several images that are shown one after the other belong to one message, one a line.
    """

    answer_start = ""

    def __init__(self, template: str) -> None:
        self.template = LLAVA_TEMPLATES[template]
        self.roles = self.template.roles if self.template.style != "plain" else ("user", "assistant")
        self.system = None
        self.messages: list[list[str | None]] = []
        self.offset = 0

    @property
    def answer_end(self) -> str:
        return self.template.end

    def add_image(self) -> None:
        """The user shows an image; the next one, and the question, join its message."""
        self.append_question(IMAGE_MESSAGE)

    def ask(self, text: str) -> None:
        """As in `Turns`; `<image>` is a placeholder, too."""
        if IMAGE_TOKEN in text:
            raise SampleError(f"a question must not hold {IMAGE_TOKEN}; show an image with add_image() before it")
        super().ask(text)

    def fill_answer(self, text: str) -> None:
        """As in `Turns`; the model's words must not open a place for an image."""
        super().fill_answer(text.replace(IMAGE_TOKEN, ""))

    def get_prompt(self) -> str:
        """The whole conversation as the LLM reads it; an open answer is where it goes on."""
        said = [(role == self.roles[1], text) for role, text in self.messages]
        template = self.template if self.system is None else replace(self.template, system=self.system)
        return template.prompt([*_example(self.template), *said])


def _example(template: LlavaTemplate) -> Iterator[tuple[bool, str]]:
    return zip((False, True), template.example, strict=False)


def single_turn(name: str) -> str:
    """A template as `model.prompt_template`: one instruction in the place of `{}`, then the answer."""
    template, mark = LLAVA_TEMPLATES[name], "\0"
    prompt = template.prompt([*_example(template), (False, mark), (True, None)])
    return prompt.replace("{", "{{").replace("}", "}}").replace(mark, "{}")


def as_llava(prompt: str, image: str) -> str:
    """`prompt` with `image`, one a line, in the places that the rest of this program marks."""
    for message, own in ((f"{IMAGE_MESSAGE} ", f"{image}\n"), (IMAGE_MESSAGE, image), (IMAGE_PLACEHOLDER, image)):
        prompt = prompt.replace(message, own)
    return prompt

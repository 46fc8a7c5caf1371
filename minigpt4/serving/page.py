"""The chat page: Gradio's ChatInterface over an engine.

    page = ChatPage(engine, Limits())      # page_gate.launch serves it

Gradio keeps each tab's conversation and does edit, undo, retry and stop; with a question it hands over all messages so
far, which become one request to the engine.
"""

import asyncio
import html
import json
import logging
from collections.abc import AsyncIterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from minigpt4.common.errors import MiniGPT4Error, RunError, SampleError
from minigpt4.common.schemas import ChatSettings
from minigpt4.conversation.chat import Picture, Request
from minigpt4.conversation.decoding import GREEDY, PUBLISHED_CHAT, Decoding
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER
from minigpt4.inference.attribution import answer_words, figures, grey, overlay
from minigpt4.inference.engine import Engine, EngineReply
from minigpt4.mini.files import TRUTH_FILE
from minigpt4.serving.uploads import Limits, read_image

log = logging.getLogger(__name__)

WORLD = Path("data/mini")
"""The mini world, where it was made."""
EXAMPLES = 4
TITLE = "MiniGPT-4"
HEAD = "# MiniGPT-4\nAsk about a picture. A language model answers, and may be wrong: look for yourself."
EMPTY = "Add one or more images and ask about them."
LOOK = "Click a word to see which patches of the image it depends on, by two methods, for the selected checkpoint."
CHOSEN = "looked up"
NO_ANSWER = "No answer"
"""Title of a message that tells an error."""
DELETE_AFTER = 24 * 3600
"""Seconds that an upload is kept."""
PROBLEMS = (MiniGPT4Error, TimeoutError)
"""Their texts are for the visitor."""

CSS = """
.gradio-container { max-width: 1000px !important; width: 100%; margin: auto }
#note { min-height: 1.6em; opacity: .75 }
#chat button[title=Share] { display: none }
#words .token { margin-right: .3em }
#maps figure { display: inline-block; margin: 0 1em 1em 0 }
"""


class _Interface(gr.ChatInterface):
    """Shows text as it was written, where the Chatbot takes tags for HTML, and images apart from it, for editing."""

    def _append_message_to_history(self, message: Any, history: list[Any], role: str = "user") -> list[Any]:
        appended = super()._append_message_to_history(message, history, role)[len(history) :]
        return [*history, *({**one, "content": part} for one in appended for part in _parts(one["content"]))]

    def _pop_last_user_message(self, history: list[Any]) -> tuple[list[Any], Any]:
        kept, message = super()._pop_last_user_message(history)
        return kept, {**message, "text": html.unescape(message["text"])}

    def _edit_message(self, history: list[Any], edit_data: gr.EditData) -> tuple[list[Any], list[Any], Any]:
        kept, shown, question = super()._edit_message(history, edit_data)
        return kept, shown, {"text": html.unescape(str(question)), "files": []}


class ChatPage:
    """The page over one engine; `blocks` is what Gradio shows."""

    def __init__(self, engine: Engine, limits: Limits, start: ChatSettings | None = None) -> None:
        self.engine, self.limits, start = engine, limits, start or ChatSettings()
        self.files, self.settings = None, {"css": CSS, "max_threads": engine.max_rows + 40}
        self.replies: dict[str, EngineReply] = {}
        """Answers in progress by tab."""
        self.picture = lru_cache(engine.max_rows * limits.images)(self._picture)
        names = engine.checkpoints
        checkpoint = gr.Dropdown(names, value=names[0], label="Checkpoint", visible=len(names) > 1, render=False)
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, DELETE_AFTER)) as self.blocks:
            gr.Markdown(f"{HEAD} {start.hint}")
            note = gr.Markdown(elem_id="note", render=False)
            chat = _Interface(
                self.answer,
                multimodal=True,
                chatbot=gr.Chatbot(
                    label="Conversation",
                    height=560,
                    placeholder=EMPTY,
                    editable="user",
                    buttons=["copy"],
                    render_markdown=False,  # what a model says is text
                    allow_file_downloads=False,
                    latex_delimiters=[],
                    group_consecutive_messages=False,  # or Gradio cannot edit a question that has an image
                    elem_id="chat",
                ),
                textbox=gr.MultimodalTextbox(
                    file_types=["image"], file_count="multiple", placeholder="Ask", stop_btn=True, elem_id="question"
                ),
                additional_inputs=[checkpoint, *sliders(limits, engine.model.context_length, start.temperature)],
                additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
                additional_outputs=[note],
                editable=True,
                examples=[[{"text": start.question, "files": [str(path)]}, *[None] * 6] for path in example_images()],
                run_examples_on_click=False,
                validator=self.check,
                concurrency_limit=engine.max_rows,
                api_visibility="private",
            )
            note.render()
            with gr.Accordion("Where did it look?", open=False, elem_id="look") as fold:
                gr.Markdown(LOOK)
                words = gr.HighlightedText(label="The last answer", interactive=False, elem_id="words")
                maps = gr.Markdown(latex_delimiters=[], elem_id="maps")  # gr.HTML would need unsafe-eval
            shown = {"outputs": [words, maps], "api_visibility": "private", "show_progress": "minimal"}
            fold.expand(self.words, [chat.chatbot], **shown)
            words.select(self.look, [chat.chatbot, checkpoint], **shown)
            self.blocks.unload(self._leave)
        self.blocks.queue(max_size=limits.waiting, api_open=False)

    def check(self, message: dict[str, Any]) -> dict[str, Any]:
        """Whether a question can be asked; what is wrong with it is shown, and it stays in the box."""
        question = message["text"]
        try:
            if not question.strip():
                raise SampleError("write a question")
            if len(question) > self.limits.question_chars:
                raise SampleError(f"the question has more than {self.limits.question_chars:,} characters")
            if IMAGE_PLACEHOLDER in question:
                raise SampleError(f"a question must not hold {IMAGE_PLACEHOLDER}, which stands for an image")
            for file in message["files"]:
                self.picture(_path(file))
        except PROBLEMS as error:
            return gr.validate(False, html.escape(str(error)))
        return gr.validate(True, "")

    async def answer(
        self,
        message: dict[str, Any],
        history: list[dict[str, Any]],
        checkpoint: str,
        beams: float,
        temperature: float,
        top_p: float,
        tokens: float,
        repetition_penalty: float,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, str]]:
        """The answer as far as it has come, and the note about it; an error is a message of its own."""
        said, reply = "", None
        try:
            how = decoding(self.limits, beams, temperature, top_p, tokens, repetition_penalty)
            asked = await asyncio.to_thread(self.request, message, history, checkpoint, how)
            reply = self.replies[request.session_hash] = self.engine.submit(asked)
            async for piece in reply:
                said += piece
                yield said, self._note(reply)
            if not said:
                raise SampleError("the model said nothing")
            yield said, self._note(reply)
        except Exception as error:
            if not isinstance(error, PROBLEMS):
                log.exception("An answer failed")
                error = RunError("something went wrong on the server; please try again")
            if said:
                gr.Warning(html.escape(str(error)))
            else:
                yield {"role": "assistant", "content": str(error), "metadata": {"title": NO_ANSWER}}, ""
        finally:
            self.replies.pop(request.session_hash, None)
            if reply is not None:
                reply.close()

    def words(self, history: Sequence[dict[str, Any]]) -> tuple[list[tuple[str, None]], str]:
        """The last answer in words to choose from, and no map yet."""
        _, answer = _last_answer(history)
        return [(word.text, None) for word in answer_words(self.engine.model, answer)], ""

    def look(
        self, history: Sequence[dict[str, Any]], checkpoint: str | None, chosen: gr.SelectData
    ) -> tuple[list[tuple[str, str | None]], str]:
        """The words with the chosen one marked, and its maps over each image as HTML; nothing is kept."""
        words: list[str] = []
        try:
            place, answer = _last_answer(history)
            words = [word.text for word in answer_words(self.engine.model, answer)]
            if chosen.index not in range(len(words)) or chosen.value[0] != words[chosen.index]:
                raise SampleError("there is another answer now; choose again")
            asked = self.request(None, history[:place], checkpoint, GREEDY)
            if not asked.pictures:
                raise SampleError("no image was shown before this answer")
            maps = self.engine.maps(asked, answer, chosen.index).result(self.limits.seconds)
        except PROBLEMS as error:
            return [(word, None) for word in words], html.escape(str(error))
        shown = [
            (method, overlay(grey(picture.pixels_3SS), maps_nhw[index]))
            for index, picture in enumerate(asked.pictures)
            for method, maps_nhw in maps.items()
        ]
        marked = [(word, CHOSEN if number == chosen.index else None) for number, word in enumerate(words)]
        return marked, figures(words[chosen.index], shown)

    def request(
        self, message: dict[str, Any] | None, history: Sequence[dict[str, Any]], checkpoint: str | None, how: Decoding
    ) -> Request:
        """All messages so far, without questions that had no answer, whose images stay; `history` is the Chatbot's.

        `message`: None where the history ends in the question.
        """
        conversation, pictures, is_open = self.engine.new_conversation(), [], False
        if len(history) >= self.limits.turns:
            raise SampleError("this conversation has reached its limit; start over")
        said = [(one["role"], one.get("metadata") or {}, part) for one in history for part in one["content"]]
        if message is not None:
            said += [("user", {}, {"file": file}) for file in message["files"]]
            said += [("user", {}, {"text": html.escape(message["text"], quote=False)})]
        for role, metadata, part in said:
            text = html.unescape(part.get("text") or "").strip()
            if role == "assistant":
                if text and metadata.get("title") != NO_ANSWER:
                    conversation.open_answer()
                    conversation.fill_answer(text.replace(IMAGE_PLACEHOLDER, ""))
                    is_open = False
                continue
            if is_open:
                conversation.take_back()
            is_open = bool(text)
            if text:
                conversation.ask(text)
            elif "file" in part:
                conversation.add_image()
                pictures.append(self.picture(_path(part["file"])))
        if len(pictures) > self.limits.images:
            raise SampleError(f"a conversation takes at most {self.limits.images} images; start over")
        if not is_open:
            raise SampleError("write a question")
        conversation.open_answer()
        return Request(conversation, pictures, how, checkpoint=checkpoint, timeout=self.limits.seconds)

    def _picture(self, path: str) -> Picture:
        return self.engine.preprocess(read_image(Path(path), self.limits))

    def _leave(self, request: gr.Request) -> None:
        """The tab was closed: nobody reads the answer in progress."""
        if reply := self.replies.pop(request.session_hash, None):
            reply.close()

    def _note(self, reply: EngineReply) -> str:
        """What there is to know about an answer."""
        parts = [f"{reply.prompt_tokens:,} tokens read, {reply.completion_tokens:,} written"]
        if reply.dropped_turns:
            context = self.engine.model.context_length
            parts.append(f"oldest turns left out: {reply.dropped_turns} (this LLM reads {context:,} positions)")
        if reply.finish_reason == "length":
            parts.append("ended at the limit of tokens")
        return " · ".join(parts)


def _last_answer(history: Sequence[dict[str, Any]]) -> tuple[int, str]:
    """The number of its message, and what it says; nothing where there is none."""
    for number, one in reversed(list(enumerate(history))):
        if one["role"] == "assistant" and (one.get("metadata") or {}).get("title") != NO_ANSWER:
            return number, html.unescape("".join(part.get("text") or "" for part in one["content"])).strip()
    return 0, ""


def _parts(content: Any) -> list[Any]:
    parts = content if isinstance(content, list) else [content]
    return [html.escape(part, quote=False) if isinstance(part, str) else part for part in parts]


def _path(file: Any) -> str:
    """Of an image as Gradio has it, a path or fields."""
    return file["path"] if isinstance(file, dict) else file


def sliders(limits: Limits, context: int, temperature: float = PUBLISHED_CHAT.temperature) -> list[gr.Slider]:
    """The sliders, in the order of `decoding`'s arguments; they start as the published demo does.

    `context`: positions that the LLM reads; an answer may take half of them.
    """
    tokens = max(1, min(limits.new_tokens, context // 2))
    start = PUBLISHED_CHAT
    rows = [
        ("Beams", 1, limits.beams, 1, start.num_beams, "More than one: the answer appears all at once."),
        ("Temperature", 0.0, 2.0, 0.1, temperature, "0: the most likely answer, always the same."),
        ("Top-p", 0.05, 1.0, 0.05, start.top_p, "Lower: only likelier words are drawn."),
        ("Maximum of tokens", 1, tokens, 1, min(start.max_new_tokens, tokens), "The longest answer."),
        ("Repetition penalty", 1.0, 2.0, 0.05, start.repetition_penalty, "Above 1: words are repeated less."),
    ]
    return [
        gr.Slider(least, most, value, step=step, label=label, info=info, buttons=[], render=False)
        for label, least, most, step, value, info in rows
    ]


def decoding(
    limits: Limits, beams: float, temperature: float, top_p: float, tokens: float, repetition_penalty: float
) -> Decoding:
    """How to answer, greedily at temperature 0; SampleError for what no slider allows, but a request can hold."""
    if not (1 <= beams <= limits.beams and 1 <= tokens <= limits.new_tokens):
        raise SampleError(f"at most {limits.beams} beams and {limits.new_tokens} tokens")
    search = {"num_beams": int(beams), "max_new_tokens": int(tokens)}
    return Decoding.at(temperature, **search, top_p=top_p, repetition_penalty=repetition_penalty)


def example_images(world: Path = WORLD) -> list[Path]:
    """Test scenes of several things, where the mini world was made."""
    try:
        scenes = json.loads((world / TRUTH_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    images = world / "flickr30k" / "flickr30k-images"
    files = [images / f"{image_id}.jpg" for image_id, scene in scenes.items() if len(scene["groups"]) > 1]
    return [file for file in files if file.is_file()][:EXAMPLES]

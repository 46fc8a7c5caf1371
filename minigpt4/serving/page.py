"""The chat page, on Gradio: what it looks like, and which button does what.

    page = ChatPage(engine, Limits())      # page_gate.launch serves it

A question goes through two steps: the first checks it and shows it at once, the second waits in Gradio's queue, as long
as others are answered, and writes the answer.
"""

import html
import json
import logging
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw

from minigpt4.common.errors import MiniGPT4Error, RunError, SampleError
from minigpt4.conversation.decoding import PUBLISHED_CHAT, Decoding
from minigpt4.inference import Engine
from minigpt4.mini.files import TRUTH_FILE
from minigpt4.serving.page_session import Message, PageSession, Visitors
from minigpt4.serving.uploads import Limits, Uploads, read_image

log = logging.getLogger(__name__)

WORLD = Path("data/mini")
"""The mini world, where it was made."""
EXAMPLES = 4
SIDE = 448
TITLE = "MiniGPT-4"
HEAD = "# MiniGPT-4\nAsk about a picture. A language model answers, and may be wrong: look for yourself."
EMPTY = "Give an image, ask about it, and ask on.\n\nMore images may follow later in the conversation."
FIRST_QUESTION, PLACEHOLDER = "Describe this image in detail.", "What is unusual about this image?"
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
READING: dict[str, Any] = {"concurrency_id": "reading", "concurrency_limit": 4}
"""Images that are decoded at once, for each may take hundreds of megabytes."""
TAG = re.compile(r"<(?=[A-Za-z/!])|!(?=\[)")
"""What Markdown takes for the beginning of a tag or of an image."""
LITERAL = {"<": "&lt;", "!": "&excl;"}
CODE = re.compile(r"(```.*?(?:```|\Z))", re.DOTALL)
PROBLEMS = (MiniGPT4Error, TimeoutError)
"""Their texts are for the visitor."""


class ChatPage:
    """The page over one engine; `blocks` is what Gradio shows."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        files = Path(gr.utils.get_upload_folder())
        files.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="page-", dir=files))  # Gradio leaves files where they are there
        self.uploads = Uploads(self.folder, limits)
        self.visitors = Visitors(lambda: PageSession(engine, limits, self.folder / secrets.token_hex(16)))
        with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as self.blocks:
            self._lay_out()
            self._wire()
        self.blocks.queue(max_size=limits.waiting, api_open=False)

    def close(self) -> None:
        """Stop serving, and forget the images that visitors sent."""
        self.blocks.close(verbose=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    # What it looks like

    def _lay_out(self) -> None:
        gr.Markdown(HEAD)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self._lay_out_inputs()
            with gr.Column(scale=3, min_width=420):
                self._lay_out_conversation()

    def _lay_out_inputs(self) -> None:
        self.image = gr.Image(
            label="Image for the next question",
            sources=["upload", "clipboard", "webcam"],
            type="filepath",
            height=240,
            buttons=[],
            elem_id="image",
        )
        for path in examples(self.folder):
            own = self.folder / path.name
            if own != path:
                shutil.copyfile(path, own)
            self.uploads.examples.add(str(own))
        gr.Examples([[path] for path in sorted(self.uploads.examples)], [self.image], label="Examples")
        names = self.engine.checkpoints
        self.checkpoint = gr.Dropdown(names, value=names[0], label="Checkpoint", visible=len(names) > 1)
        self.sliders = sliders(self.limits, self.engine.context_length)
        with gr.Group():
            for slider in self.sliders[:-1]:
                slider.render()
        with gr.Accordion("More", open=False):
            self.sliders[-1].render()

    def _lay_out_conversation(self) -> None:
        self.chat = gr.Chatbot(
            label="Conversation",
            height=600,
            placeholder=EMPTY,
            editable="user",
            buttons=["copy"],
            latex_delimiters=[],
            allow_tags=False,
            feedback_options=None,
            group_consecutive_messages=False,
            allow_file_downloads=False,
            elem_id="chat",
        )
        self.note = gr.Markdown(elem_id="note")
        self.question = gr.Textbox(FIRST_QUESTION, label="Question", placeholder=PLACEHOLDER, lines=1, max_lines=6)
        with gr.Row():
            self.ask = gr.Button("Ask", variant="primary")
            self.stop = gr.Button("Stop", variant="stop", interactive=False)
            self.again = gr.Button("Regenerate")
            self.restart = gr.Button("Restart")

    # Which button does what

    def _wire(self) -> None:
        view = [self.chat, self.note, self.question, self.image, self.stop]
        answers = [
            self._asks([self.ask.click, self.question.submit], self._put, [self.question, self.image], view),
            self._asks([self.again.click, self.chat.retry], self._put_again, [], view),
            self._asks([self.chat.edit], self.put_edited, [], view),
        ]
        gr.on([self.stop.click], self._stop, None, view, queue=False, **HIDDEN)
        # Apart from what stops it, for cancelling may take as long as the answer that it is to end.
        gr.on([self.stop.click, self.restart.click, self.chat.clear], None, cancels=answers, queue=False)
        gr.on([self.restart.click, self.chat.clear], self._restart, None, view, queue=False, **HIDDEN)
        self.chat.undo(self._take_back, None, view, queue=False, **HIDDEN)
        self.image.input(self._check, self.image, self.image, preprocess=False, **READING, **HIDDEN)
        self.blocks.unload(self._leave)

    def _asks(self, triggers: list[Any], put: Callable, inputs: list[Any], view: list[Any]) -> Any:
        """Put a question, then wait in the queue for its answer."""
        return gr.on(triggers, put, inputs, view, preprocess=False, **READING, **HIDDEN).success(
            self._answer,
            [self.checkpoint, *self.sliders],
            view,
            concurrency_id="answers",
            concurrency_limit=self.engine.max_rows,
            show_progress="minimal",
            show_progress_on=self.chat,
            api_visibility="private",
        )

    def _put(self, question: str | None, upload: dict[str, Any] | None, request: gr.Request) -> list[Any]:
        with _problems_shown():
            session = self._session(request)
            session.put(question or "", self._path(upload, request))
        return self._view(session, question="", image=None)

    def _put_again(self, request: gr.Request) -> list[Any]:
        with _problems_shown():
            session = self._session(request)
            session.put_again()
        return self._view(session)

    def put_edited(self, edit: gr.EditData, request: gr.Request) -> list[Any]:
        with _problems_shown():
            session = self._session(request)
            messages = session.messages
            number = messages[edit.index].turn if 0 <= edit.index < len(messages) else -1
            session.put_edited(number, _written(str(edit.value)))
        return self._view(session)

    def _answer(self, request: gr.Request, checkpoint: str, *values: float) -> Iterator[list[Any]]:
        with _problems_shown():
            session = self._session(request)
        try:
            for _ in session.answer(decoding(self.limits, *values), checkpoint):
                yield self._view(session)
        except Exception as error:
            if not isinstance(error, PROBLEMS):
                log.exception("An answer failed")
                error = RunError("something went wrong on this side, and was noted; please try again")
            gr.Warning(html.escape(str(error)))
            session.stop()  # if it had not even begun
            yield self._view_with_draft(session)
        else:
            yield self._view(session)

    def _stop(self, request: gr.Request) -> list[Any]:
        with _problems_shown():
            session = self._session(request)
        session.stop()
        return self._view_with_draft(session)

    def _take_back(self, request: gr.Request) -> list[Any]:
        with _problems_shown():
            session = self._session(request)
            session.take_back()
        return self._view_with_draft(session)

    def _restart(self, request: gr.Request) -> list[Any]:
        with _problems_shown():
            session = self._session(request)
            session.restart()
        self.uploads.leave(_visitor(request), request.session_hash)
        return self._view(session, question="", image=None)

    def _check(self, upload: dict[str, Any] | None, request: gr.Request) -> Any:
        """Say at once what is wrong with an image, and take it out of the box."""
        path = None
        try:
            path = self._path(upload, request)
            if path is not None:
                read_image(path, self.limits)
        except PROBLEMS as error:
            if path is not None:
                self.uploads.forget(path)
            gr.Warning(html.escape(str(error)))
            return None
        return gr.skip()

    def _leave(self, request: gr.Request) -> None:
        self.visitors.leave(request.session_hash)
        self.uploads.leave(_visitor(request), request.session_hash)

    def _path(self, upload: dict[str, Any] | None, request: gr.Request) -> Path | None:
        """The file of an image box; SampleError if it is not this visitor's.

        It comes as it was sent, for Gradio's own reading decodes before the size is known.
        """
        if not upload or not upload.get("path"):
            return None
        return self.uploads.take(upload["path"], _visitor(request), request.session_hash)

    def _session(self, request: gr.Request) -> PageSession:
        return self.visitors.session(request.session_hash)

    def _view(self, session: PageSession, **inputs: Any) -> list[Any]:
        """What the page shows: conversation, note, question, image, stop button; inputs that are not given stay."""
        messages = [_shown(message) for message in session.messages]
        question, image = inputs.get("question", gr.skip()), inputs.get("image", gr.skip())
        return [messages, session.note, question, image, gr.update(interactive=session.is_busy)]

    def _view_with_draft(self, session: PageSession) -> list[Any]:
        """The same, and what was not answered goes back into the inputs."""
        draft = session.take_draft()
        return (
            self._view(session) if draft is None else self._view(session, question=draft.question, image=draft.upload)
        )


# From the sliders to a decoding


def sliders(limits: Limits, context: int) -> list[gr.Slider]:
    """The sliders, in the order of `decoding`'s arguments and not rendered; they start as the published demo does.

    `context`: positions that the LLM reads; an answer may take half of them.
    """
    tokens = max(1, min(limits.new_tokens, context // 2))
    start = PUBLISHED_CHAT
    rows = [
        ("Beams", 1, limits.beams, 1, start.num_beams, "More than one: the answer appears at once, at its end."),
        ("Temperature", 0.0, 2.0, 0.1, start.temperature, "0: the most likely answer, always the same."),
        ("Top-p", 0.05, 1.0, 0.05, start.top_p, "Less: only the likelier words are chosen from."),
        ("Maximum of tokens", 1, tokens, 1, min(start.max_new_tokens, tokens), "The longest answer."),
        ("Repetition penalty", 1.0, 2.0, 0.05, start.repetition_penalty, "Above 1: words are not said so often."),
    ]
    return [
        gr.Slider(least, most, value, step=step, label=label, info=info, buttons=[], render=False)
        for label, least, most, step, value, info in rows
    ]


def decoding(
    limits: Limits, beams: float, temperature: float, top_p: float, tokens: float, repetition_penalty: float
) -> Decoding:
    """How to answer; a temperature of 0 is the most likely answer.

    Raises:
        SampleError: a value is out of bounds, which a page's sliders do not allow but a request can hold.
    """
    if not (1 <= beams <= limits.beams and 1 <= tokens <= limits.new_tokens):
        raise SampleError(f"at most {limits.beams} beams and {limits.new_tokens} tokens")
    samples = temperature > 0
    return Decoding(
        num_beams=int(beams),
        max_new_tokens=int(tokens),
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        temperature=temperature if samples else 1.0,
        do_sample=samples,
    )


# What is shown: text as it was written, and errors


def _shown(message: Message) -> dict[str, Any]:
    if isinstance(message.content, Path):
        content: Any = {"path": str(message.content), "alt_text": "image"}
    else:
        content = _literal(message.content)
    return {"role": "user" if message.is_user else "assistant", "content": content}


def _visitor(request: gr.Request) -> str:
    """Who asks, as the gate before Gradio found."""
    return request.request.state.visitor


def _literal(text: str) -> str:
    """Markdown that shows tags and images as they were written; in a block of code it does so anyway."""
    return "".join(
        part if part.startswith("```") else TAG.sub(lambda found: LITERAL[found[0]], part) for part in CODE.split(text)
    )


def _written(text: str) -> str:
    """What `_literal` was made from."""
    for sign, entity in LITERAL.items():
        text = text.replace(entity, sign)
    return text


@contextmanager
def _problems_shown() -> Iterator[None]:
    """Inside, an error for the visitor becomes one that the page shows."""
    try:
        yield
    except PROBLEMS as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


# Images for visitors who have none at hand: test scenes of the mini world where it was made, else drawings


def examples(folder: Path, world: Path = WORLD) -> list[Path]:
    """The images' files, scenes of several things that no model was trained on; drawings are put into `folder`."""
    try:
        scenes = json.loads((world / TRUTH_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        scenes = {}
    images = world / "flickr30k" / "flickr30k-images"
    files = [images / f"{image_id}.jpg" for image_id, scene in scenes.items() if len(scene["groups"]) > 1]
    return [file for file in files if file.is_file()][:EXAMPLES] or _drawings(folder)


def _drawings(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, strokes in DRAWINGS.items():
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        pen = ImageDraw.Draw(picture)
        for method, *arguments in strokes:
            getattr(pen, method)(*arguments)
        picture.save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in DRAWINGS]


DRAWINGS = {
    "house": [
        ("rectangle", (0, 0, 448, 448), "#bfe3ff"),
        ("rectangle", (0, 320, 448, 448), "#6fbf5f"),
        ("ellipse", (330, 30, 410, 110), "#ffd23f"),
        ("rectangle", (90, 200, 270, 350), "#f2e3c6", "#6b4f3a", 4),
        ("polygon", [(70, 205), (180, 110), (290, 205)], "#b5402f"),
        ("rectangle", (160, 265, 205, 350), "#6b4f3a"),
        ("rectangle", (110, 225, 145, 260), "#8ecdf0", "#6b4f3a", 4),
        ("rectangle", (345, 250, 365, 350), "#7a5230"),
        ("ellipse", (305, 150, 405, 270), "#2f8f46"),
    ],
    "traffic_light": [
        ("rectangle", (0, 0, 448, 448), "#d9dde2"),
        ("rectangle", (0, 360, 448, 448), "#6e7278"),
        ("rectangle", (212, 300, 236, 400), "#333a40"),
        ("rounded_rectangle", (164, 40, 284, 310), 24, "#333a40"),
        ("ellipse", (188, 58, 260, 130), "#e5383b"),
        ("ellipse", (188, 142, 260, 214), "#5c5434"),
        ("ellipse", (188, 226, 260, 298), "#33503c"),
    ],
    "chart": [
        ("rectangle", (80, 300, 135, 390), "#4c78a8"),
        ("rectangle", (165, 230, 220, 390), "#f58518"),
        ("rectangle", (250, 160, 305, 390), "#54a24b"),
        ("rectangle", (335, 80, 390, 390), "#e45756"),
        ("line", [(60, 50), (60, 390), (420, 390)], "#222222", 5),
    ],
    "boat": [
        ("rectangle", (0, 0, 448, 448), "#ffcf99"),
        ("ellipse", (60, 150, 160, 250), "#ff7b54"),
        ("rectangle", (0, 290, 448, 448), "#2a6f97"),
        ("polygon", [(150, 290), (350, 290), (310, 345), (190, 345)], "#7a4a2b"),
        ("line", [(245, 290), (245, 90)], "#4a2f1b", 8),
        ("polygon", [(255, 95), (255, 270), (345, 270)], "#fdfcf7"),
    ],
}
"""Strokes of `ImageDraw`, each with its arguments."""

"""The page of a review: image at left, text at right, what refining changed below, and a key for each verdict."""

import difflib
import hashlib
import html
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from PIL import Image

from minigpt4.common.errors import MiniGPT4Error, SampleError, errors_as
from minigpt4.curation.records import text_of
from minigpt4.curation.review import EDIT, REASONS, REJECT, Review, near_rules
from minigpt4.serving.page_gate import FILE
from minigpt4.serving.uploads import FORMATS, Limits

HEAD = Path(__file__).with_name("review_head.html")
"""Style, and the keys."""
NAME_CHARS = 40
BUTTONS = {"accept": "Accept (a)", "reject": "Reject (r)", "skip": "Skip (s)", "back": "Back (z)"}
KEYS = "`a` accept · `e` edit, `Ctrl-Enter` saves · `1` to `6` reasons, `r` reject · `s` skip · `z` back"


class ReviewPage:
    """The page over a review, for `page_gate.launch`; images are those of the records, relative to `folder`.

    A tab says which record it shows, so that a key that is hit twice judges one record, not two.
    """

    def __init__(self, review: Review, folder: Path) -> None:
        self.review, self._folder = review, folder
        self.limits = Limits(images=1, image_bytes=1)  # nobody uploads
        self.files: set[str] = set()
        """Images that may be read: those that were shown, and those that are loaded ahead."""
        folders = {str(self._file(key).parent) for key in review.records}
        self.settings = {"head_paths": HEAD, "allowed_paths": sorted(folders)}
        with gr.Blocks(title="Review", analytics_enabled=False) as self.blocks:
            reviewer, shown = gr.Textbox(visible=False), gr.Textbox(visible=False)
            with gr.Column() as start:
                name = gr.Textbox(label="Your name", max_length=NAME_CHARS, elem_id="name")
                begin = gr.Button("Start", variant="primary", elem_id="begin")
            with gr.Column(visible=False) as work:
                progress = gr.Markdown(elem_id="progress", latex_delimiters=[])
                with gr.Row():
                    picture = gr.Markdown(elem_id="picture", latex_delimiters=[])
                    with gr.Column():
                        text = gr.Textbox(label="Text", lines=10, max_lines=20, elem_id="text")
                        choices = [(f"{number} {one}", one) for number, one in enumerate(REASONS, 1)]
                        why = gr.CheckboxGroup(choices, label="Reasons to reject", elem_id="reasons")
                        with gr.Row():
                            buttons = [gr.Button(label, min_width=80, elem_id=one) for one, label in BUTTONS.items()]
                        gr.Markdown(KEYS)
                changes = gr.Markdown(elem_id="changes", latex_delimiters=[])
                ahead = gr.Markdown(elem_id="ahead", latex_delimiters=[])
            self._outputs = [reviewer, shown, start, work, progress, picture, text, why, changes, ahead]
            how = {"outputs": self._outputs, "api_visibility": "private", "show_progress": "hidden"}
            # A text that is being written, and of which record: it outlives a reload.
            draft = gr.BrowserState(["", ""], storage_key="review", secret="draft")
            keep = {"outputs": draft, "api_visibility": "private", "show_progress": "hidden"}
            text.input(lambda *written: written, [shown, text], **keep, trigger_mode="always_last")
            self.blocks.load(self.open, draft, **how)
            gr.on([begin.click, name.submit], self.enter, [name], **how)
            how["trigger_mode"] = "multiple"  # no key is lost that is hit while the page is busy
            for button in buttons:
                button.click(partial(self.act, button.elem_id), [reviewer, shown, text, why], **how)
        self.blocks.queue(api_open=False)

    def open(self, draft: Sequence[str], request: gr.Request) -> list[Any]:
        """A tab was opened, perhaps again: then its address has the name, and `draft` what was written of a record."""
        name = request.query_params.get("reviewer")
        return self.enter(name, draft) if name else [gr.skip() for _ in self._outputs]

    def enter(self, name: str, draft: Sequence[str] = ("", "")) -> list[Any]:
        """Begin, or go on where this person was."""
        name, known = name.strip(), self.review.reviewers
        if not name.isprintable() or not 0 < len(name) <= NAME_CHARS:
            return self._refuse(f"write a name of at most {NAME_CHARS} characters")
        if known and name not in known:
            return self._refuse(f"{name} is not among the reviewers: {', '.join(known)}")
        return self._view(name, draft=draft)

    def act(self, button: str, reviewer: str, key: str, text: str, why: Sequence[str]) -> list[Any]:
        """What a button does to the record that the tab shows; then the next one, or the one before."""
        try:
            if button == "accept":
                self.review.judge(reviewer, key, EDIT, text)
            elif button == "reject":
                self.review.judge(reviewer, key, REJECT, reasons=why)
            elif button == "skip":
                self.review.skip(reviewer, key)
        except MiniGPT4Error as error:
            return self._refuse(str(error))
        return self._view(reviewer, self.review.back(reviewer, key) if button == "back" else None)

    def _refuse(self, reason: str) -> list[Any]:
        gr.Warning(html.escape(reason))
        return [gr.skip() for _ in self._outputs]

    def _view(self, reviewer: str, key: str | None = None, draft: Sequence[str] = ("", "")) -> list[Any]:
        """Of `_outputs`."""
        keys = self.review.show(reviewer, key)
        progress = html.escape(f"{reviewer} · {self.review.progress(reviewer)}")
        opened = gr.Column(visible=False), gr.Column(visible=True)
        if not keys:
            return [reviewer, "", *opened, _block(progress), _block(f"All is done. {self._good()}"), "", [], "", ""]
        record, said = self.review.records[keys[0]], self.review.verdicts.latest.get(keys[0], {}).get(reviewer, {})
        if said:
            progress += f" · your verdict was: {said['verdict']}"
        rules = html.escape("; ".join(near_rules(record)) or "none")
        changes = _block(difference(record.get("text") or text_of(record), text_of(record)))
        changes += _block(f"Rules that it failed or nearly failed: {rules}")
        picture, *ahead = [self._picture(one) for one in keys]
        text = draft[1] if draft[0] == keys[0] else said.get("text") or text_of(record)
        why = said.get("reasons") or []
        return [reviewer, keys[0], *opened, _block(progress), picture, text, why, changes, "".join(ahead)]

    def _good(self) -> str:
        """The share of good texts, in words."""
        found = self.review.summary()
        if not (good := found["good"]):
            return ""
        (low, high), reviewed = good["interval"], found["reviewed"]
        return f"Of {reviewed} texts {good['share']:.0%} are good as they are (95% interval {low:.0%} to {high:.0%})."

    def _picture(self, key: str) -> str:
        """HTML of an image, which may be read from now on, or of what is wrong with it."""
        file, sha256 = self._file(key), self.review.records[key].get("sha256")
        try:
            with errors_as(SampleError, f"{file}: cannot be shown"):
                source, now = FILE + quote(str(file)), hashlib.sha256(file.read_bytes()).hexdigest()
                with Image.open(file) as image:
                    if image.format not in FORMATS:
                        raise SampleError(f"{file}: this image format is not shown")
            if sha256 and now != sha256:
                raise SampleError(f"{file}: has changed since it was described")
        except SampleError as error:
            return _block(html.escape(str(error)))
        self.files.add(str(file))
        return _block(f'<img src="{source}" alt="{html.escape(key)}">')

    def _file(self, key: str) -> Path:
        return (self._folder / self.review.records[key]["image"]).resolve()


def difference(before: str, after: str) -> str:
    """HTML of two texts, word by word: `<del>` stands in the first alone, `<ins>` in the second."""
    old, new, parts = before.split(), after.split(), []
    for kind, start, stop, new_start, new_stop in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        gone, come = (html.escape(" ".join(words)) for words in (old[start:stop], new[new_start:new_stop]))
        if kind == "equal":
            parts.append(gone)
        else:
            parts += [f"<{mark}>{words}</{mark}>" for mark, words in (("del", gone), ("ins", come)) if words]
    return " ".join(parts)


def _block(content: str) -> str:
    """HTML for Markdown, which means nothing inside it: there is no empty line."""
    return f"<div>{' '.join(content.split())}</div>\n"

"""One model, many conversations: waiting requests join the running batch, answers leave it when they end.

engine = Engine(model, processor)
print(Chat(engine).ask("Hello?"))          # works while it is read
engine.start()                             # or in a thread of its own, for many readers at once
"""

import hashlib
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minigpt4.common.errors import ConfigError, MiniGPT4Error, RunError, SampleError
from minigpt4.conversation.chat import Picture, Request
from minigpt4.conversation.decoding import TextStream
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER, Turns, conversation_for
from minigpt4.models.batch_decoder import BatchDecoder, GenerationState
from minigpt4.models.generation import beam_search, check_stop, end_tokens, first_token
from minigpt4.processors import process_image
from minigpt4.processors.base_processor import BaseProcessor

log = logging.getLogger(__name__)


class EngineReply:
    """An answer between the thread that makes it and its reader: pieces to iterate over, counts to look at in between.

    Args:
        request: what is answered.
        drive: makes the engine work for a reader that waits; None where a thread of its own does.
        notify: called, in the engine's thread, whenever there is something new to read.
    """

    def __init__(
        self, request: Request, drive: Callable[[], None] | None = None, notify: Callable[[], None] | None = None
    ) -> None:
        self.request = request
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.dropped_turns = 0
        self.finish_reason: str | None = None
        self.deadline = None if request.timeout is None else time.monotonic() + request.timeout
        self.stop = [*filter(None, [request.conversation.answer_end]), *request.stop]
        self._stream = TextStream(self.stop, request.conversation.answer_start)
        self._drive, self._notify = drive, notify
        self._news: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
        self._is_over = threading.Event()

    # For the reader

    def __iter__(self) -> Iterator[str]:
        """The pieces; an error of the answer is raised where it happened."""
        while True:
            while self._drive is not None and self._news.empty():
                self._drive()
            news = self._news.get()
            if news is None:
                return
            if isinstance(news, Exception):
                raise news
            yield news

    def waiting_news(self) -> list[str | Exception | None]:
        """What can be read without waiting: pieces, then None or an error at the end; for asynchronous readers."""
        news = []
        while not self._news.empty():
            news.append(self._news.get())
        return news

    def close(self) -> None:
        """No further words are wanted; the engine notices before its next token."""
        self._end("cancelled")

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self._is_over.is_set()

    # For the engine

    def grow(self, text: str, tokens: int) -> None:
        """The answer's text so far, and how many tokens it has."""
        self.completion_tokens = tokens
        self._put(self._stream.feed(text))

    def finish(self, text: str, tokens: int, ended: bool) -> None:
        """The answer is whole: ended by the model, or by the token limit."""
        self.completion_tokens = tokens
        self._put(self._stream.finish(text))
        self._end("stop" if ended else "length")

    def fail(self, error: Exception) -> None:
        """There will be no answer, or no more of it."""
        self._end(None, error)

    def _end(self, reason: str | None, error: Exception | None = None) -> None:
        if not self._is_over.is_set():
            self.finish_reason = reason
            self._is_over.set()
            self._tell(error)

    def _put(self, piece: str) -> None:
        if piece and not self._is_over.is_set():
            self._tell(piece)

    def _tell(self, news: str | Exception | None) -> None:
        self._news.put(news)
        if self._notify is not None:
            self._notify()


def look(image: Image.Image, processor: BaseProcessor) -> Picture:
    """The image as a model reads it; SampleError if its pixels cannot be read."""
    pixels_3SS = process_image(processor, image)
    return Picture(hashlib.sha256(pixels_3SS.numpy().tobytes()).hexdigest()[:16], pixels_3SS)


class CheckpointSwitch:
    """One model, several checkpoints: swaps the trained weights, and remembers those that were given a name.

    Args:
        model: a `MiniGPT4` with the trained weights that it starts from.
        start: their name.
    """

    def __init__(self, model: Any, start: str = "start") -> None:
        self.model, self._start = model, start
        self._kept = {start: self._copy()}
        self._current: str | None = start

    @property
    def names(self) -> list[str]:
        """The checkpoints that are remembered, the start first."""
        return list(self._kept)

    def name(self, wanted: str | None) -> str:
        """A checkpoint's name, the start's for None; ConfigError if there is no such checkpoint."""
        if wanted is None:
            return self._start
        if wanted not in self._kept:
            raise ConfigError(f"there is no checkpoint '{wanted}'; there are: {', '.join(self.names)}")
        return wanted

    def load(self, checkpoint: str | Path) -> None:
        """Take the trained weights of a file; WeightsError, and the weights as before, if they do not fit.

        A weight that the file may leave out is that of the start, never that of the checkpoint before.
        """
        before = self._copy()
        try:
            self._restore(self._kept[self._start])
            self.model.load_checkpoint(checkpoint)
        except BaseException:
            self._restore(before)
            raise
        self._current = None

    def keep(self, name: str) -> None:
        """Remember under this name what the model holds now."""
        self._kept[name] = self._copy()
        self._current = name

    def use(self, name: str) -> None:
        """Go back to weights that are remembered."""
        if name != self._current:
            self._restore(self._kept[name])
            self._current = name

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self.model.trainable_parameters().items()}

    @torch.no_grad()
    def _restore(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.trainable_parameters().items():
            parameter.copy_(weights[name])


class PictureEncoder:
    """Image tokens, kept for the images that were asked about last.

    Shapes: Q image tokens, V channels before the projection, D channels of the LLM.

    Args:
        switch: the checkpoints of a `MiniGPT4` in eval mode.
        keep: images that are remembered.
    """

    def __init__(self, switch: CheckpointSwitch, keep: int) -> None:
        self.switch, self.model, self._keep = switch, switch.model, keep
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._embeds: OrderedDict[tuple[str, str], Tensor] = OrderedDict()

    @torch.inference_mode()
    def embeds(self, pictures: Sequence[Picture], checkpoint: str) -> list[Tensor]:
        """Embeddings (1, Q, D) of each picture."""
        self.switch.use(checkpoint)
        missing = {p.image_id: p for p in pictures if (checkpoint, p.image_id) not in self._embeds}
        own = {p.image_id: self._embeds[checkpoint, p.image_id] for p in pictures if p.image_id not in missing}
        if missing:
            embeds_BQD = self.model.project(self._image_features(list(missing.values())))
            own |= zip(missing, embeds_BQD.split(1), strict=True)
        for image_id, embeds_1QD in own.items():
            _remember(self._embeds, (checkpoint, image_id), embeds_1QD, self._keep)
        return [own[picture.image_id] for picture in pictures]

    def _image_features(self, pictures: Sequence[Picture]) -> Tensor:
        """What the projection reads, (B, Q, V)."""
        missing = [picture for picture in pictures if picture.image_id not in self._features]
        own = {p.image_id: self._features[p.image_id] for p in pictures if p not in missing}
        if missing:
            features_BQV = self.model.image_features(torch.stack([picture.pixels_3SS for picture in missing]))
            if not self.model.vision_is_frozen:  # another checkpoint sees it in another way: nothing was kept
                return features_BQV
            own |= zip((picture.image_id for picture in missing), features_BQV.split(1), strict=True)
        for image_id, features_1QV in own.items():
            _remember(self._features, image_id, features_1QV, self._keep)
        return torch.cat([own[picture.image_id] for picture in pictures])


def _remember(memory: OrderedDict, key: Any, value: Tensor, keep: int) -> None:
    """Put it last; the one that was used longest ago goes if there are too many."""
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > keep:
        memory.popitem(last=False)


OUT_OF_MEMORY = "the GPU's memory is full: fewer answers at once, shorter answers, or fewer beams need less"


class BusyError(MiniGPT4Error):
    """Too many requests wait already."""


class Engine:
    """Answers requests, several together; a `Backend` of chats.

    Args:
        model: a `MiniGPT4` on its device, in eval mode.
        processor: PIL image -> (3, S, S).
        checkpoints: further checkpoints of the same model by name; they share its frozen parts.
        name: what the checkpoint that `model` holds is called.
        max_rows: answers in progress at once; more wait. A search with several beams counts as so many.
        max_waiting: requests that may wait.
        keep_images: encoded images that are remembered.
        switch: the model's checkpoints, where somebody else swaps them too; in place of `checkpoints` and `name`.

    Raises WeightsError for a checkpoint that does not fit the model.
    """

    def __init__(
        self,
        model: Any,
        processor: BaseProcessor,
        checkpoints: Mapping[str, Path] | None = None,
        name: str = "minigpt4",
        *,
        max_rows: int = 8,
        max_waiting: int = 64,
        keep_images: int = 64,
        switch: CheckpointSwitch | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self._switch = switch or CheckpointSwitch(model, name)
        for other, path in (checkpoints or {}).items():
            self._switch.load(path)
            self._switch.keep(other)
        self._encoder = PictureEncoder(self._switch, keep_images)
        self._decoder = BatchDecoder(model.llama_model, model.llama_tokenizer, end_tokens(model.llama_model))
        self._waiting: deque[EngineReply] = deque()
        self._running: list[_Job] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stops = False

    # For those who ask

    @property
    def checkpoints(self) -> list[str]:
        """Names of the checkpoints, the first one first."""
        return self._switch.names

    @property
    def context_length(self) -> int:
        """Positions that the LLM reads, prompt and answer together."""
        return self.model.context_length

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Answers in progress."""
        return len(self._running)

    @property
    def is_alive(self) -> bool:
        """Whether its own thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def look(self, image: Image.Image) -> Picture:
        """The image as the model reads it; SampleError if its pixels cannot be read."""
        return look(image, self.processor)

    def new_conversation(self) -> Turns:
        """An empty conversation in the model's template."""
        return conversation_for(self.model)

    def submit(self, request: Request, notify: Callable[[], None] | None = None) -> EngineReply:
        """Ask for an answer.

        Args:
            notify: called, in the engine's thread, whenever there is something new to read.

        Raises:
            BusyError: too many requests wait.
            ConfigError: there is no such checkpoint, or a stop string is empty.
        """
        self._switch.name(request.checkpoint)
        check_stop(request.stop)
        with self._changed:
            if len(self._waiting) >= self.max_waiting:
                raise BusyError(f"{self.max_waiting} requests wait already; try again later")
            if self._stops:
                raise RunError("the engine was stopped")
            reply = EngineReply(request, drive=None if self._thread else self.tick, notify=notify)
            self._waiting.append(reply)
            self._changed.notify()
        return reply

    # A thread of its own

    def start(self) -> "Engine":
        """Answer in a thread of its own until `stop`."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread; answers in progress end with an error."""
        with self._changed:
            self._stops = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        self._fail(RunError("the engine was stopped"), [*self._replies(), *self._waiting])

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stops or self._waiting or self._running)
                if self._stops:
                    return
            self.tick()

    # The work

    @torch.inference_mode()
    def tick(self) -> None:
        """Let waiting requests join, and every answer grow by a token."""
        try:
            self._leave()
            self._admit()
            self._step()
        except Exception as error:  # whatever it is must reach the readers, and the next request finds an empty batch
            log.exception("The answers in progress are lost")
            self._fail(_readable(error), self._replies())

    def _leave(self) -> None:
        """Answers that nobody wants any more, or that took too long."""
        now = time.monotonic()
        with self._changed:
            waiting = list(self._waiting)
        for reply in [*self._replies(), *waiting]:
            if reply.deadline is not None and now > reply.deadline:
                reply.fail(TimeoutError(f"the answer took longer than {reply.request.timeout:g} s"))
        self._forget_over()
        with self._changed:  # their places in the queue are for others
            self._waiting = deque(reply for reply in self._waiting if not reply.is_over)

    def _forget_over(self) -> None:
        over = [job for job in self._running if job.reply.is_over]
        self._decoder.remove([job.row for job in over if job.row is not None])
        self._running = [job for job in self._running if job not in over]

    def _admit(self) -> None:
        """Waiting requests in their order, as long as there is room."""
        llm, tokenizer, device = self.model.llama_model, self.model.llama_tokenizer, self.model.device
        rows, texts, images = [], [], []
        for reply in self._take_waiting():
            decoding = reply.request.decoding
            try:
                text, embeds = self._read(reply)
                if decoding.num_beams > 1:
                    search = beam_search(llm, tokenizer, decoding, reply.stop)
                    steps = search.steps(llm, *self.model.prompt_embeds([text], [embeds]), first_token(llm))
                    self._running.append(_Job(reply, steps=steps))
                    continue
                generator = None
                if decoding.do_sample and reply.request.seed is not None:
                    generator = torch.Generator(device).manual_seed(reply.request.seed)
                row = GenerationState([first_token(llm)], decoding, reply.stop, generator)
            except Exception as error:  # of this request alone
                reply.fail(_readable(error))
                continue
            rows.append(_Job(reply, row))
            texts.append(text)
            images.append(embeds)
        if rows:
            self._running += rows
            self._decoder.add([job.row for job in rows], *self.model.prompt_embeds(texts, images))

    def _take_waiting(self) -> list[EngineReply]:
        taken: list[EngineReply] = []
        rows = sum(job.reply.request.decoding.num_beams for job in self._running)
        with self._changed:
            while self._waiting:
                reply = self._waiting[0]
                rows += reply.request.decoding.num_beams
                if rows > self.max_rows and (taken or self._running):
                    break
                self._waiting.popleft()
                if not reply.is_over:
                    taken.append(reply)
        return taken

    def _read(self, reply: EngineReply) -> tuple[str, list[Tensor]]:
        """The prompt of a request and the embeddings (1, Q, D) of its images; SampleError if they do not fit."""
        request = reply.request
        embeds = self._encoder.embeds(request.pictures, self._switch.name(request.checkpoint))
        image_tokens = [embeds_1QD.shape[1] for embeds_1QD in embeds]

        def length(prompt: str) -> int:
            return self.model.prompt_length(prompt, image_tokens)

        fitted, reply.dropped_turns = request.conversation.fit(
            length, request.decoding.max_new_tokens, self.model.context_length
        )
        text = fitted.get_prompt()
        if text.count(IMAGE_PLACEHOLDER) != len(embeds):  # it would end the answers of all who are embedded with it
            raise SampleError(
                f"the conversation has room for {text.count(IMAGE_PLACEHOLDER)} images, not {len(embeds)}"
            )
        reply.prompt_tokens = length(text)
        return text, embeds

    def _step(self) -> None:
        if self._decoder.rows:
            self._decoder.step()
        for job in self._running:
            if job.row is not None:
                self._update(job.reply, job.row.ids, job.row.ended)
                continue
            try:
                next(job.steps)  # a search has nothing to say before its end
            except StopIteration as end:
                (ids,) = end.value
                text = self.model.llama_tokenizer.decode(ids[1:])
                ended = ids[-1] in self._decoder.end_ids or any(stop in text for stop in job.reply.stop)
                self._update(job.reply, ids, ended)
        self._forget_over()

    def _update(self, reply: EngineReply, ids: Sequence[int], ended: bool | None) -> None:
        text = self.model.llama_tokenizer.decode(ids[1:], skip_special_tokens=True)
        if ended is None:
            reply.grow(text, len(ids) - 1)
        else:
            reply.finish(text, len(ids) - 1, ended)

    def _replies(self) -> list[EngineReply]:
        return [job.reply for job in self._running]

    def _fail(self, error: Exception, replies: Sequence[EngineReply]) -> None:
        """Nothing more comes to any of these, and nothing is left in progress."""
        for reply in replies:
            reply.fail(error)
        self._running = []
        self._decoder.remove(list(self._decoder.rows))


@dataclass(frozen=True, eq=False)
class _Job:
    """An answer in progress: with one beam a row of the decoder, with several a search of its own."""

    reply: EngineReply
    row: GenerationState | None = None
    steps: Generator[None, None, list[list[int]]] | None = None


def _readable(error: Exception) -> Exception:
    return RunError(f"{OUT_OF_MEMORY} ({error})") if isinstance(error, torch.OutOfMemoryError) else error

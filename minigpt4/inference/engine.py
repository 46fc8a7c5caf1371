"""One model, many conversations: waiting requests join the running batch, answers leave it when they end.

engine = Engine(model, processor)
print(Chat(engine).ask("Hello?"))          # works while it is read
engine.start()                             # or in a thread of its own, for many readers at once
"""

import asyncio
import hashlib
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minigpt4.common.errors import MiniGPT4Error, RunError, SampleError
from minigpt4.conversation.chat import Picture, Request
from minigpt4.conversation.decoding import Decoding, TextStream
from minigpt4.conversation.templates import Turns, conversation_for
from minigpt4.inference.attribution import Trace
from minigpt4.models.batch_decoder import BatchDecoder, GenerationState
from minigpt4.models.beam_search import BeamSearch
from minigpt4.models.generation import StopOnText, check_stop
from minigpt4.models.loading import CheckpointSwitch
from minigpt4.processors import process_image
from minigpt4.processors.base_processor import BaseProcessor

log = logging.getLogger(__name__)


class EngineReply:
    """An answer between the thread that makes it and its reader: iterate over its pieces, which joined are the answer.

    Attributes:
        prompt_tokens: positions that the prompt takes, images included; 0 until it was read.
        dropped_turns: oldest turns that did not fit into the LLM's context.
        finish_reason: None while it goes on; "stop": the model ended it; "length": the token limit did; "cancelled".
    """

    def __init__(self, request: Request, drive: Callable[[], None] | None = None) -> None:
        self.request = request
        self.prompt_tokens = self.completion_tokens = self.dropped_turns = 0
        self.finish_reason: str | None = None
        self.deadline = None if request.timeout is None else time.monotonic() + request.timeout
        self.stop = [*filter(None, [request.conversation.answer_end]), *request.stop]
        self.is_over = False
        self.row: GenerationState | None = None
        """With one beam, a row of the decoder."""
        self.search: Iterator[list[list[int]] | None] | None = None
        """With several beams, a search of its own."""
        self._stream = TextStream(self.stop, request.conversation.answer_start)
        self._drive = drive
        self._notify: Callable[[], Any] | None = None
        self._news: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()

    # For the reader

    def __iter__(self) -> Iterator[str]:
        """The pieces; an error of the answer is raised where it happened."""
        while True:
            while self._drive is not None and self._news.empty():
                self._drive()
            if (piece := self._next()) is None:
                return
            yield piece

    async def __aiter__(self) -> AsyncIterator[str]:
        """The same in an event loop, from an engine with a thread of its own."""
        changed = asyncio.Event()
        self._notify = partial(asyncio.get_running_loop().call_soon_threadsafe, changed.set)
        while True:
            while not self._news.empty():
                if (piece := self._next()) is None:
                    return
                yield piece
            await changed.wait()
            changed.clear()

    def _next(self) -> str | None:
        """Wait for the next piece, None at the end; an error is raised."""
        news = self._news.get()
        if isinstance(news, Exception):
            raise news
        return news

    def close(self) -> None:
        """Stop the answer; returns at once, and does nothing to one that has ended."""
        self.end("cancelled")

    # For the engine

    def grow(self, text: str, tokens: int, ended: bool | None) -> None:
        """The answer's text so far, how many tokens it has, and how it ended: by the model, by the limit, not yet."""
        self.completion_tokens = tokens
        piece = self._stream.feed(text) if ended is None else self._stream.finish(text)
        if piece and not self.is_over:
            self._tell(piece)
        if ended is not None:
            self.end("stop" if ended else "length")

    def end(self, reason: str | None = None, error: Exception | None = None) -> None:
        """Nothing more comes; the reader gets the error, if there is one."""
        if not self.is_over:
            self.finish_reason, self.is_over = reason, True
            self._tell(error)

    def _tell(self, news: str | Exception | None) -> None:
        self._news.put(news)
        if self._notify is not None:
            with suppress(RuntimeError):  # the reader's loop is closed
                self._notify()


OUT_OF_MEMORY = "the GPU's memory is full: fewer answers at once, shorter answers, or fewer beams need less"


class BusyError(MiniGPT4Error):
    """Too many requests wait already."""


class Engine:
    """Answers requests, several together.

    Args:
        model: a `MiniGPT4` on its device, in eval mode.
        processor: PIL image -> (3, S, S).
        checkpoints: further checkpoints of the same model by name; WeightsError for one that does not fit.
        name: what the checkpoint that `model` holds is called.
        max_rows: answers in progress at once; more wait. A search with several beams counts as so many.
        max_waiting: requests that may wait.
        keep_images: encoded images that are remembered.
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
    ) -> None:
        self.model, self.processor = model, processor
        self.max_waiting = max_waiting
        self.switch = CheckpointSwitch(model, name)
        for other, path in (checkpoints or {}).items():
            self.switch.load(path, other)
        self._keep_images = keep_images
        self._features: OrderedDict[tuple[str | None, str], Tensor] = OrderedDict()
        self._decoder = BatchDecoder(model.llama_model, model.llama_tokenizer, model.token_graphs)
        self.max_rows = min(max_rows, self._decoder.room)
        self._waiting: deque[EngineReply] = deque()
        self._running: list[EngineReply] = []
        self._map_requests: deque[tuple[Future, Request, str, int]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stops = False

    # For those who ask

    @property
    def checkpoints(self) -> list[str]:
        return self.switch.names

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def preprocess(self, image: Image.Image) -> Picture:
        """The image as the model reads it; SampleError if its pixels cannot be read."""
        pixels_3SS = process_image(self.processor, image)
        return Picture(hashlib.sha256(pixels_3SS.numpy().tobytes()).hexdigest()[:16], pixels_3SS)

    def new_conversation(self) -> Turns:
        """An empty conversation in the model's template."""
        return conversation_for(self.model)

    def submit(self, request: Request) -> EngineReply:
        """Ask for an answer; BusyError, or ConfigError for an unknown checkpoint or an empty stop string."""
        self.switch.name(request.checkpoint)
        check_stop(request.stop)
        with self._changed:
            if len(self._waiting) >= self.max_waiting:
                raise BusyError(f"{self.max_waiting} requests wait already; try again later")
            if self._stops:
                raise RunError("the engine was stopped")
            reply = EngineReply(request, drive=None if self._thread else self.tick)
            self._waiting.append(reply)
            self._changed.notify()
        return reply

    def maps(self, request: Request, answer: str, word: int) -> Future:
        """Where the model looked, for a word of an answer that it gave: by method (n, h, w) for the request's images.

        Made between two tokens of the answers in progress; the future's errors are those of `submit`'s reply.
        """
        self.switch.name(request.checkpoint)
        future: Future = Future()
        with self._changed:
            if self._stops:
                raise RunError("the engine was stopped")
            self._map_requests.append((future, request, answer, word))
            self._changed.notify()
        if self._thread is None:
            self.tick()
        return future

    # A thread of its own

    def start(self) -> "Engine":
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
        error = RunError("the engine was stopped")
        self._fail(error, [*self._running, *self._waiting])
        while self._map_requests:
            self._map_requests.popleft()[0].set_exception(error)

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stops or self._waiting or self._running or self._map_requests)
                if self._stops:
                    return
            self.tick()

    # The work

    @torch.inference_mode()
    def tick(self) -> None:
        """Let waiting requests join, and every answer grow by a token."""
        try:
            self._expire()
            self._admit()
            self._step()
            self._make_maps()
        except Exception as error:  # whatever it is must reach the readers, and the next request finds an empty batch
            log.exception("The answers in progress are lost")
            self._fail(_readable(error), self._running)

    def _expire(self) -> None:
        """Forget answers that nobody wants any more, or that took too long."""
        now = time.monotonic()
        with self._changed:
            for reply in [*self._running, *self._waiting]:
                if reply.deadline is not None and now > reply.deadline:
                    reply.end(error=TimeoutError(f"the answer took longer than {reply.request.timeout:g} s"))
            self._waiting = deque(reply for reply in self._waiting if not reply.is_over)
        self._remove_ended()

    def _remove_ended(self) -> None:
        self._decoder.remove([reply.row for reply in self._running if reply.is_over and reply.row is not None])
        self._running = [reply for reply in self._running if not reply.is_over]

    def _admit(self) -> None:
        """Waiting requests in their order, as long as there is room."""
        model = self.model
        joining, texts, images = [], [], []
        for reply in self._take_waiting():
            decoding, seed = reply.request.decoding, reply.request.seed
            try:
                text, embeds = self._read(reply)
                if decoding.num_beams > 1:
                    stopping = StopOnText(reply.stop, model.llama_tokenizer)
                    search = BeamSearch(model.llama_model, decoding, [stopping], model.token_graphs)
                    reply.search = search.steps(*model.prompt_embeds([text], [embeds]))
                    self._running.append(reply)
                    continue
                is_seeded = decoding.do_sample and seed is not None
                generator = torch.Generator(model.device).manual_seed(seed) if is_seeded else None
                reply.row = GenerationState(decoding, reply.stop, generator)
            except Exception as error:  # of this request alone
                reply.end(error=_readable(error))
                continue
            joining.append(reply)
            texts.append(text)
            images.append(embeds)
        if joining:
            self._running += joining
            self._decoder.add([reply.row for reply in joining], *model.prompt_embeds(texts, images))

    def _take_waiting(self) -> list[EngineReply]:
        taken: list[EngineReply] = []
        rows = sum(reply.request.decoding.num_beams for reply in self._running)
        with self._changed:
            while self._waiting:
                rows += self._waiting[0].request.decoding.num_beams
                if rows > self.max_rows and (taken or self._running):
                    break
                taken.append(self._waiting.popleft())
        return [reply for reply in taken if not reply.is_over]

    def _read(self, reply: EngineReply) -> tuple[str, list[Tensor]]:
        """The prompt of a request and the embeddings (1, Q, D) of its images; SampleError if they do not fit."""
        request = reply.request
        embeds = self._image_embeds(request.pictures, self.switch.name(request.checkpoint))
        length = partial(self.model.prompt_length, image_tokens=[embeds_1QD.shape[1] for embeds_1QD in embeds])
        fitted, reply.dropped_turns = request.conversation.fit(
            length, request.decoding.max_new_tokens, self.model.context_length
        )
        text = fitted.get_prompt()
        places = len(self.model.prompting.split_images(text)) - 1
        if places != len(embeds):  # it would end the answers of all who are embedded with it
            raise SampleError(f"the conversation has room for {places} images, not {len(embeds)}")
        reply.prompt_tokens = length(text)
        return text, embeds

    @torch.inference_mode()
    def _image_embeds(self, pictures: Sequence[Picture], checkpoint: str) -> list[Tensor]:
        """Embeddings (1, Q, D) of each picture; what the projection reads is kept for the latest images."""
        self.switch.use(checkpoint)
        seen_by = None if self.model.vision_is_frozen else checkpoint
        asked = {(seen_by, picture.image_id): picture.pixels_3SS for picture in pictures}
        missing = [key for key in asked if key not in self._features]
        if missing:
            features_BQV = self.model.image_features(torch.stack([asked[key] for key in missing]))
            self._features |= zip(missing, features_BQV.split(1), strict=True)
        for key in asked:
            self._features.move_to_end(key)
        embeds = [self.model.project(self._features[seen_by, picture.image_id]) for picture in pictures]
        while len(self._features) > self._keep_images:
            self._features.popitem(last=False)
        return embeds

    def _step(self) -> None:
        decode = self.model.llama_tokenizer.decode
        if self._decoder.rows:
            self._decoder.step()
        for reply in self._running:
            if reply.row is not None:
                ids, ended = reply.row.ids, reply.row.ended
            elif (best := next(reply.search)) is None:  # a search has nothing to say before its end
                continue
            else:
                (ids,) = best
                whole = decode(ids[1:])
                ended = ids[-1] in self._decoder.end_ids or any(stop in whole for stop in reply.stop)
            reply.grow(decode(ids[1:], skip_special_tokens=True), len(ids) - 1, ended)
        self._remove_ended()

    def _make_maps(self) -> None:
        if not self._map_requests:
            return
        future, request, answer, word = self._map_requests.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            tokens = len(self.model.prompting.encode([answer])[0])
            text, _ = self._read(EngineReply(replace(request, decoding=Decoding(max_new_tokens=max(1, tokens)))))
            image_n3SS = torch.stack([picture.pixels_3SS for picture in request.pictures])
            future.set_result(Trace(self.model, image_n3SS, text, answer).maps([word]))
        except Exception as error:  # of this request alone
            future.set_exception(_readable(error))

    def _fail(self, error: Exception, replies: Sequence[EngineReply]) -> None:
        """Nothing more comes to any of these, and nothing is left in progress."""
        for reply in replies:
            reply.end(error=error)
        self._running = []
        self._decoder.remove(list(self._decoder.rows))


def _readable(error: Exception) -> Exception:
    return RunError(f"{OUT_OF_MEMORY} ({error})") if isinstance(error, torch.OutOfMemoryError) else error

"""MiniGPT-4 as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), `--model minigpt4`.

    pip install lmms-eval    # into the environment of this package
    python -m lmms_eval --model minigpt4 --tasks mme --batch_size 8 \
        --model_args cfg_path=eval_configs/minigpt4_eval.yaml,ckpt=weights/prerained_minigpt4_7b.pth

Images stand before the text, or where it says `<image>`, and the whole goes into `model.prompt_template`. Only
lmms-eval imports this module; nothing else here needs that package.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from minigpt4.common.binding import require_paths
from minigpt4.common.config import Config
from minigpt4.common.devices import find_device, is_gpu
from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER
from minigpt4.inference.pipeline import image_processor
from minigpt4.models.feature_cache import build_model
from minigpt4.models.generation import Decoding
from minigpt4.models.prompting import apply_template
from minigpt4.processors import process_image

try:
    from lmms_eval.api.instance import GenerationResult, Instance
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ConfigError(f"the adapter for lmms-eval needs that package, 0.7: pip install lmms-eval ({error})") from error

log = logging.getLogger(__name__)

IMAGE_MARK = "<image>"
"""What tasks write into their texts where an image belongs."""
IMAGE_TAG = f"<Img>{IMAGE_PLACEHOLDER}</Img>"
MAX_NEW_TOKENS = 160
"""Longest answer where a task does not say: `max_txt_len` of the published recipes."""
DECODING_KEYS = ("num_beams", "max_new_tokens", "top_p", "repetition_penalty", "length_penalty")


class Request(NamedTuple):
    """One request of lmms-eval, its images not yet read."""

    index: int
    text: str
    visuals: Callable[[], list[Any] | None]
    where: str
    """Task, split and number, for errors."""


class MiniGPT4Lmms(lmms):
    """A model that lmms-eval builds from `--model_args`; ConfigError for a wrong argument or YAML.

    Args:
        cfg_path: YAML with the section `model:`, such as `eval_configs/minigpt4_eval.yaml`.
        ckpt: overrides `model.ckpt`.
        device: default: a GPU if there is one. Under `accelerate launch` each process takes its own.
    """

    is_simple = True

    def __init__(
        self,
        cfg_path: str = "",
        ckpt: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown or not cfg_path:
            wrong = f"unknown: {', '.join(unknown)}" if unknown else "cfg_path is missing"
            raise ConfigError(f"--model_args: {wrong}; they are cfg_path=FILE and ckpt=FILE")
        options = [f"model.ckpt={ckpt}"] if ckpt else []
        config = Config(SimpleNamespace(cfg_path=cfg_path, options=options)).validate(training=False)
        require_paths({"model": config.model}, config.source)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"--batch_size: {batch_size!r} must be a number, 1 or more")
        self.batch_size = int(batch_size)
        self.device = find_device(device or find_device(None).type)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and is_gpu(self.device) and self.device.index is None:
            self.device = torch.device(self.device.type, int(os.environ.get("LOCAL_RANK", 0)))
        self.model = build_model(config, self.device).eval()
        self.processor = image_processor(config)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests; each ends at a string of `until` or at `model.end_sym`."""
        groups: dict[tuple[Decoding, tuple[str, ...]], list[Request]] = {}
        for index, request in enumerate(requests):
            context, settings, *place = request.args
            groups.setdefault(self._decoding(settings), []).append(self._request(index, context, place))
        answers = [""] * len(requests)
        for (decoding, stop), own in groups.items():
            for batch, images, texts in self._batches(own):
                said = self.model.generate(images, texts, **dataclasses.asdict(decoding), stop=stop)
                for request, answer in zip(batch, said, strict=True):
                    answers[request.index] = answer
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(loss, greedy) of each continuation: minus its log-probability, nats summed over its tokens, and whether
        greedy decoding would give it.

        A loss, for lmms-eval takes the choice with the smallest number; a GenerationResult, for its evaluator turns a
        bare pair into text (0.7.3). Leading blanks are dropped: answers are trained after a prompt that ends in one.
        """
        found, continuations = [], []
        for index, request in enumerate(requests):
            context, continuation, *place = request.args
            found.append(self._request(index, context, place))
            continuations.append(continuation(self._document(place)) if callable(continuation) else continuation)
        losses: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for batch, images, texts in self._batches(found):
            answers = [str(continuations[request.index]).lstrip(" ") for request in batch]
            scores = self.model.log_likelihoods(images, texts, answers)
            for request, (score, greedy) in zip(batch, scores, strict=True):
                losses[request.index] = (-score, greedy)
        return [GenerationResult(loss) for loss in losses]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """ConfigError: tasks whose next question depends on an answer are not supported."""
        raise ConfigError("the adapter for lmms-eval does not support multi-round tasks; leave them out of --tasks")

    def _request(self, index: int, context: str, place: Sequence[Any]) -> Request:
        """`place`: what finds the images, number of the document, task and split; or nothing, for text alone."""
        if not place:
            return Request(index, context, lambda: None, f"request {index}")
        visuals, number, task, split = place
        return Request(index, context, lambda: visuals(self._document(place)), f"{task}, {split}, document {number}")

    def _document(self, place: Sequence[Any]) -> Any:
        _, number, task, split = place
        return self.task_dict[task][split][number]

    def _batches(
        self, requests: Sequence[Request]
    ) -> Iterator[tuple[Sequence[Request], list[Tensor | None], list[str]]]:
        """Requests of like length, the longest first; the pixels (n, 3, S, S) or None, and whole prompt, of each."""
        order = sorted(requests, key=lambda request: (-len(request.text), request.index))
        for start in range(0, len(order), self.batch_size):
            batch, images, texts = order[start : start + self.batch_size], [], []
            for request in batch:
                visuals = request.visuals() or []
                wrong = next((one for one in visuals if not isinstance(one, Image.Image)), None)
                if wrong is not None:
                    raise SampleError(f"{request.where}: only images are supported, not {type(wrong).__name__}")
                pixels = [process_image(self.processor, one, request.where) for one in visuals]
                images.append(torch.stack(pixels) if visuals else None)
                texts.append(apply_template(self.model.prompt_template, _with_images(request, len(visuals))))
            yield batch, images, texts

    def _decoding(self, settings: dict[str, Any]) -> tuple[Decoding, tuple[str, ...]]:
        """Decoding and stop strings of a task's `generation_kwargs`."""
        ignored = settings.keys() - {*DECODING_KEYS, "until", "do_sample", "temperature"}
        if ignored:
            log.warning("generation_kwargs without effect here: %s", ", ".join(sorted(ignored)))
        until = settings.get("until") or []
        stop = [*([until] if isinstance(until, str) else until), self.model.end_sym]
        # Tasks write 0 or null for what they do not set, and a temperature above 0 where they want sampling.
        given = {key: settings[key] for key in DECODING_KEYS if settings.get(key)}
        temperature, do_sample = settings.get("temperature"), settings.get("do_sample")
        if temperature is None:
            temperature = 1.0 if do_sample else 0.0
        given = {"max_new_tokens": MAX_NEW_TOKENS, "top_p": 1.0} | given
        decoding = Decoding.at(0 if do_sample is False else max(0, temperature), **given)
        return decoding, tuple(dict.fromkeys(filter(None, stop)))


def _with_images(request: Request, count: int) -> str:
    """The text with a tag for each image: where it says so, else before it."""
    marks = request.text.count(IMAGE_MARK)
    if marks == count:
        return request.text.replace(IMAGE_MARK, IMAGE_TAG)
    if marks:
        raise SampleError(f"{request.where}: the text has {marks} {IMAGE_MARK}, but there are {count} images")
    return " ".join([*[IMAGE_TAG] * count, request.text])

"""The Python API: a model that captions images and talks about them.

from minigpt4 import pipeline

model = pipeline("eval_configs/minigpt4_eval.yaml")   # or the folder of a run
model.caption(Image.open("photo.jpg"))

Shapes: B images, S pixels a side.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from minigpt4.common.binding import bind, require_paths
from minigpt4.common.checkpoint import best_checkpoint
from minigpt4.common.config import PUBLISHED_PROCESSORS, Config
from minigpt4.common.config_files import parse_options
from minigpt4.common.devices import find_device
from minigpt4.common.dist_utils import seed_everything
from minigpt4.common.errors import ConfigError, SampleError, WeightsError, errors_as
from minigpt4.common.hub import local_path
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.common.run_folder import RunFolder
from minigpt4.common.schemas import GenerationSettings
from minigpt4.common.utils import quick_hash
from minigpt4.conversation import prompt_template_from_tokenizer
from minigpt4.conversation.chat import Chat
from minigpt4.conversation.decoding import Answer, Decoding
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER
from minigpt4.datasets.datasets.base_dataset import ImageReader
from minigpt4.inference.attribution import Look, Trace, grey, nearest_words
from minigpt4.inference.engine import Engine
from minigpt4.models.feature_cache import build_model, cached_numbers, feature_cache
from minigpt4.models.prompting import apply_template, read_prompts
from minigpt4.models.tokenizer import load_tokenizer
from minigpt4.models.vision_tower import vision_files
from minigpt4.processors import BaseProcessor, load_processor, process_image

log = logging.getLogger(__name__)

WEIGHTS_ENDINGS = {".pth", ".pt", ".bin", ".safetensors"}
BATCH_SIZE = 8
"""Images that are answered together where neither the caller nor `run.batch_size_eval` says."""

AnyImage = Image.Image | str | Path


def pipeline(source: str | Path, options: Sequence[str] = (), device: torch.device | str | None = None) -> "Pipeline":
    """Load a model to ask; ConfigError or WeightsError for what is wrong or missing.

    Args:
        source: a YAML file such as `eval_configs/minigpt4_eval.yaml`, or the folder of a run of `train.py`: then with
            the run's configuration and its `checkpoint_best.pth`, or its newest checkpoint; the log says which.
        options: KEY=VALUE each, as after `--options`; `model.ckpt` overrides the run's own checkpoint, too.
        device: None: the first GPU (or `mps`), or the CPU where there is none.
    """
    return Pipeline(read_source(source, options), device)


def read_source(source: str | Path, options: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, or of a run's folder, here or on the hub, with its best checkpoint or else its
    newest.

    ConfigError for a source that is neither; WeightsError for a run without a whole checkpoint.
    """
    with errors_as(ConfigError, str(source)):
        path = local_path(str(source), "RUN", ("*.pth",))
        run = RunFolder(path) if path.is_dir() else None
    options = [options] if isinstance(options, str) else list(options)
    if run is None and path.suffix.lower() in WEIGHTS_ENDINGS:
        way_out = f"name its YAML, with the option model.ckpt={path}, or the folder of its run"
        raise ConfigError(f"{path}: is a weights file; {way_out}")
    if run is not None and not run.run_json.is_file():
        runs = sorted(file.parent for file in path.glob(f"*/{run.run_json.name}"))
        more = f"; the last of the {len(runs)} runs in it is {runs[-1]}" if runs else ""
        raise ConfigError(f"{path}: is not the folder of a run, for it has no {run.run_json.name}{more}")
    file = path if run is None else run.run_json
    config = Config(SimpleNamespace(cfg_path=str(file), options=options)).validate(training=False)
    if run is None or OmegaConf.select(parse_options(options), "model.ckpt") is not None:
        return config
    checkpoint = best_checkpoint(path)
    if checkpoint is None:
        raise WeightsError(f"{path}: the run has no whole checkpoint yet")
    log.info("%s: taking its checkpoint %s", path, checkpoint.name)
    return config.replace(model=dataclasses.replace(config.model, ckpt=str(checkpoint)))


@dataclass(frozen=True)
class PromptRules:
    """What is said to the model and how its answers are decoded, the same for all checkpoints."""

    decoding: Decoding
    prompt: str
    """The whole prompt, in the model's template."""
    stop: list[str]
    seed: int
    """Of sampling."""
    own_prompts: Mapping[str, str] = field(default_factory=dict)
    """Prompts, in the model's template, of images that have one of their own, by image id."""
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By image id, answers to choose from: then an answer is JSON, the losses of each choice's tokens."""

    @classmethod
    def of(
        cls, cfg: Config, prompt: str | None = None, *, source: str = "run.generation.prompt", **changes: Any
    ) -> "PromptRules":
        """The rules of a configuration, with another prompt or decoding; ConfigError, which names `source`, for wrong
        ones."""
        own = changes if prompt is None else changes | {"prompt": prompt}
        values = dataclasses.asdict(cfg.run.generation) | own
        settings = bind(GenerationSettings, values, section="decoding", source=source)
        decoding = Decoding(**{key.name: getattr(settings, key.name) for key in dataclasses.fields(Decoding)})
        if cfg.run.batch_invariant and decoding.do_sample:
            raise ConfigError("run.batch_invariant: the draws of a batch are one stream; set do_sample: False")
        stop = settings.stop if settings.stop is not None else [cfg.model.end_sym] if cfg.model.end_sym else []
        key = "run.generation.prompt" if prompt is None else source
        return cls(decoding, _whole_prompt(cfg.model, settings.prompt, key), list(stop), cfg.run.seed)

    @torch.inference_mode()
    def answers(
        self, model: nn.Module, embeds_BQD: Tensor | None, image_ids: Sequence[str] = (), *, batch: int | None = None
    ) -> list[Answer]:
        """What a `MiniGPT4` says about the images of a batch, by their tokens; one answer an image.

        `image_ids`: needed where images have prompts of their own; one whose prompt has no `<ImageHere>` is text alone,
        without a row of `embeds_BQD`. `batch`: its number, which seeds sampling with `seed`; None: nothing does.
        """
        if self.decoding.do_sample and batch is not None:
            seed_everything(self.seed + batch)
        rows = [] if embeds_BQD is None else embeds_BQD.split(1)
        prompts = [self.own_prompts.get(image_id, self.prompt) for image_id in image_ids or [""] * len(rows)]
        left = iter(rows)
        images = [[next(left)] if IMAGE_PLACEHOLDER in prompt else [] for prompt in prompts]
        if self.choices:
            asked = zip(images, prompts, (self.choices[image_id] for image_id in image_ids), strict=True)
            return [Answer(json.dumps(model.choice_losses(*one)), None) for one in asked]
        return model.answers_from_embeds(images, prompts, self.decoding, self.stop)

    def provenance(self) -> dict[str, Any]:
        """All that answers depend on, plain types; the seed where it matters."""
        given = {"own_prompts": self.own_prompts, "choices": self.choices}
        own = {name: dict(values) for name, values in given.items() if values}
        if self.choices:
            return own | {"prompt": self.prompt}
        return own | {
            "decoding": dataclasses.asdict(self.decoding),
            "prompt": self.prompt,
            "stop": self.stop,
            "seed": self.seed if self.decoding.do_sample else None,
        }


class Pipeline:
    """A model with what it needs to caption images and to talk about them.

    Where `model.ckpt` is unset `use_checkpoint` comes before the first question.

    Attributes:
        model: the `MiniGPT4`, in eval mode.
        processor: PIL image -> (3, S, S), that of the evaluation.
        checkpoint: where the trained weights are from; None before there are any.
    """

    def __init__(self, cfg: Config, device: torch.device | str | None = None) -> None:
        require_paths({"model": cfg.model}, cfg.source)
        self.cfg = cfg
        self.processor = image_processor(cfg)
        fixed = cfg.model.ckpt and not cfg.model.is_frozen("llama_model")  # a trained LLM has one checkpoint
        start = cfg if fixed else cfg.replace(model=dataclasses.replace(cfg.model, ckpt=None))
        self.model = build_model(start, find_device(device)).eval()
        self._engine = Engine(self.model, self.processor)
        self.checkpoint: Path | None = None
        self._name: str | None = None
        if loaded := Path(cfg.model.ckpt) if fixed else self.model.whole_file:
            self.checkpoint, (self._name,) = loaded, self._engine.checkpoints
        elif cfg.model.ckpt:
            self.use_checkpoint(cfg.model.ckpt)

    def use_checkpoint(self, path: str | Path) -> None:
        """Swap the trained weights; the frozen parts stay as they are, and chats go on with what they began with.

        WeightsError, and the weights as before, if the file is missing or does not fit; ConfigError where the LLM is
        trained, too (`model.train.llm`).
        """
        name = f"{len(self._engine.checkpoints)}: {path}"  # the same file may have other weights the next time
        self._engine.switch.load(path, name)
        self.checkpoint, self._name = Path(path), name

    def caption(
        self,
        images: AnyImage | Sequence[AnyImage],
        prompt: str | None = None,
        *,
        batch_size: int | None = None,
        **decoding: Any,
    ) -> str | list[str]:
        """The caption of an image, or a list of captions of several; `torch.manual_seed` repeats sampling.

        Args:
            images: a PIL image, a path, or several of them; SampleError for one that cannot be read.
            prompt: instruction with one `<ImageHere>`, put into `model.prompt_template`; None: the configuration's.
            batch_size: images that are answered together; None: `run.batch_size_eval`, or 8.
            decoding: fields of `run.generation`, such as `num_beams=5`, in the place of the configuration's.

        ConfigError for a wrong prompt or decoding, WeightsError where there is no checkpoint yet.
        """
        rules = PromptRules.of(self.cfg, prompt, source="caption()", **decoding)
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"caption(): batch_size: {batch_size} must be at least 1")
        self._require_checkpoint()
        if not isinstance(images, list | tuple):
            return self._captions([images], 0, rules)[0]
        size = batch_size or self.cfg.run.batch_size_eval or BATCH_SIZE
        starts = range(0, len(images), size)
        return [text for start in starts for text in self._captions(images[start : start + size], start, rules)]

    def look(self, image: AnyImage, prompt: str | None = None, answer: str | None = None) -> Look:
        """Where the model looks for each word of an `answer`, None: that of `caption`, whose arguments and errors these
        are; attribution.py says how."""
        rules = PromptRules.of(self.cfg, prompt, source="look()")
        if answer is None:
            answer = self.caption(image, prompt)
        self._require_checkpoint()
        self._engine.switch.use(self._name)
        pixels_13SS = self._pixels([image])
        trace = Trace(self.model, pixels_13SS, rules.prompt, answer)
        maps = [trace.maps([word]) for word in range(len(trace.words))]
        by_method = {method: np.concatenate([own[method] for own in maps]) for method in maps[0]} if maps else {}
        nearest = nearest_words(self.model, trace.embeds_nQD[0])
        words = [word.text for word in trace.words]
        return Look(answer, words, trace.log_probs, by_method, nearest, grey(pixels_13SS[0]))

    def chat(self) -> Chat:
        """A new conversation: `show` it an image, `ask` it a question; WeightsError without a checkpoint."""
        self._require_checkpoint()
        return Chat(self._engine, checkpoint=self._name)

    @torch.inference_mode()
    def _captions(self, images: Sequence[AnyImage], first: int, rules: PromptRules) -> list[str]:
        """Those of a batch; errors call an image by its path or by its number, counted from `first`."""
        image_B3SS = self._pixels(images, first)
        self._engine.switch.use(self._name)  # a chat may have used another one since
        embeds_BQD = self.model.project(self.model.image_features(image_B3SS))
        return [answer.text for answer in rules.answers(self.model, embeds_BQD)]

    def _pixels(self, images: Sequence[AnyImage], first: int = 0) -> Tensor:
        pixels = []
        for number, image in enumerate(images, start=first):
            if not isinstance(image, AnyImage):
                raise SampleError(f"images[{number}]: must be a PIL image or a path, not {type(image).__name__}")
            name = f"images[{number}]" if isinstance(image, Image.Image) else None
            pixels.append(process_image(self.processor, image, name))
        return torch.stack(pixels)

    def _require_checkpoint(self) -> None:
        if self.checkpoint is None:
            what = "model.ckpt is not set; give the option model.ckpt=FILE, or call use_checkpoint(FILE)"
            raise WeightsError(f"{self.cfg.source}: {what}")


def _whole_prompt(model: MiniGPT4Config, instruction: str | None, key: str) -> str:
    """The prompt of all images: `instruction`, or the first of the prompt file, or the image alone."""
    template = model.prompt_template
    if template == "tokenizer":
        template = _template_of(model.llm_directory())
    if instruction is None:
        prompts = read_prompts(model.prompt_path, template)
        return prompts[0] if prompts else IMAGE_PLACEHOLDER
    instruction = instruction.replace(model.PLACEHOLDER, IMAGE_PLACEHOLDER)
    if instruction.count(IMAGE_PLACEHOLDER) != 1:
        example = f"'<Img>{IMAGE_PLACEHOLDER}</Img> What is this?'"
        raise ConfigError(f"{key}: {instruction!r} must hold {IMAGE_PLACEHOLDER} exactly once, as in {example}")
    return apply_template(template, instruction)


@functools.cache  # every call of the Python API asks for it, and a tokenizer takes a while to load
def _template_of(directory: Path) -> str:
    return prompt_template_from_tokenizer(load_tokenizer(directory))


def image_processor(cfg: Config) -> BaseProcessor:
    """What an evaluation does to images."""
    return load_processor(cfg.image_processor.name, cfg.image_processor.arguments())


def image_reader(cfg: Config) -> ImageReader:
    """How an evaluation reads images: decoded, or from the cache of `run.feature_cache`."""
    processor, cache = image_processor(cfg), feature_cache(cfg)
    return ImageReader(processor, cache and cache.store(processor))


def frozen_files(model: Any) -> list[list[Any]]:
    """Quick hashes of the files of LLM, vision encoder and Q-Former that a `model:` section names."""
    files = [*sorted(model.llm_directory().iterdir()), *vision_files(model)]
    return [quick_hash(path) for path in files if path.is_file()]


def image_provenance(cfg: Config) -> dict[str, Any]:
    """How images are processed, and how what follows is rounded; nothing for the usual way, as in older files."""
    section = cfg.image_processor
    own = {key: value for key, value in section.kwargs.items() if value is not None}
    if section.name not in PUBLISHED_PROCESSORS:
        own["name"] = section.name
    rounded = cached_numbers(cfg) | ({"batch_invariant": True} if cfg.run.batch_invariant else {})
    return rounded | ({"image_processor": own} if own else {})

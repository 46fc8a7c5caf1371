"""One checkpoint evaluated the plain way, for evaluate.py to measure: a process that loads, captions and scores.

    python benchmarks/plain_evaluation.py --cfg-path FILE --ckpt FILE.pth --save DIR --metrics BLEU CIDEr ROUGE-L
An image at a time, `generate` of transformers with logits at all positions of the prompt, then pycocoevalcap as it is.
Configuration, images, prompt, loading of weights and decoding settings are those of eval_flickr30k.py.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from generate import all_logits
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.common.utils import exit_status
from minigpt4.conversation.decoding import clean_generated
from minigpt4.evaluation import command
from minigpt4.evaluation.caption_run import read_data
from minigpt4.evaluation.command import for_evaluation
from minigpt4.evaluation.metrics import FAMILIES, java_on_path
from minigpt4.inference.pipeline import PromptRules
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.processors import Uint8Image

SCORERS = {"BLEU": "bleu.bleu:Bleu", "CIDEr": "cider.cider:Cider", "ROUGE-L": "rouge.rouge:Rouge"}
"""Classes of pycocoevalcap by what `--metrics` calls them."""
RESULT = "plain.json"


class StopStrings(StoppingCriteria):
    """Ends an answer whose text contains a stop string; it decodes all of the answer each time."""

    def __init__(self, stop: list[str], tokenizer: Any) -> None:
        self.stop, self.tokenizer = stop, tokenizer

    def __call__(self, input_ids: Tensor, scores: object, **kwargs) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids.tolist())
        return torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=input_ids.device)


@torch.inference_mode()
def caption(model: MiniGPT4, image: Uint8Image, rules: PromptRules) -> str:
    """What the model says about one image, (3, S, S)."""
    decoding, tokenizer = rules.decoding, model.llama_tokenizer
    embeds_BQD, _ = model.encode_img(image.normalised()[None].to(model.device))
    embeds_BTD, mask_BT = model.prompt_embeds([rules.prompt], [[embeds_BQD]])
    with all_logits(model.llama_model):
        ids_BL = model.llama_model.generate(
            inputs_embeds=embeds_BTD,
            attention_mask=mask_BT,
            num_beams=decoding.num_beams,
            max_new_tokens=decoding.max_new_tokens,
            repetition_penalty=decoding.repetition_penalty,
            length_penalty=decoding.length_penalty,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([StopStrings(rules.stop, tokenizer)]),
        )
    return clean_generated(tokenizer.decode(ids_BL[0], skip_special_tokens=True), rules.stop)


def scores(captions: dict[str, str], references: dict[str, list[str]], families: list[str]) -> dict[str, float]:
    """Corpus scores by pycocoevalcap alone."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    found: dict[str, float] = {}
    with java_on_path():
        words = PTBTokenizer().tokenize({key: [{"caption": text} for text in own] for key, own in references.items()})
        said = PTBTokenizer().tokenize({key: [{"caption": text}] for key, text in captions.items()})
    for family in [name for name in SCORERS if name in families]:
        module, name = SCORERS[family].split(":")
        corpus, _ = getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)().compute_score(words, said)
        values = corpus if isinstance(corpus, list) else [corpus]
        found.update(zip(FAMILIES[family], map(float, values), strict=True))
    return found


def evaluate(args: argparse.Namespace) -> None:
    """Load, caption, score, write; ConfigError for what transformers 5 and our loop do differently by intention."""
    cfg = for_evaluation(Config(args).validate(training=False))
    rules, data = PromptRules.of(cfg), read_data(cfg)
    if rules.decoding.do_sample or rules.decoding.min_length > 1:
        raise ConfigError(f"{cfg.source}: run.generation: the plain way knows no do_sample and no min_length above 1")
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.run.device != "cpu" else "cpu")
    model = registry.get_model_class(cfg.model.arch).from_config(cfg.model, device=device).eval()
    model.load_checkpoint(args.ckpt)
    said = {item.image_id: caption(model, data.image(number), rules) for number, item in enumerate(data.items)}
    references = {key: [" ".join(text.split()) for text in own] for key, own in data.references("joined").items()}
    found = scores(said, references, args.metrics)
    args.save.mkdir(parents=True, exist_ok=True)
    (args.save / RESULT).write_text(json.dumps({"captions": said, "scores": found}), encoding="utf-8")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser_of(__doc__)
    parser.add_argument("--cfg-path", required=True, help="YAML file of the evaluation")
    parser.add_argument("--ckpt", required=True, type=Path, help="the checkpoint")
    parser.add_argument("--save", required=True, type=Path, help=f"folder for {RESULT}")
    parser.add_argument("--metrics", nargs="+", choices=SCORERS, default=list(SCORERS))
    parser.add_argument("--options", nargs="*", metavar="KEY=VALUE", help="values over the file's")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    return exit_status(lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())

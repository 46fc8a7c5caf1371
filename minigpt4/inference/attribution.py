"""Where the model looks: the patches of an image behind a word of an answer, and the nearest word of an image token.

    look = pipeline("eval_configs/mini_eval.yaml").look("scene.jpg")
    look.maps["attention"][look.words.index("owl")]      # (h, w) float32
    look.save("look.html")

`gradient` is gradient times feature: what each patch adds, to first order, to the log-probability of the word; negative
where it speaks against it. `attention` is attention times its gradient, where positive (Chefer et al., arXiv
2103.15679, eq. 5): from the word to image tokens, over all layers of the LLM, and from there to patches by the
connector. Both are of the whole word, the sum over its tokens; docs/chat.md says how often they are right.
Shapes: n images, S pixels a side, N vision tokens of width V, h x w of them patches, Q image tokens an image, D
channels of the LLM, W words, K tokens of the answer, T positions.
"""

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from minigpt4.common.errors import SampleError
from minigpt4.common.utils import write_whole
from minigpt4.models import prompting
from minigpt4.models.attention import eager_attention, native_dtype

SHOWN = 224
"""Least side of a picture with a map over it, pixels."""
_WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]+")
_HEAT = (255, 60, 0)
_PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Where does it look?</title>
<style>body {{ font: 15px system-ui, sans-serif; margin: 2em }} figure {{ display: inline-block; margin: 0 1em 1em 0 }}
table {{ border-collapse: collapse }} td {{ border-top: 1px solid #ccc; padding: .2em 1em .2em 0 }}</style>
<h1>Where does it look?</h1><p>{answer}</p>{words}<h2>Nearest words of each image token, with their cosine</h2>
<table>{nearest}</table></html>
"""


class Word(NamedTuple):
    """A word or a run of punctuation of an answer."""

    text: str
    tokens: list[int]
    """Which of the answer's tokens are its own."""


class Trace:
    """One pass over images, prompt and answer that can say afterwards how each word came from the patches.

    It keeps the attention of all layers: of an LLM with L layers and A heads 2 L A T^2 numbers, with their gradients.

    Args:
        model: a `VisionLanguageModel`, in eval mode.
        image_n3SS: the images of the prompt, as its processor gives them.
        prompt: whole, with a placeholder for each image.
        answer: of which words are asked about.

    Attributes:
        words: of the answer, W of them.
        log_probs: (W,) float32, nats: of each word after those before it.
    """

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __init__(self, model: Any, image_n3SS: Tensor, prompt: str, answer: str) -> None:
        self.model, llm = model, model.llama_model
        ids_K = model.prompting.encode([answer])[0]
        self.words = answer_words(model, answer)
        with torch.no_grad():
            model.ensure_vision_loaded()
            tokens_nNV = model.vision_tokens(image_n3SS.to(model.device, copy=True))
        self._tokens_nNV = tokens_nNV.detach().requires_grad_()
        self._read: list[Tensor] = []
        self.embeds_nQD = model.project(model.connect(self._tokens_nNV, self._read))
        (row,), tokens_MD = model.prompt_rows([prompt], [self.embeds_nQD])
        self._from = torch.arange(len(row) - 1, len(row) - 1 + len(ids_K))  # each position predicts the next token
        batch = prompting.collate_prompts([row.add_text(ids_K)], model.llama_tokenizer.pad_token_id)
        self._image_at = batch.image_at[1]
        batch = batch.to(model.device)
        with native_dtype(llm), eager_attention(llm):
            output = llm(
                inputs_embeds=prompting.embed(batch, llm.get_input_embeddings(), tokens_MD),
                attention_mask=batch.attention_mask_BT,
                use_cache=False,
                output_attentions=True,
                logits_to_keep=self._from.to(model.device),
            )
        self._attentions = output.attentions
        targets_K = torch.tensor(ids_K, dtype=torch.long, device=model.device)
        self._log_probs_K = -nn.functional.cross_entropy(output.logits[0].float(), targets_K, reduction="none")
        own = [self._log_probs_K[word.tokens].sum().item() for word in self.words]
        self.log_probs = np.array(own, dtype=np.float32)

    @torch.inference_mode(False)
    def maps(self, words: Sequence[int]) -> dict[str, np.ndarray]:
        """By method a map (n, h, w) float32 for each image, of some of the words together, by their numbers."""
        tokens_K = [token for word in words for token in self.words[word].tokens]
        read = [own for own in self._read if own.requires_grad]
        traced = [self._tokens_nNV, *self._attentions, *read]
        score = self._log_probs_K[tokens_K].sum()
        gradient_nNV, *of_attentions = torch.autograd.grad(score, traced, retain_graph=True)
        rows, columns = self._from[tokens_K], self._image_at
        pairs = list(zip(traced[1:], of_attentions, strict=True))
        layers = len(self._attentions)
        own = [_relevance(*(one[0][:, rows][..., columns] for one in pair)).mean(0).sum(0) for pair in pairs[:layers]]
        reached_nQ = torch.stack(own).sum(0).view(self.embeds_nQD.shape[:2])
        learned = [_relevance(*pair).mean(1) for pair in pairs[layers:]]
        from_nQN = sum(learned or [shares.mean(1) for shares in self._read])
        by_method = {
            "gradient": (gradient_nNV * self._tokens_nNV).sum(-1),
            "attention": (reached_nQ[:, None] @ from_nQN)[:, 0],
        }
        return {name: self._grid(map_nN.detach()) for name, map_nN in by_method.items()}

    def _grid(self, map_nN: Tensor) -> np.ndarray:
        patches_nP = map_nN[:, self.model.visual_encoder.num_prefix_tokens :]
        side = math.isqrt(patches_nP.shape[1])  # images are squares
        return patches_nP.float().cpu().view(-1, side, side).numpy()


def _relevance(attention: Tensor, gradient: Tensor) -> Tensor:
    return (attention.detach().float() * gradient.float()).clamp(min=0)


def answer_words(model: Any, answer: str) -> list[Word]:
    """The words of an answer; a token belongs to the one that it begins in or before, and words may share one.

    SampleError for more than the LLM's context.
    """
    decode, (ids_K,) = model.llama_tokenizer.decode, model.prompting.encode([answer])
    if len(ids_K) > model.context_length:
        raise SampleError(
            f"the answer has {len(ids_K):,} tokens, but this LLM reads {model.context_length:,} positions"
        )
    text = decode(ids_K)
    starts = [len(decode(ids_K[:token]).rstrip("\N{REPLACEMENT CHARACTER}")) for token in range(len(ids_K))]
    words: list[tuple[int, Word]] = []
    for match in _WORD.finditer(text):
        own = [token for token, start in enumerate(starts) if start < match.end()]
        first, word = words[-1] if words else (match.start(), Word("", []))
        if new := own[sum(len(known.tokens) for _, known in words) :]:
            words.append((match.start(), Word(match.group(), new)))
        else:  # it has no token of its own
            words[-1:] = [(first, Word(text[first : match.end()], word.tokens))]
    return [word for _, word in words]


@torch.no_grad()
def nearest_words(model: Any, embeds_QD: Tensor, count: int = 3) -> list[list[tuple[str, float]]]:
    """What each image token is nearest to in the vocabulary: `count` tokens of it with their cosines, nearest first."""
    table_VD = model.llama_model.get_input_embeddings().weight[: len(model.llama_tokenizer)]
    units_QD, units_VD = (nn.functional.normalize(rows.float(), dim=-1) for rows in (embeds_QD, table_VD))
    cosines_QV = units_QD @ units_VD.T
    top = cosines_QV.topk(count)
    names = [[model.llama_tokenizer.decode([token]).strip() for token in row] for row in top.indices.tolist()]
    return [list(zip(*pair, strict=True)) for pair in zip(names, top.values.tolist(), strict=True)]


class Look(NamedTuple):
    """What `Pipeline.look` found."""

    answer: str
    words: list[str]
    log_probs: np.ndarray
    """(W,) float32, nats."""
    maps: dict[str, np.ndarray]
    """By method (W, h, w) float32."""
    nearest: list[list[tuple[str, float]]]
    """Of each image token the nearest tokens of the vocabulary, with their cosines."""
    picture: Image.Image
    """The image as the model reads it, in grey: a square, which the maps divide evenly."""

    def overlay(self, method: str, word: int) -> Image.Image:
        """The picture with the map of a word, by its number, over it; `.save("look.png")` writes it."""
        return overlay(self.picture, self.maps[method][word])

    def save(self, path: str | Path) -> None:
        """Write all of it as one HTML page."""
        words = [figures(text, [(m, self.overlay(m, n)) for m in self.maps]) for n, text in enumerate(self.words)]
        cells = [[f"{text} {cosine:.2f}" for text, cosine in row] for row in self.nearest]
        lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in [str(n), *row]) for n, row in enumerate(cells)]
        rows = "".join(f"<tr>{line}</tr>" for line in lines)
        write_whole(Path(path), _PAGE.format(answer=html.escape(self.answer), words="".join(words), nearest=rows))


def grey(pixels_3SS: Tensor) -> Image.Image:
    """Normalised pixels as a picture, without mean and std."""
    grey_SS = pixels_3SS.float().mean(0)
    low, high = grey_SS.aminmax()
    levels = (grey_SS - low) / (high - low).clamp(min=1e-6) * 255
    return Image.fromarray(levels.round().to(torch.uint8).numpy()).convert("RGB")


def overlay(picture: Image.Image, map_hw: np.ndarray) -> Image.Image:
    """The picture, and over it what of the map is positive, relative to its maximum."""
    zoom = math.ceil(SHOWN / picture.width)
    size = (picture.width * zoom, picture.height * zoom)
    heat = map_hw.clip(min=0)
    heat = Image.fromarray((heat / max(heat.max(), 1e-30)).astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    mask = Image.fromarray((np.asarray(heat).clip(0, 1) * 200).astype(np.uint8))
    return Image.composite(Image.new("RGB", size, _HEAT), picture.resize(size, Image.Resampling.BICUBIC), mask)


def figures(word: str, pictures: Iterable[tuple[str, Image.Image]]) -> str:
    """HTML of a word, with pictures and what stands below each."""
    parts = []
    for caption, picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append(f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
    return f"<h3>{html.escape(word)}</h3><div>{''.join(parts)}</div>"

"""The published module: its templates, its stopping criterion and its `Chat`, for code that is written against it.

New code talks through `conversation.chat.Chat`, which keeps conversation and images itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from minigpt4.conversation.decoding import PUBLISHED_CHAT, Decoding, TextStream, clean_answer
from minigpt4.conversation.templates import (
    CONV_VISION_LLama2,
    CONV_VISION_minigptv2,
    CONV_VISION_Vicuna0,
    Conversation,
    SeparatorStyle,
    Turns,
)
from minigpt4.models.batch_decoder import BatchDecoder, GenerationState
from minigpt4.models.beam_search import BeamSearch
from minigpt4.models.generation import StopOnText
from minigpt4.processors import process_image

__all__ = [
    "CONV_VISION_LLama2",
    "CONV_VISION_Vicuna0",
    "CONV_VISION_minigptv2",
    "Chat",
    "Conversation",
    "SeparatorStyle",
    "StoppingCriteriaList",
    "StoppingCriteriaSub",
]


class StoppingCriteriaSub(StoppingCriteria):
    """Ends an output whose last ids are those of one of `stops`, 1-D tensors; `encounters` has no effect, as published.

    Returns (B,) bool for `input_ids` (B, L).
    """

    def __init__(self, stops: Sequence[Tensor] = (), encounters: int = 1) -> None:
        self.stops, self.encounters = list(stops), encounters

    def __call__(self, input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:
        done_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for stop in (stop for stop in self.stops if len(stop) <= input_ids.shape[1]):
            done_B |= (input_ids[:, -len(stop) :] == stop.to(input_ids.device)).all(dim=1)
        return done_B


class Chat:
    """Conversation and list of images are the caller's; each method changes them in place.

    Args:
        model: a `MiniGPT4`.
        vis_processor: PIL image -> (3, S, S).
        device: kept as it is given; tensors go to where the model is.
        stopping_criteria: ends of an answer; None: what ends one in the conversation's template.
    """

    def __init__(
        self,
        model: Any,
        vis_processor: Any,
        device: torch.device | str | int = "cuda:0",
        stopping_criteria: StoppingCriteriaList | None = None,
    ) -> None:
        self.model, self.vis_processor, self.device = model, vis_processor, device
        self.stopping_criteria = stopping_criteria

    def upload_img(self, image: str | Path | Image.Image | Tensor, conv: Turns, img_list: list[Any]) -> str:
        """Show an image: a path, a PIL image, or pixels (3, S, S) or (1, 3, S, S); the next question joins it."""
        conv.add_image()
        img_list.append(image)
        return "Received."

    def encode_img(self, img_list: list[Any]) -> None:
        """Put embeddings (1, Q, D) in the place of the images that have none yet; SampleError for a broken image."""
        for place, image in enumerate(img_list):
            if not isinstance(image, Tensor):
                image = process_image(self.vis_processor, image)
            if image.ndim == 4 or len(image) == 3:
                img_list[place] = self.model.encode_img(image.view(-1, *image.shape[-3:]))[0]

    def ask(self, text: str, conv: Turns) -> None:
        """The user's question, joined to an image that was just shown; it may hold placeholders of its own."""
        conv.append_question(text)

    def get_context_emb(self, conv: Turns, img_list: Sequence[Tensor]) -> Tensor:
        """Embeddings (1, T, D) of the conversation as it stands."""
        return self.model.get_context_emb(conv.get_prompt(), img_list)

    def answer_prepare(
        self, conv: Turns, img_list: Sequence[Tensor], *, max_length: int = 2000, **decoding: Any
    ) -> dict[str, Any]:
        """Leave the next turn to the assistant; the arguments of `model_generate` for it.

        Args:
            max_length: positions of prompt and answer together; the first ones of a longer prompt are cut off.
            decoding: fields of `Decoding`; others are those of the published demo, which samples.
        """
        conv.open_answer()
        settings = replace(PUBLISHED_CHAT, **decoding)
        embeds_1TD = self.get_context_emb(conv, img_list)
        embeds_1TD = embeds_1TD[:, max(0, embeds_1TD.shape[1] + settings.max_new_tokens - max_length) :]
        criteria = self.stopping_criteria
        if criteria is None and conv.answer_end:
            criteria = StoppingCriteriaList([StopOnText([conv.answer_end], self.model.llama_tokenizer)])
        return {"inputs_embeds": embeds_1TD, "stopping_criteria": criteria, **asdict(settings)}

    def answer(self, conv: Turns, img_list: Sequence[Tensor], **kargs: Any) -> tuple[str, np.ndarray]:
        """The answer, which becomes part of the conversation, and its ids (1 + L,); `kargs`: see `answer_prepare`."""
        ids_L = self.model_generate(**self.answer_prepare(conv, img_list, **kargs))[0]
        text = clean_answer(self._decode(ids_L), conv.answer_end, conv.answer_start)
        conv.fill_answer(text)
        return text, ids_L.cpu().numpy()

    def stream_answer(self, conv: Turns, img_list: Sequence[Tensor], **kargs: Any) -> Iterator[str]:
        """Pieces of the answer, which leave the conversation to the caller; `kargs`: see `answer_prepare`."""
        generation = self.answer_prepare(conv, img_list, **kargs)
        return self._pieces(TextStream([conv.answer_end], conv.answer_start), generation)

    def model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Ids (1, 1 + L) for what `answer_prepare` returned: bos, the answer, its end token if it ended by one."""
        *_, ids = self._steps(*args, **kwargs)
        return torch.tensor([ids], device=self.model.device)

    def _pieces(self, stream: TextStream, generation: dict[str, Any]) -> Iterator[str]:
        text = ""
        for ids in self._steps(**generation):
            text = self._decode(ids)
            yield stream.feed(text)
        yield stream.finish(text)

    def _decode(self, ids: Sequence[int] | Tensor) -> str:
        return self.model.llama_tokenizer.decode(ids, skip_special_tokens=True)

    def _steps(
        self, inputs_embeds: Tensor, stopping_criteria: StoppingCriteriaList | None = None, **decoding: Any
    ) -> Iterator[list[int]]:
        """The ids so far after each token; of several beams only the best, at their end."""
        llm, tokenizer, settings = self.model.llama_model, self.model.llama_tokenizer, Decoding(**decoding)
        criteria = StoppingCriteriaList(stopping_criteria or [])
        mask_1T = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        if settings.num_beams > 1:
            yield from BeamSearch(llm, settings, criteria, self.model.token_graphs).run(inputs_embeds, mask_1T)
            return
        state, decoder = GenerationState(settings), BatchDecoder(llm, tokenizer, self.model.token_graphs)
        decoder.add([state], inputs_embeds, mask_1T)
        while decoder.rows:
            decoder.step()
            yield state.ids
            if criteria(torch.tensor([state.ids], device=inputs_embeds.device), None).any():
                return

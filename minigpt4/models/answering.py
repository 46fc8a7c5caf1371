"""From prompts and images to answers: the part of the model that speaks.

Shapes: B prompts, S pixels a side, Q image tokens, D channels of the LLM, T positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.errors import SampleError
from minigpt4.conversation import clean_generated
from minigpt4.models import sequence
from minigpt4.models.base_model import native_dtype
from minigpt4.models.generation import Answer, Decoding, cut_at_stop, end_tokens, generate_ids
from minigpt4.models.prompting import ImageFeatures
from minigpt4.models.tokenizer import start_ids


class GenerationMixin:
    """Methods of `MiniGPT4` for inference; they need its LLM, tokenizer, `encode_img` and `_prompt_builder`."""

    def get_context_emb(self, prompt: str, img_list: Sequence[Tensor]) -> Tensor:
        """Embeddings (1, T, D) of a prompt whose n-th `<ImageHere>` stands for `img_list[n]`, (1, Q, D) each.

        Raises SampleError unless there are as many placeholders as images.
        """
        embeds, _ = self.prompt_embeds([prompt], [list(img_list)])
        return embeds

    def prompt_embeds(self, prompts: Sequence[str], images: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        """Left-padded embeddings (B, T, D), zero where padded, and their mask (B, T), from image embeddings."""
        rows, tokens_MD = self._prompt_rows(prompts, images)
        batch = sequence.collate_prompts(rows, self.llama_tokenizer.pad_token_id).to(self.device)
        embeds_BTD = sequence.embed(batch, self.llama_model.get_input_embeddings(), tokens_MD)
        mask_BT = batch.attention_mask_BT
        return embeds_BTD * mask_BT.unsqueeze(-1).to(embeds_BTD.dtype), mask_BT

    def prompt_length(self, prompt: str, image_tokens: Sequence[int]) -> int:
        """Positions that a prompt takes, where its n-th image takes `image_tokens[n]` of them."""
        texts = self._prompt_builder().encode(sequence.split_prompt(prompt))
        return len(start_ids(self.llama_tokenizer)) + sum(map(len, texts)) + sum(image_tokens)

    @property
    def context_length(self) -> int:
        """Positions that prompt and answer may take together."""
        return self.llama_model.config.max_position_embeddings

    def _prompt_rows(
        self, prompts: Sequence[str], images: Sequence[Sequence[Tensor]]
    ) -> tuple[list[sequence.TokenSequence], Tensor | None]:
        """Prompts as rows that begin with bos, and the image tokens (M, D) that go into them."""
        rules, start = self._prompt_builder(), start_ids(self.llama_tokenizer)
        rows, tokens, first = [], [], 0
        for index, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
            spans = []
            for embeds_1QD in own:
                tokens.append(embeds_1QD.flatten(0, -2).to(self.device))
                spans.append((first, tokens[-1].shape[0]))
                first += spans[-1][1]
            try:
                rows.append(sequence.prompt_row(rules.encode(sequence.split_prompt(prompt)), spans, start=start))
            except ValueError as error:
                raise SampleError(f"texts[{index}]: {error}") from error
        return rows, torch.cat(tokens) if tokens else None

    @torch.no_grad()
    def generate(
        self,
        images: Tensor | Sequence[Tensor | None] | None,
        texts: Sequence[str],
        num_beams: int = 1,
        max_new_tokens: int = 20,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        temperature: float = 1.0,
        do_sample: bool = False,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Answers to prompts, one a prompt, decoded together with left padding.

        Args:
            images: (B, 3, S, S), one a prompt; or (B, n, 3, S, S); or a list with a tensor (3, S, S) or
                (n, 3, S, S) or None for each prompt; or features of one image a prompt; or None for text alone.
            texts: whole prompts, `<ImageHere>` where an image belongs.
            min_length: tokens before an answer may end, bos counted as in transformers 4.30.
            stop: strings that end an answer; each row stops by itself and is cut before the string.
            Others: as in transformers' `generate`.
        """
        decoding = Decoding(
            num_beams, max_new_tokens, min_length, top_p, repetition_penalty, length_penalty, temperature, do_sample
        )
        if isinstance(texts, str):
            raise SampleError("texts: must be a list of prompts, one an image; put a single one in brackets")
        if not texts:
            return []
        return self.generate_from_embeds(self._image_lists(images, len(texts)), texts, decoding, stop)

    def generate_from_embeds(
        self,
        images: Sequence[Sequence[Tensor]],
        texts: Sequence[str],
        decoding: Decoding,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """`generate` where the images are encoded already: the embeddings (1, Q, D) of each prompt's images."""
        return [answer.text for answer in self.answers_from_embeds(images, texts, decoding, stop)]

    @torch.no_grad()
    def answers_from_embeds(
        self,
        images: Sequence[Sequence[Tensor]],
        texts: Sequence[str],
        decoding: Decoding,
        stop: Sequence[str] = (),
    ) -> list[Answer]:
        """`generate_from_embeds` that also tells whether each answer was ended or cut."""
        stop = [stop] if isinstance(stop, str) else list(stop)
        embeds_BTD, mask_BT = self.prompt_embeds(texts, images)
        ids_BL = generate_ids(self.llama_model, self.llama_tokenizer, embeds_BTD, mask_BT, decoding, stop)
        rows, tokenizer = ids_BL.tolist(), self.llama_tokenizer
        ends = set(end_tokens(self.llama_model))
        whole = tokenizer.batch_decode(rows)  # a stop string may be a special token
        ended = [
            not ends.isdisjoint(row[1:]) or any(s in text for s in stop) for row, text in zip(rows, whole, strict=True)
        ]
        decoded = tokenizer.batch_decode(rows, skip_special_tokens=True)
        texts = [clean_generated(cut_at_stop(text, stop)) for text in decoded]
        return [Answer(*answer) for answer in zip(texts, ended, strict=True)]

    @torch.no_grad()
    def log_likelihoods(
        self,
        images: Tensor | Sequence[Tensor | None] | None,
        texts: Sequence[str],
        answers: Sequence[str],
    ) -> list[tuple[float, bool]]:
        """How likely an answer to each prompt is, nats summed over its tokens, and whether it is the greedy one.

        Prompt and answer become tokens by themselves, as in training; no end symbol is added.

        Args:
            images, texts: as in `generate`.
            answers: one a prompt; an empty one has probability 1.
        """
        if not texts:
            return []
        rows, tokens_MD = self._prompt_rows(texts, self._image_lists(images, len(texts)))
        wanted = [sequence.TokenSequence().add_text(ids, train=True) for ids in self._prompt_builder().encode(answers)]
        batch = sequence.collate_training(rows, wanted, [], self.llama_tokenizer.pad_token_id)
        columns_K = sequence.target_columns(batch)
        if not len(columns_K):
            return [(0.0, True)] * len(texts)
        batch, columns_K = batch.to(self.device), columns_K.to(self.device)
        with native_dtype(self.llama_model):
            logits_BKV = self.llama_model(
                inputs_embeds=sequence.embed(batch, self.llama_model.get_input_embeddings(), tokens_MD),
                attention_mask=batch.attention_mask_BT,
                use_cache=False,
                logits_to_keep=columns_K,
            ).logits.float()
        targets_BK = batch.targets_BT[:, columns_K + 1]
        losses_BK = nn.functional.cross_entropy(logits_BKV.transpose(1, 2), targets_BK, reduction="none")
        greedy_BK = (logits_BKV.argmax(dim=-1) == targets_BK) | (targets_BK == sequence.IGNORE)
        return list(zip((-losses_BK.sum(dim=1)).tolist(), greedy_BK.all(dim=1).tolist(), strict=True))

    def _image_lists(self, images: Any, count: int) -> list[list[Tensor]]:
        """Image embeddings (1, Q, D) of each prompt; all images are encoded in one batch."""
        if images is None:
            return [[] for _ in range(count)]
        if len(images) != count:
            shape = f" (shape {tuple(images.shape)})" if isinstance(images, Tensor) else ""
            raise SampleError(f"images: {len(images)} entries{shape} for {count} texts")
        if isinstance(images, ImageFeatures):
            return [[embeds_1QD] for embeds_1QD in self.encode_img(images)[0].split(1)]
        own = [_as_stack(image) for image in images]
        pixels = [stack for stack in own if stack is not None]
        if not pixels:
            return [[] for _ in range(count)]
        embeds = iter(self.encode_img(torch.cat(pixels))[0])
        return [[next(embeds)[None] for _ in range(0 if stack is None else len(stack))] for stack in own]

    @torch.no_grad()
    def multi_select(
        self,
        images: Tensor,
        texts: Sequence[str],
        answers: Sequence[Sequence[str]],
        num_cand: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Candidate answers of each prompt from most to least likely, as indices.

        Args:
            images: (B, 3, S, S).
            texts: B prompts.
            answers: candidates, `answers[c][b]` is number c for prompt b.
            num_cand: how many candidates of each prompt count; the others are ranked last.

        A candidate's score is its summed loss over the padded length of the batch (`reduction="none"`).
        """
        columns = []
        for candidates in answers:
            samples = {"image": images, "instruction_input": list(texts), "answer": list(candidates)}
            columns.append(self(samples, reduction="none")["loss"].float())
        losses_BC = torch.stack(columns, dim=1)
        if num_cand is not None:
            for row, count in zip(losses_BC, num_cand, strict=True):
                row[count:] = float("inf")
        return losses_BC.argsort(dim=1, stable=True).tolist()


def _as_stack(image: Tensor | None) -> Tensor | None:
    if image is None or image.ndim == 4:
        return image
    return image.unsqueeze(0)

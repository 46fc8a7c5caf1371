"""Text from prompt embeddings with the counts of transformers 4.30, on which MiniGPT-4's published decoding ran.

There an output starts with a bos token that counts for `min_length`, for the repetition penalty and in the length of a
beam. One beam goes through batch_decoder.py, several through beam_search.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.conversation.decoding import Answer, Decoding, clean_generated
from minigpt4.models import prompting
from minigpt4.models.attention import is_batch_invariant, native_dtype
from minigpt4.models.batch_decoder import BatchDecoder, GenerationState, prompts_apart, stopped
from minigpt4.models.beam_search import BeamSearch
from minigpt4.models.cuda_graph import CudaGraphs
from minigpt4.models.llm import end_tokens
from minigpt4.models.prompting import ImageFeatures


def check_stop(stop: Sequence[str]) -> list[str]:
    """The stop strings; ConfigError for an empty one."""
    if not all(stop):
        raise ConfigError("stop: an empty string would end every answer at once; leave it out")
    return list(stop)


class StopOnText(StoppingCriteria):
    """Ends a row, and that row alone, as soon as its own output contains one of the stop strings."""

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.stop, self.tokenizer = check_stop(stop), tokenizer

    def __call__(self, input_ids: Tensor, scores: object, **kwargs) -> Tensor:
        done = stopped(self.tokenizer, input_ids.tolist(), [self.stop] * len(input_ids))
        return torch.tensor(done, device=input_ids.device)


@torch.no_grad()
def generate_ids(
    llm: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    embeds_BTD: Tensor,
    attention_mask_BT: Tensor,
    decoding: Decoding,
    stop: Sequence[str] = (),
    graphs: CudaGraphs | None = None,
) -> Tensor:
    """Output ids (B, 1 + L), L at most `max_new_tokens`: bos, the answer, its end token, then filling.

    `embeds_BTD` is padded on the left with mask 0; position ids follow the mask. `graphs`: of `BatchDecoder`.
    """
    stop = check_stop(stop)
    if decoding.num_beams > 1:
        search = BeamSearch(llm, decoding, [StopOnText(stop, tokenizer)], graphs)
        rows = [ids for prompts in prompts_apart(llm, embeds_BTD, attention_mask_BT) for ids in search.run(*prompts)]
    else:
        decoder = BatchDecoder(llm, tokenizer, graphs)
        states = [GenerationState(decoding, stop) for _ in embeds_BTD]
        joined = 0
        while decoder.rows or joined < len(states):
            joining = slice(joined, joined + decoder.room)
            if states[joining]:
                decoder.add(states[joining], embeds_BTD[joining], attention_mask_BT[joining])
            joined = joining.stop
            decoder.step()
        rows = [state.ids for state in states]
    fill = llm.generation_config.pad_token_id
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill).to(embeds_BTD.device)


class GenerationMixin:
    """Methods of `MiniGPT4` for inference; they need its LLM, tokenizer, `encode_img` and `prompting`."""

    @property
    def token_graphs(self) -> CudaGraphs | None:
        """What a `BatchDecoder` of this model captures its passes by; None on a CPU, or without `llm_cuda_graph`."""
        return self._token_graphs if self.device.type == "cuda" else None

    def get_context_emb(self, prompt: str, img_list: Sequence[Tensor]) -> Tensor:
        """Embeddings (1, T, D) of a prompt whose n-th `<ImageHere>` stands for `img_list[n]`, (1, Q, D) each."""
        return self.prompt_embeds([prompt], [img_list])[0]

    def prompt_embeds(self, prompts: Sequence[str], images: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        """Left-padded embeddings (B, T, D), zero where padded, and their mask (B, T), from image embeddings.

        Raises SampleError unless a prompt has as many placeholders as images.
        """
        rows, tokens_MD = self.prompt_rows(prompts, images)
        batch = prompting.collate_prompts(rows, self.llama_tokenizer.pad_token_id).to(self.device)
        embeds_BTD = prompting.embed(batch, self.llama_model.get_input_embeddings(), tokens_MD)
        mask_BT = batch.attention_mask_BT
        return embeds_BTD * mask_BT.unsqueeze(-1).to(embeds_BTD.dtype), mask_BT

    def prompt_length(self, prompt: str, image_tokens: Sequence[int]) -> int:
        """Positions that a prompt takes, where its n-th image takes `image_tokens[n]` of them."""
        texts = self.prompting.encode(self.prompting.split_images(prompt))
        return len(self.prompting.start) + sum(map(len, texts)) + sum(image_tokens)

    @property
    def context_length(self) -> int:
        """Positions that prompt and answer may take together."""
        return self.llama_model.config.max_position_embeddings

    def prompt_rows(
        self, prompts: Sequence[str], images: Sequence[Sequence[Tensor]]
    ) -> tuple[list[prompting.TokenSequence], Tensor | None]:
        """Prompts as rows that begin with bos, and the image tokens (M, D) that go into them."""
        tokens, spans, first = [], [], 0
        for own in images:
            spans.append([])
            for embeds_1QD in own:
                tokens.append(embeds_1QD.flatten(0, -2).to(self.device))
                spans[-1].append((first, len(tokens[-1])))
                first += len(tokens[-1])
        rows = self.prompting.prompt_rows(prompts, spans, "texts[{}]".format, self.prompting.start)
        return rows, torch.cat(tokens) if tokens else None

    @torch.no_grad()
    def generate(
        self,
        images: Tensor | Sequence[Tensor | None] | None,
        texts: Sequence[str],
        stop: Sequence[str] = (),
        **decoding: Any,
    ) -> list[str]:
        """Answers to whole prompts, decoded together, `<ImageHere>` (or `<image>` for LLaVA) where an image belongs.

        `images`: (B, 3, S, S), one a prompt; or (B, n, 3, S, S); or a list with a tensor (3, S, S) or (n, 3, S, S) or
        None for each prompt; or features of one image a prompt; or None for text alone. `stop`: strings that end an
        answer, which is cut before them. `decoding`: fields of `Decoding`, as in transformers' `generate`.
        """
        if isinstance(texts, str):
            raise SampleError("texts: must be a list of prompts, one an image; put a single one in brackets")
        if not texts:
            return []
        answers = self.answers_from_embeds(self._image_lists(images, len(texts)), texts, Decoding(**decoding), stop)
        return [answer.text for answer in answers]

    @torch.no_grad()
    def answers_from_embeds(
        self, images: Sequence[Sequence[Tensor]], texts: Sequence[str], decoding: Decoding, stop: Sequence[str] = ()
    ) -> list[Answer]:
        """`generate` from the embeddings (1, Q, D) of each prompt's images, and whether answers were ended or cut."""
        stop, tokenizer = [stop] if isinstance(stop, str) else list(stop), self.llama_tokenizer
        prompts = self.prompt_embeds(texts, images)
        rows = generate_ids(self.llama_model, tokenizer, *prompts, decoding, stop, self.token_graphs).tolist()
        ends, answers = set(end_tokens(self.llama_model)), []
        for row in rows:
            whole = tokenizer.decode(row)  # a stop string may be a special token
            text = clean_generated(tokenizer.decode(row, skip_special_tokens=True), stop)
            answers.append(Answer(text, not ends.isdisjoint(row[1:]) or any(s in whole for s in stop)))
        return answers

    @torch.no_grad()
    def log_likelihoods(
        self, images: Tensor | Sequence[Tensor | None] | None, texts: Sequence[str], answers: Sequence[str]
    ) -> list[tuple[float, bool]]:
        """How likely an answer to each prompt is, nats summed over its tokens, and whether it is the greedy one.

        `images` and `texts`: as in `generate`. Prompt and answer become tokens by themselves, as in training; no end
        symbol is added, and an empty answer has probability 1.
        """
        if not texts:
            return []
        if is_batch_invariant(self.llama_model) and len(texts) > 1:
            own = [images if images is None else images[n : n + 1] for n in range(len(texts))]
            return [self.log_likelihoods(*one)[0] for one in zip(own, zip(texts), zip(answers), strict=True)]
        losses_BK, is_target_BK, greedy_BK = self._token_losses(self._image_lists(images, len(texts)), texts, answers)
        is_greedy_B = (greedy_BK | ~is_target_BK).all(dim=1)
        return list(zip((-losses_BK.sum(dim=1)).tolist(), is_greedy_B.tolist(), strict=True))

    @torch.no_grad()
    def choice_losses(self, images: Sequence[Tensor], text: str, choices: Sequence[str]) -> list[list[float]]:
        """The loss, in nats, of every token of each choice as the answer to a prompt, that of the end symbol last.

        `images`: embeddings (1, Q, D) each. A choice goes through the LLM by itself, so that its losses, to the bit, do
        not depend on the others.
        """
        found = []
        for choice in choices:
            losses_1K, is_target_1K, _ = self._token_losses([images], [text], [choice + self.end_sym])
            found.append(losses_1K[is_target_1K].tolist())
        return found

    def _token_losses(
        self, images: Sequence[Sequence[Tensor]], texts: Sequence[str], answers: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the K positions that have a target in some row, (B, K) each: loss, whether it is a target of the row, and
        whether greedy decoding gives it."""
        rows, tokens_MD = self.prompt_rows(texts, images)
        wanted = [prompting.TokenSequence().add_text(ids, train=True) for ids in self.prompting.encode(answers)]
        batch = prompting.collate_training(rows, wanted, [], self.llama_tokenizer.pad_token_id)
        columns_K = prompting.target_positions(batch)[1].unique()
        if not len(columns_K):
            none = torch.zeros(len(texts), 0)
            return none, none.bool(), none.bool()
        batch, columns_K = batch.to(self.device), columns_K.to(self.device)
        with native_dtype(self.llama_model):
            logits_BKV = self.llama_model(
                inputs_embeds=prompting.embed(batch, self.llama_model.get_input_embeddings(), tokens_MD),
                attention_mask=batch.attention_mask_BT,
                use_cache=False,
                logits_to_keep=columns_K,
            ).logits.float()
        targets_BK = batch.targets_BT[:, columns_K + 1]
        losses_BK = nn.functional.cross_entropy(logits_BKV.transpose(1, 2), targets_BK, reduction="none")
        return losses_BK, targets_BK != prompting.IGNORE, logits_BKV.argmax(dim=-1) == targets_BK

    def _image_lists(self, images: Any, count: int) -> list[list[Tensor]]:
        """Image embeddings (1, Q, D) of each prompt; all images are encoded in one batch."""
        if images is None:
            return [[] for _ in range(count)]
        if len(images) != count:
            shape = f" (shape {tuple(images.shape)})" if isinstance(images, Tensor) else ""
            raise SampleError(f"images: {len(images)} entries{shape} for {count} texts")
        if isinstance(images, ImageFeatures):
            return [[embeds_1QD] for embeds_1QD in self.encode_img(images)[0].split(1)]
        own = [() if image is None else image.reshape(-1, *image.shape[-3:]) for image in images]
        pixels = [stack for stack in own if len(stack)]
        embeds = iter(self.encode_img(torch.cat(pixels))[0] if pixels else ())
        return [[next(embeds)[None] for _ in stack] for stack in own]

    @torch.no_grad()
    def multi_select(
        self,
        images: Tensor,
        texts: Sequence[str],
        answers: Sequence[Sequence[str]],
        num_cand: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Candidate answers of each prompt from most to least likely, as indices; `answers[c][b]` is number c of prompt
        b. `num_cand`: how many of each prompt count; the others are ranked last.

        A candidate's score is its summed loss over the padded length of the batch (`reduction="none"`).
        """
        if is_batch_invariant(self.llama_model) and len(texts) > 1:
            own = [(images[n : n + 1], texts[n : n + 1], [c[n : n + 1] for c in answers]) for n in range(len(texts))]
            counts = [None] * len(own) if num_cand is None else [[count] for count in num_cand]
            return [self.multi_select(*one, count)[0] for one, count in zip(own, counts, strict=True)]
        columns = []
        for candidates in answers:
            samples = {"image": images, "instruction_input": list(texts), "answer": list(candidates)}
            columns.append(self(samples, reduction="none")["loss"].float())
        losses_BC = torch.stack(columns, dim=1)
        if num_cand is not None:
            for row, count in zip(losses_BC, num_cand, strict=True):
                row[count:] = float("inf")
        return losses_BC.argsort(dim=1, stable=True).tolist()

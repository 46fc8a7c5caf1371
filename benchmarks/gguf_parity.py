"""llama.cpp on the files of `--format gguf`, against ours: token ids, image embeddings, and the likeliest next tokens.

    pip install llama-cpp-python  # compiles llama.cpp
    python benchmarks/gguf_parity.py RUN --images FOLDER --limit 5 --options model.llm_precision=fp32
Each image is asked about once; ours answers, and both read prompt, image and answer.
"""

import argparse
import ctypes
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from minigpt4 import export
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER
from minigpt4.inference.image_list import find_images
from minigpt4.inference.pipeline import Pipeline, PromptRules
from minigpt4.models.generation import generate_ids
from minigpt4.models.gguf_layout import LANGUAGE_MODEL, PROJECTOR
from minigpt4.models.transformers_layout import IMAGE_TOKEN
from minigpt4.processors import open_image


class Read(NamedTuple):
    """A prompt with one image as a program read it: T positions, Q of the image."""

    ids: list[int]
    """T, -1 for the image."""
    image_QE: np.ndarray
    best_T: np.ndarray
    """Ids of the likeliest next tokens."""


class LlamaCpp:
    """llama.cpp with the two files of a folder, on the CPU, through the C functions of llama-cpp-python."""

    def __init__(self, folder: Path, positions: int) -> None:
        from llama_cpp import Llama, mtmd_cpp

        self.mtmd = mtmd_cpp
        threads = torch.get_num_threads()  # ggml's wait for each other busily
        sizes = {"n_ctx": positions, "n_batch": positions, "n_ubatch": positions}
        sizes |= {"n_threads": threads, "n_threads_batch": threads}
        self.llama = Llama(str(folder / LANGUAGE_MODEL), logits_all=True, verbose=False, n_gpu_layers=0, **sizes)
        how = mtmd_cpp.mtmd_context_params_default()
        how.use_gpu, how.print_timings, how.warmup, how.n_threads = False, False, False, threads
        self.vision = mtmd_cpp.mtmd_init_from_file(str(folder / PROJECTOR).encode(), self.llama.model, how)
        if self.vision is None:
            raise RuntimeError(f"llama.cpp does not read {folder / PROJECTOR}")

    def read(self, prompt: str, image: Image.Image) -> Read:
        """`prompt` with `<ImageHere>` where the image stands."""
        import llama_cpp

        context, width = self.llama.ctx, self.llama.n_embd()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        ids, images, best = [], [], []
        for tokens, embeds_NE in self._parts(prompt, image):
            count = len(tokens)
            batch = llama_cpp.llama_batch_init(count, 0 if embeds_NE is None else width, 1)
            batch.n_tokens = count
            for place, token in enumerate(tokens):
                batch.pos[place], batch.n_seq_id[place], batch.logits[place] = len(ids) + place, 1, 1
                batch.seq_id[place][0] = 0
                if embeds_NE is None:
                    batch.token[place] = token
            if embeds_NE is not None:
                ctypes.memmove(batch.embd, embeds_NE.ctypes.data, embeds_NE.nbytes)
                images.append(embeds_NE)
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            logits = llama_cpp.llama_get_logits(context)
            best.append(np.ctypeslib.as_array(logits, (count, self.llama.n_vocab())).argmax(axis=1))
            llama_cpp.llama_batch_free(batch)
            ids += tokens
        return Read(ids, np.concatenate(images), np.concatenate(best))

    def _parts(self, prompt: str, image: Image.Image) -> Iterator[tuple[list[int], np.ndarray | None]]:
        """Ids of text, or -1 for each embedding (N, E) of an image, in their order."""
        mtmd, pixels = self.mtmd, image.convert("RGB")
        marked = prompt.replace(IMAGE_PLACEHOLDER, mtmd.mtmd_default_marker().decode()).encode()
        text = mtmd.mtmd_input_text(text=marked, text_len=len(marked), add_special=True, parse_special=True)
        raw = (ctypes.c_uint8 * (3 * pixels.width * pixels.height)).from_buffer_copy(pixels.tobytes())
        bitmap, chunks = mtmd.mtmd_bitmap_init(*pixels.size, raw), mtmd.mtmd_input_chunks_init()
        array = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if mtmd.mtmd_tokenize(self.vision, chunks, ctypes.byref(text), array, 1):
            raise RuntimeError("mtmd_tokenize failed")
        for number in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, number)
            count = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                size = ctypes.c_size_t()
                yield mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(size))[:count], None
                continue
            if mtmd.mtmd_encode_chunk(self.vision, chunk):
                raise RuntimeError("mtmd_encode_chunk failed")
            embeds = mtmd.mtmd_get_output_embd(self.vision)
            yield [-1] * count, np.ctypeslib.as_array(embeds, (count, self.llama.n_embd())).copy()
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)


@torch.inference_mode()
def ours(pipeline: Pipeline, image: Image.Image, answer_tokens: int) -> tuple[str, Read]:
    """The prompt with our greedy answer, and how we read it."""
    model, rules = pipeline.model, PromptRules.of(pipeline.cfg)
    embeds_1QE = model.project(model.image_features(pipeline.processor(image)[None]))
    decoding = dataclasses.replace(rules.decoding, num_beams=1, do_sample=False, max_new_tokens=answer_tokens)
    tokenizer, asked = model.llama_tokenizer, model.prompt_embeds([rules.prompt], [[embeds_1QE]])
    answer = generate_ids(model.llama_model, tokenizer, *asked, decoding, rules.stop)[0, 1:]
    prompt = pipeline.cfg.model.as_read(rules.prompt).replace(IMAGE_TOKEN, IMAGE_PLACEHOLDER)
    prompt += " " + tokenizer.decode(answer, skip_special_tokens=True)
    (row,), _ = model.prompt_rows([prompt], [[embeds_1QE]])
    ids = [token if place < 0 else -1 for token, place in zip(row.ids, row.images, strict=True)]
    logits_TV = model.llama_model(inputs_embeds=model.prompt_embeds([prompt], [[embeds_1QE]])[0]).logits[0]
    return prompt, Read(ids, embeds_1QE[0].float().numpy(), logits_TV.argmax(dim=-1).numpy())


def compare(pipeline: Pipeline, folder: Path, images: list[Image.Image], answer_tokens: int) -> dict[str, Any]:
    """Counts of positions and of those with the same likeliest token, by text and image, and the embeddings' distance.

    AssertionError where the ids differ.
    """
    llama = LlamaCpp(folder, 2048)
    counts = dict.fromkeys(("text", "text same", "image", "image same"), 0)
    distances, cosines = [], []
    for image in images:
        prompt, mine = ours(pipeline, image, answer_tokens)
        theirs = llama.read(prompt, image)
        assert theirs.ids == mine.ids, (prompt, mine.ids, theirs.ids)
        is_image_T, same_T = np.array(mine.ids) < 0, mine.best_T == theirs.best_T
        for name, those_T in (("text", ~is_image_T), ("image", is_image_T)):
            counts[name] += int(those_T.sum())
            counts[f"{name} same"] += int(same_T[those_T].sum())
        pair = mine.image_QE, theirs.image_QE
        distances.append(np.abs(pair[0] - pair[1]).max() / np.abs(pair[0]).max())
        norms = [np.linalg.norm(own, axis=1) for own in pair]
        cosines.append(((pair[0] * pair[1]).sum(axis=1) / (norms[0] * norms[1])).min())
    return counts | {"largest difference": float(max(distances)), "least cosine": float(min(cosines))}


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 if fewer than 99% of the positions agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="as python -m minigpt4.export takes it")
    parser.add_argument("--images", type=Path, required=True, help="folder or list of images")
    parser.add_argument("--image-folder", type=Path)
    parser.add_argument("--limit", type=int, default=5)
    parser.add_argument("--answer-tokens", type=int, default=60)
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the files")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE")
    args = parser.parse_args(argv)

    pipeline = Pipeline(export.source_of(args.run, None, args.options), "cpu")
    images = [open_image(item.file) for item in find_images(args.images, args.image_folder, args.limit, seed=0)]
    with tempfile.TemporaryDirectory() as folder:
        written = ["--options", *args.options] if args.options else []
        where = ["--format", "gguf", "--output", folder, "--precision", args.precision]
        if status := export.main([args.run, *where, *written]):
            return status
        found = compare(pipeline, Path(folder), images, args.answer_tokens)
    for name in ("text", "image"):
        print(f"{name} positions with the same likeliest token: {found[f'{name} same']} of {found[name]}")
    print(f"image embeddings: {found['largest difference']:.1e} of the largest, cosine {found['least cosine']:.7f}")
    return int(found["text same"] + found["image same"] < 0.99 * (found["text"] + found["image"]))


if __name__ == "__main__":
    sys.exit(main())

"""A model as transformers has it: tensors, config and processor of a folder that it loads without this package.

`blip2` is `Blip2ForConditionalGeneration`, `llava` is `LlavaForConditionalGeneration`. Both read prompts through
`LlavaProcessor`, which takes `<image>` wherever it stands; `Blip2Processor` would put it first.
"""

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    BlipImageProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaImageProcessor,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import EVA_CLIP_G, MiniGPT4Config
from minigpt4.conversation.llava import IMAGE_TOKEN
from minigpt4.conversation.templates import Turns
from minigpt4.models.connectors import from_lavis_name
from minigpt4.models.eva_vit import EVA_NORM_EPS
from minigpt4.models.llama_tokenizer import BLANK, LlamaPieceTokenizer
from minigpt4.models.loading import VisionSide, feature_shape
from minigpt4.models.tokenizer import start_ids
from minigpt4.models.vision_tower import VisionTower, directory_config, is_directory
from minigpt4.processors import BaseProcessor


class Planned(NamedTuple):
    """A tensor of a file, made when it is written."""

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype | None = None) -> Self:
        return cls(tensor.shape, dtype or tensor.dtype, lambda: tensor)


Plan = dict[str, Planned]


# Tensors

_NAMES = {
    "blip2": (
        ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
        ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
        ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
        ("visual_encoder.blocks.", "vision_model.encoder.layers."),
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
        (".attn.proj.", ".self_attn.projection."),
        (".attn.", ".self_attn."),
        ("ln_vision.", "vision_model.post_layernorm."),
        ("llama_proj.", "language_projection."),
    ),
    "llava": (
        ("visual_encoder.", "vision_tower.vision_model."),
        ("llama_proj.0.", "multi_modal_projector.linear_1."),
        ("llama_proj.2.", "multi_modal_projector.linear_2."),
        ("llama_proj.", "multi_modal_projector.linear_1."),
    ),
}
_PARTS_OF_LLAVA = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
"""What LLaVA's class calls its parts, and its files in every version of transformers."""
LAYOUTS = tuple(_NAMES)


def file_name(name: str, layout: str) -> str:
    """What the files of a layout call a tensor of ours."""
    if name.startswith("llama_model."):
        return f"language_model.{name.removeprefix('llama_model.')}"
    if name.startswith("Qformer."):
        return f"qformer.{from_lavis_name(name)}"
    for own, theirs in _NAMES[layout]:
        name = name.replace(own, theirs)
    return name


def renamed(own: Plan, layout: str) -> Plan:
    """The tensors of a whole model as the files have them.

    BLIP-2 has one bias of queries, keys and values; that of keys is 0. LLaVA has two linear layers: behind a single one
    of ours stands the identity, with nothing between them.
    """
    plan = {file_name(name, layout): planned for name, planned in own.items()}
    for name in [name for name in plan if name.endswith(".self_attn.q_bias")]:
        stem = name.removesuffix("q_bias")
        query, value = plan.pop(f"{stem}q_bias"), plan.pop(f"{stem}v_bias")

        def joined(query: Planned = query, value: Planned = value) -> Tensor:
            bias = query.make()
            return torch.cat([bias, torch.zeros_like(bias), value.make()])

        plan[f"{stem}qkv.bias"] = Planned(torch.Size([3 * query.shape[0]]), query.dtype, joined)
    first, second = (f"multi_modal_projector.linear_{number}" for number in "12")
    if layout == "llava" and f"{second}.weight" not in plan:
        width = plan[f"{first}.weight"].shape[0]
        plan[f"{second}.weight"] = Planned.of(torch.eye(width))
        plan[f"{second}.bias"] = Planned.of(torch.zeros(width))
    return plan


def ours(shapes: Mapping[str, Sequence[int]], layout: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The opposite of `renamed`: our tensors of these names and shapes, from those of the files by `read(name)`."""
    found = {}
    for name, shape in shapes.items():
        theirs = file_name(name, layout)
        if theirs.endswith(("q_bias", "v_bias")):
            found[name] = read(f"{theirs[:-6]}qkv.bias").chunk(3)["qkv".index(theirs[-6])].clone()
        else:
            found[name] = read(theirs)[: shape[0]]  # without the row of `<image>`
    return found


def with_image_row(plan: Plan, tables: Sequence[str], image_id: int) -> Plan:
    """The LLM's tensors with a row for `<image>` in its `tables`, embeddings and output layer, unless one is free.

    It is the mean of all others: so is its logit, which therefore is never the highest.
    """

    def longer(own: Planned) -> Tensor:
        rows = own.make()
        return torch.cat([rows, rows.float().mean(dim=0, keepdim=True).to(rows.dtype)])

    short = {name: own for name, own in plan.items() if name in tables and own.shape[0] == image_id}
    rows = {
        name: Planned(torch.Size([image_id + 1, *own.shape[1:]]), own.dtype, lambda own=own: longer(own))
        for name, own in short.items()
    }
    return plan | rows


# Config


def refusals(cfg: MiniGPT4Config, layout: str) -> list[str]:
    """Why a model cannot be written in a layout."""
    kinds = {"blip2": "transformers' BLIP-2", "llava": "transformers' LLaVA", "gguf": "llama.cpp's LLaVA"}
    kind, is_clip = kinds[layout], is_directory(cfg.vit_model)
    clip = directory_config(cfg.vit_model) if is_clip and layout != "blip2" else None
    last = isinstance(clip, SiglipVisionConfig) and cfg.vit_layer == -1
    rules = [
        ("new_tokens", not cfg.new_tokens, "tokens that were added to the LLM are not exported"),
        ("train.vision", not cfg.train.vision.is_lora, "adapters beside the tower are not merged"),
        ("train.connector", not cfg.train.connector.is_lora, "adapters beside the connector are not merged"),
    ]
    if layout == "blip2":
        rules += [
            ("vit_model", cfg.vit_model == EVA_CLIP_G, f"{kind} has EVA-CLIP's tower"),
            ("connector", cfg.connector == "qformer", f"{kind} has a Q-Former, and no class does without one"),
            ("projection", cfg.projection == "linear", f"{kind} has one linear layer"),
        ]
    else:
        rules += [
            ("vit_model", is_clip, f"{kind} has a CLIP or SigLIP of transformers' own"),
            ("connector", cfg.connector == "identity", f"in {kind} each patch is an image token"),
            ("projection", cfg.projection in ("linear", "mlp2x_gelu"), f"{kind} has linear or mlp2x_gelu"),
            ("image_size", not clip or cfg.image_size in (None, clip.image_size), f"{kind} keeps to its tower's"),
            ("vit_layer", not last, f"{kind} leaves out SigLIP's last norm"),
        ]
    if layout == "gguf":
        rules += [("vit_prefix", cfg.vit_prefix != "keep", f"{kind} leaves out CLIP's first token")]
    return [f"model.{key}: {operator.attrgetter(key)(cfg)!r:.60}, but {why}" for key, fits, why in rules if not fits]


def build_config(
    cfg: MiniGPT4Config, layout: str, vision: VisionSide, text: PretrainedConfig, image_id: int
) -> PretrainedConfig:
    """The config of a layout; `text` is the LLM's, with end tokens, rows and dtype as they will be."""
    tower, _, connector = vision
    if layout == "blip2":
        blocks = list(tower.blocks)
        sizes = {
            "hidden_size": tower.num_features,
            "intermediate_size": blocks[0].mlp.fc1.out_features,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": blocks[0].attn.num_heads,
            "image_size": tower.image_size,
            "patch_size": tower.model.patch_embed.patch_size[0],
            "layer_norm_eps": EVA_NORM_EPS,  # of `ln_vision` too, which has 1e-5 here: 2e-6 in the image tokens
        }
        qformer = connector.bert.config.to_dict()
        queries = connector.query_tokens.shape[1]
        config = Blip2Config(vision_config=sizes, qformer_config=qformer, text_config=text, num_query_tokens=queries)
        config.architectures = ["Blip2ForConditionalGeneration"]
    else:
        clip = directory_config(cfg.vit_model)
        clip.vision_use_head = False  # SigLIP's pools, and nobody reads that
        reads = {"vision_feature_layer": cfg.vit_layer, "vision_feature_select_strategy": _select(cfg, tower)}
        act, count = "linear" if cfg.projection == "linear" else "gelu", feature_shape(cfg)[0]
        own = {"projector_hidden_act": act, "image_seq_length": count, **reads}
        config = LlavaConfig(vision_config=clip, text_config=text, **own)
        config.architectures = ["LlavaForConditionalGeneration"]
    config.image_token_index, config.dtype = image_id, text.dtype
    return config


def _select(cfg: MiniGPT4Config, tower: VisionTower) -> str:
    return "default" if tower.num_prefix_tokens and cfg.vit_prefix != "keep" else "full"


def expected(config: PretrainedConfig) -> dict[str, Tensor]:
    """The tensors that transformers' class wants to find in the files, without storage."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    if not isinstance(config, LlavaConfig):
        return state
    pairs = {name: next(pair for pair in _PARTS_OF_LLAVA if name.startswith(pair[0])) for name in state}
    return {theirs + name.removeprefix(own): state[name] for name, (own, theirs) in pairs.items()}


# Processor

_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
"""Images stand before the words of their message, as in training; the capitals are what stands around what is said."""


def chat_template(new: Callable[[], Turns], read: Callable[[str], str]) -> str:
    """A conversation as Jinja: `new()` is an empty one, `read` what the model makes of its prompts."""
    first, answer, second, system = "firstquestion", "firstanswer", "secondquestion", "systemtext"

    def prompt(turns: Turns, *said: str) -> str:
        for number, text in enumerate(said):
            if number % 2:
                turns.open_answer()
                turns.fill_answer(text)
            else:
                turns.ask(text)
        return read(turns.get_prompt())

    open_end, with_system, shown, shown_two = (new() for _ in range(4))
    prompt(open_end, first, answer, second)
    open_end.open_answer()
    with_system.set_system(system)
    for turns in (shown, shown_two, shown_two):
        turns.add_image()
    before, rest = prompt(open_end).split(first)
    middle, rest = rest.split(answer)
    between, last = rest.split(second)
    end = prompt(new(), first, answer).rpartition(answer)[2]
    around_system = prompt(with_system, first).partition(first)[0].split(system)
    one, two = (prompt(turns, first).partition(first)[0].removeprefix(before) for turns in (shown, shown_two))
    texts = {"BEFORE_SYSTEM": around_system[0], "AFTER_SYSTEM": around_system[1], "FIRST": before, "ANSWER": middle}
    texts |= {"END": end, "NEXT": between.removeprefix(end), "OPEN": last}
    texts |= {"IMAGE": one, "MORE_IMAGES": two.removesuffix(one)}
    lines = [f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} -%}}\n" for name, text in texts.items()]
    return "".join(lines) + _TEMPLATE.read_text(encoding="utf-8")


def build_tokenizer(own: PreTrainedTokenizerBase, longest: int) -> PreTrainedTokenizerFast:
    """The model's tokenizer as a tokenizer.json with `<image>` as one more token; it pads on the left."""
    is_llama = isinstance(own, LlamaPieceTokenizer)
    backend = _llama_backend(own) if is_llama else Tokenizer.from_str(own.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=is_llama and not own.legacy, special=True)])
    start = own.convert_ids_to_tokens(start_ids(own))
    special = [(token, backend.token_to_id(token)) for token in start]
    backend.post_processor = processors.TemplateProcessing(single=[*start, "$A"], special_tokens=special)
    names = {key: getattr(own, key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    if is_llama:  # `$$`, which pads here, is a word there
        names["pad_token"] = names["unk_token"] or names["eos_token"]
    names = {key: str(token) for key, token in names.items() if token}
    usual = {"padding_side": "left", "model_max_length": longest, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **usual, **names)


def _llama_backend(own: LlamaPieceTokenizer) -> Tokenizer:
    """SentencePiece's merges, by their scores. A blank goes before a prompt, the text after an image, which is one of
    its own here, and unless the files say `legacy: false`, the text after any special token."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(own.pieces.serialized_model_proto())
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    places = {piece.piece: place for place, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type in (kinds.NORMAL, kinds.USER_DEFINED)}
    best_first = sorted(scores, key=scores.get, reverse=True)
    splits = [(piece[:place], piece[place:]) for piece in best_first for place in range(1, len(piece))]
    merges = [split for split in splits if split[0] in scores and split[1] in scores]
    backend = Tokenizer(BPE(places, merges, unk_token=proto.trainer_spec.unk_piece, fuse_unk=True, byte_fallback=True))
    if own.legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    else:
        tokens = "|".join(re.escape(token.content) for token in own.added_tokens_decoder.values())
        behind_image = Regex(rf"{IMAGE_TOKEN}(?!{IMAGE_TOKEN}|{tokens}|\z)")
        steps = [normalizers.Replace(Regex(r"\A "), "  "), normalizers.Replace(behind_image, f"{IMAGE_TOKEN} ")]
        backend.normalizer = normalizers.Sequence(steps)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme="first", split=False)
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    for _, token in sorted(own.added_tokens_decoder.items()):  # cut out before, or after, the blanks are put
        sides = {"lstrip": token.lstrip, "rstrip": token.rstrip, "special": token.special}
        backend.add_tokens([AddedToken(token.content, normalized=not own.legacy, **sides)])
    return backend


def build_processor(
    cfg: MiniGPT4Config,
    layout: str,
    tower: VisionTower,
    pixels: BaseProcessor,
    tokenizer: PreTrainedTokenizerFast,
    templates: dict[str, str],
) -> LlavaProcessor:
    """`<image>` becomes Q ids wherever it stands; `pixels` is what the model does to images."""
    key = getattr(pixels, "feature_key", {"kind": None})
    if key["kind"] not in ("blip2", "clip"):
        raise ConfigError(f"vis_processor: transformers has none like {type(pixels).__name__}")
    side = {"height": key["image_size"], "width": key["image_size"]}
    values = {"image_mean": list(key["mean"]), "image_std": list(key["std"])}
    if key["kind"] == "blip2":
        images = BlipImageProcessor(size=side, **values)
    else:
        kind, pad = (LlavaImageProcessor, True) if key["image_aspect_ratio"] == "pad" else (CLIPImageProcessor, None)
        images = kind(size={"shortest_edge": key["image_size"]}, crop_size=side, do_pad=pad, **values)
    if layout == "blip2":  # the image is one patch, and the rest of the Q are additional
        places = {"patch_size": tower.image_size, "num_additional_image_tokens": feature_shape(cfg)[0] - 1}
        select = "full"
    else:
        patch = directory_config(cfg.vit_model).patch_size
        places = {"patch_size": patch, "num_additional_image_tokens": tower.num_prefix_tokens}
        select = _select(cfg, tower)
    template = templates if len(templates) > 1 else templates["default"]
    return LlavaProcessor(images, tokenizer, vision_feature_select_strategy=select, chat_template=template, **places)

"""A checkpoint as a folder that stock transformers or llama.cpp loads, or as safetensors (docs/export.md).

    python -m minigpt4.export RUN --format blip2 --output DIR [--dry-run] [--push-to-hub NAME/MODEL]

RUN: the folder of a run; a YAML file whose model.ckpt is set; a checkpoint with --cfg-path or beside its run.json; or,
with --format safetensors, a folder that this command wrote: then its checkpoint is taken out of it.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from minigpt4.common.checkpoint import card_path, find_weights, read_card, read_state_dict, require_fit
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, WeightsError, errors_as
from minigpt4.common.logger import setup_logger
from minigpt4.common.model_schema import EVA_CLIP_G, QFORMER_FILE
from minigpt4.common.run_folder import RUN_JSON
from minigpt4.common.torch_files import file_sha256
from minigpt4.common.utils import exit_status, read_facts
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER, Conversation, TemplateConversation, conversation_for
from minigpt4.evaluation.report import Table, four_digits
from minigpt4.inference.pipeline import WEIGHTS_ENDINGS, PromptRules, image_processor, read_source
from minigpt4.merge import INDEX, merged_llm, own_tensors, shard_index, shards, without_storage, write_sharded
from minigpt4.models import eva_vit, gguf_layout
from minigpt4.models.base_model import DTYPES
from minigpt4.models.connectors import own_blip2_keys, qformer_file
from minigpt4.models.fsdp import mapped_weights
from minigpt4.models.llama_tokenizer import PROBES
from minigpt4.models.llava_weights import PROJECTOR, read_part, whole_projection
from minigpt4.models.loading import trained_weights
from minigpt4.models.transformers_layout import (
    IMAGE_TOKEN,
    LAYOUTS,
    Plan,
    Planned,
    build_config,
    build_processor,
    build_tokenizer,
    chat_template,
    expected,
    ours,
    refusals,
    renamed,
    with_image_row,
)
from minigpt4.models.vision_tower import read_vit_weights

log = logging.getLogger(__name__)

FACTS, WEIGHTS = "minigpt4.json", "checkpoint.safetensors"
GGUF_FILES = f"--model {gguf_layout.LANGUAGE_MODEL} --mmproj {gguf_layout.PROJECTOR}"


def source_of(run: str, cfg_path: str | None, options: Sequence[str]) -> Config:
    """The configuration of RUN, with its checkpoint as `model.ckpt`."""
    path = Path(run)
    if path.suffix.lower() not in WEIGHTS_ENDINGS:
        return read_source(run, options)
    beside = path.with_name(RUN_JSON)
    if cfg_path is None and not beside.is_file():
        raise ConfigError(f"{run}: has no {RUN_JSON} beside it; name its YAML with --cfg-path")
    return read_source(cfg_path or beside, [*options, f"model.ckpt={path}"])


class Export:
    """A model as files: what the checkpoint trained, and the frozen parts around it, left on disk until written.

    Attributes:
        model: without storage; it knows names, tokenizer and prompts.
        trained: by our names.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.cfg, self.rules = config, config.model, PromptRules.of(config)
        self.directory = self.cfg.llm_directory()
        self.model, self.llm_config, self.base = without_storage(self.cfg)
        target = self.model.stored_parameters()
        if self.cfg.ckpt:
            self.checkpoint = find_weights(self.cfg.ckpt, "model.ckpt", Path(self.cfg.ckpt).name)
            trained = trained_weights(target, self.checkpoint, self.cfg, self.model.made_with())
            self.trained = {} if any(name.startswith("llama_proj.") for name in trained) else whole_projection(self.cfg)
            self.trained |= trained
        elif (whole := read_part(self.cfg, PROJECTOR)) is not None:
            self.checkpoint = whole[0]
            self.trained = {f"llama_proj.{name}": tensor for name, tensor in whole[1].items()}
            require_fit(target, self.trained, source=self.checkpoint)
        else:
            raise WeightsError(f"{config.source}: model.ckpt is not set; give the option model.ckpt=FILE")
        facts = read_card(self.checkpoint) or {}
        self.card = {key: facts[key] for key in ("arch", "epoch", "iteration") if key in facts} | self.model.made_with()

    def tensors(self, dtype: torch.dtype) -> Plan:
        """All of the model's by our names, the LLM's as `dtype`, the others as they lie in their files."""
        cfg, tower = self.cfg, self.model.visual_encoder.model
        path, vision = read_vit_weights(cfg)
        if cfg.vit_model == EVA_CLIP_G:
            eva_vit.fit_position_embedding(vision, tower, path)
            vision = {name: vision[name] for name, _ in tower.named_parameters() if name in vision}
        own = {f"visual_encoder.{name}": tensor for name, tensor in vision.items()}
        if cfg.connector == "qformer":
            own |= own_blip2_keys(read_state_dict(qformer_file(cfg), mapped=True))
        own |= {name: tensor for name, tensor in self.trained.items() if not name.startswith("llama_model.")}
        plan = {name: Planned.of(tensor) for name, tensor in own.items()}
        llm = merged_llm(own_tensors(self.base, self.llm_config), self.trained, cfg.train.llm, dtype)
        return plan | {f"llama_model.{name}": planned for name, planned in llm.items()}

    def ends(self) -> tuple[list[int], list[str]]:
        """End tokens, and the stop strings that are no tokens."""
        ids, strings = self.model.llama_model.generation_config.eos_token_id, []
        ids, added = [ids] if isinstance(ids, int) else list(ids or []), self.model.llama_tokenizer.get_added_vocab()
        for text in self.rules.stop:
            if text not in added:
                strings.append(text)
            elif added[text] not in ids:
                ids.append(added[text])
        return ids, strings

    def templates(self) -> dict[str, str]:
        """Jinja by name: what training and captions ask, and where the published chat asks otherwise, `chat`."""

        def read(prompt: str) -> str:
            return self.cfg.as_read(prompt).replace(IMAGE_PLACEHOLDER, IMAGE_TOKEN)

        chat = chat_template(lambda: conversation_for(self.model), read)
        if not isinstance(conversation_for(self.model), Conversation):
            return {"default": chat}
        template, end = self.model.prompt_template, self.model.end_sym
        return {"default": chat_template(lambda: TemplateConversation(template, end), read), "chat": chat}

    def check_ids(self, tokenizer: Any) -> None:
        """WeightsError where a tokenizer of transformers cuts a text otherwise than the model does."""
        image, prompting = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), self.model.prompting
        for text in (self.rules.prompt, *PROBES, *(f"{probe}{IMAGE_PLACEHOLDER}{probe}" for probe in PROBES)):
            parts = prompting.split_images(text)
            first, *later = prompting.encode(parts)
            wanted = prompting.start + first + [token for ids in later for token in (image, *ids)]
            if tokenizer(IMAGE_TOKEN.join(parts))["input_ids"] != wanted:
                raise WeightsError(f"{self.directory}: no tokenizer of transformers cuts {text!r:.80} as this one")


def write_model(export: Export, layout: str, folder: Path, precision: str | None) -> Plan:
    """All files of a layout but the weights, whose plan is returned, and the card; refused where it has no place."""
    cfg, llm = export.cfg, export.model.llama_model
    tower, text = export.model.visual_encoder, export.llm_config
    with errors_as(WeightsError, f"{export.directory}: its tokenizer cannot be written as a tokenizer.json"):
        tokenizer = build_tokenizer(export.model.llama_tokenizer, text.max_position_embeddings)
    pixels, templates = image_processor(export.config), export.templates()
    build_processor(cfg, layout, tower, pixels, tokenizer, templates).save_pretrained(folder)
    export.check_ids(AutoProcessor.from_pretrained(folder).tokenizer)

    dtype = DTYPES[precision or (cfg.llm_storage if cfg.llm_storage in DTYPES else "fp16")]
    ends = (llm.get_input_embeddings(), llm.get_output_embeddings())
    modules = [(name, part) for name, part in llm.named_modules() if any(part is end for end in ends)]
    tables = [f"llama_model.{name}.{kind}" for name, part in modules for kind, _ in part.named_parameters()]
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    plan = with_image_row(export.tensors(dtype), tables, image_id)
    ids, strings = export.ends()
    special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ids}
    text.update(special | {"vocab_size": plan[tables[0]].shape[0], "dtype": dtype})
    vision = (tower, export.model.ln_vision, export.model.Qformer)
    config = build_config(cfg, layout, vision, text, image_id)
    plan, wanted = renamed(plan, layout), expected(config)
    odd = [name for name in wanted.keys() | plan.keys() if name not in wanted or name not in plan]
    odd += [name for name in wanted.keys() & plan.keys() if wanted[name].shape != plan[name].shape]
    if odd:
        raise WeightsError(f"--format {layout}: {type(llm).__name__} does not fit it: {', '.join(sorted(odd)[:4])}")
    config.save_pretrained(folder)
    GenerationConfig(**special, stop_strings=strings or None).save_pretrained(folder)
    shapes = {name: list(tensor.shape) for name, tensor in export.trained.items()}
    (folder / FACTS).write_text(json.dumps({"format": layout, "trained": shapes, "card": export.card}, indent=2))
    for file in export.directory.glob("LICEN[CS]E*"):
        shutil.copy(file, folder)
    return plan


def write_gguf(export: Export, folder: Path, precision: str | None, dry: bool) -> dict[str, int]:
    """The two files that llama.cpp reads; returns their bytes. They are made of what the layout `llava` would hold."""
    with tempfile.TemporaryDirectory() as spare:
        plan = write_model(export, "llava", Path(spare), precision)
        llava, processor = AutoConfig.from_pretrained(spare), AutoProcessor.from_pretrained(spare)
        for file in Path(spare).glob("LICEN[CS]E*"):
            shutil.copy(file, folder)
    own, dtype = export.model.llama_tokenizer, llava.dtype
    gguf_layout.refuse_misfits(llava, processor, own)
    if not getattr(processor.image_processor, "do_pad", False):
        log.warning("llama.cpp pads images to a square, where this model cuts them: give it square ones")
    if export.model.visual_encoder.num_prefix_tokens:
        log.warning("llama.cpp shifts CLIP's patches by one place (its issue 25814), until it has pull request 25844")
    files = {
        gguf_layout.LANGUAGE_MODEL: gguf_layout.language_model(plan, llava, processor, own, dtype),
        gguf_layout.PROJECTOR: gguf_layout.mmproj(plan, llava, processor, dtype),
    }
    return {name: gguf_layout.write_gguf(*file, folder / name, dry) for name, file in files.items()}


def write_checkpoint(trained: Mapping[str, Tensor], card: Mapping[str, Any], folder: Path) -> None:
    """What was trained, by our names, which `model.ckpt` reads, and its card."""
    path = folder / WEIGHTS
    save_file({name: tensor.contiguous() for name, tensor in trained.items()}, path, metadata={"format": "pt"})
    facts = {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    card_path(path).write_text(json.dumps({**card, **facts}, indent=2), encoding="utf-8")


def read_export(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The checkpoint in a folder that `write_model` wrote, to the bit, and its card.

    WeightsError where its LLM was trained by adapters, which are merged there.
    """
    facts = read_facts(folder / FACTS)
    if merged := [name for name in facts["trained"] if ".lora_" in name]:
        raise WeightsError(
            f"{folder}: {merged[0]} and other adapters are merged into its LLM; take the run's checkpoint"
        )
    tensors = mapped_weights(folder)
    return ours(facts["trained"], facts["format"], tensors.__getitem__), facts["card"]


# The card, the sizes, the command

CARD, USE = (Path(__file__).with_name(name) for name in ("model_card.md", "model_card_use.md"))
RECIPE = (
    *("init_lr", "min_lr", "lr_sched", "warmup_steps", "warmup_ratio", "weight_decay", "max_epoch", "iters_per_epoch"),
    *("accum_grad_iters", "amp", "amp_dtype", "seed"),
)


def model_card(export: Export, layout: str, title: str) -> str:
    """README.md; files of this machine are called by the last part of their paths."""
    cfg, run = export.cfg, export.config.merged["run"]
    trained = sorted({name.partition(".")[0] for name in export.trained})
    parts = {"LLM": cfg.llama_model, "vision encoder": cfg.vit_weights or cfg.vit_model}
    parts |= {"Q-Former": cfg.q_former_model or QFORMER_FILE} if cfg.connector == "qformer" else {}
    parts |= {f"trained ({', '.join(trained)})": export.checkpoint}
    data = {name: section.get("build_info") or {} for name, section in export.config.merged["datasets"].items()}
    files = {name: ", ".join(Path(f"{file}").name for file in info.values() if file) for name, info in data.items()}
    recipe = {key: run[key] for key in RECIPE if run.get(key) is not None}
    recipe |= {key: export.card[key] for key in ("epoch", "iteration") if export.card.get(key) is not None}
    uses = {"safetensors": f"    model.ckpt: {WEIGHTS}", "gguf": f"    llama-server {GGUF_FILES}"}
    use = uses.get(layout) or Template(USE.read_text()).substitute(title=title)
    return Template(CARD.read_text()).substitute(
        tags=", ".join(dict.fromkeys([cfg.arch, layout])),
        title=title,
        arch=cfg.arch,
        format=layout,
        use=use,
        parts="\n".join(f"- {part}: `{Path(file).name}`" for part, file in parts.items()),
        data="\n".join(f"- {name}: {names}" for name, names in files.items()) or "The configuration names none.",
        recipe=Table(["key", "value"], [[key, str(value)] for key, value in recipe.items()]).markdown(),
        scores="\n".join(scores(export.checkpoint)) or "The folder of the run has no evaluation of this checkpoint.",
    )


def scores(checkpoint: Path) -> Iterator[str]:
    """A table of each evaluation below a checkpoint's folder that scored it, with 95% intervals."""
    sha256 = file_sha256(checkpoint)
    for path in sorted(checkpoint.parent.glob("**/*.json")):
        results = read_facts(path)
        rows = results["checkpoints"] if isinstance(results.get("checkpoints"), list) else []
        for own in (one for one in rows if isinstance(one, dict) and one.get("sha256") == sha256):
            if "accuracy" in own:  # a benchmark of eval_vqa.py
                named, intervals = {"accuracy": own["accuracy"]}, {"accuracy": own.get("interval")}
            else:
                named, intervals = own.get("scores") or {}, own.get("intervals") or {}
            cells = [four_digits(score, intervals.get(name)) for name, score in named.items()]
            name = results.get("benchmark") or results.get("data") or path.stem
            count = results.get("questions") or results.get("images")
            yield Table([f"{name}, n {count}", *named], [[own.get("name", ""), *cells]]).markdown()


_SAFETENSORS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def file_sizes(plan: Plan) -> dict[str, int]:
    """Bytes of each file of weights, headers included, from shapes alone."""
    sizes, order = {}, list(_SAFETENSORS)
    for file, names in shards(plan).filename_to_tensors.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(names, key=lambda name: (order.index(plan[name].dtype), name)):
            begin, end = end, end + plan[name].shape.numel() * plan[name].dtype.itemsize
            kind, shape = _SAFETENSORS[plan[name].dtype], list(plan[name].shape)
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
        sizes[file] = 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + end
    return sizes


def write(export: Export, layout: str, folder: Path, precision: str | None, title: str, dry: bool) -> dict[str, int]:
    """All files of an export, of a dry run without weights; returns the bytes of each."""
    if layout == "safetensors":
        sizes = {WEIGHTS: sum(file_sizes({name: Planned.of(t) for name, t in export.trained.items()}).values())}
        if not dry:
            write_checkpoint(export.trained, export.card, folder)
    elif layout == "gguf":
        sizes = write_gguf(export, folder, precision, dry)
    else:
        plan = write_model(export, layout, folder, precision)
        sizes = file_sizes(plan)
        if not dry:
            write_sharded(plan, folder)
        elif len(sizes) > 1:
            (folder / INDEX).write_text(shard_index(shards(plan)))
    (folder / "README.md").write_text(model_card(export, layout, title), encoding="utf-8")
    found = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return dict(sorted((found | sizes).items()))


def run(args: argparse.Namespace) -> None:
    """Write the folder, or with --dry-run say what it would hold, and hand it to the hub."""
    folder: Path = args.output
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--output {folder}: is not empty")
    if (Path(args.run) / FACTS).is_file():
        if args.format != "safetensors":
            raise ConfigError(f"{args.run}: is an export already, which --format safetensors reads")
        if args.dry_run or args.push_to_hub:
            raise ConfigError("--dry-run, --push-to-hub: not for the checkpoint of an export")
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(*read_export(Path(args.run)), folder)
        return
    config = source_of(args.run, args.cfg_path, args.options)
    if args.format == "gguf":
        gguf_layout.import_gguf()
    if args.format != "safetensors" and (faults := refusals(config.model, args.format)):
        raise ConfigError("\n".join(f"--format {args.format}: {fault}" for fault in faults))
    export = Export(config)
    with tempfile.TemporaryDirectory() as spare:
        target = Path(spare) if args.dry_run else folder
        target.mkdir(parents=True, exist_ok=True)
        sizes = write(export, args.format, target, args.precision, folder.resolve().name, args.dry_run)
    for file, size in [*sizes.items(), ("in all", sum(sizes.values()))]:
        sys.stdout.write(f"{size:>16,}  {file}\n")
    if args.push_to_hub and not args.dry_run:
        with errors_as(ConfigError, f"--push-to-hub {args.push_to_hub}"):
            hub = HfApi(os.environ.get("HF_ENDPOINT"))
            hub.create_repo(args.push_to_hub, exist_ok=True)
            done = hub.upload_folder(repo_id=args.push_to_hub, folder_path=folder)
        sys.stdout.write(f"{done.commit_url}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--format", choices=(*LAYOUTS, "gguf", "safetensors"), required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("--cfg-path", help="YAML of a checkpoint")
    parser.add_argument("--precision", choices=tuple(DTYPES), help="of the written LLM; else model.llm_precision")
    parser.add_argument("--dry-run", action="store_true", help="list files and bytes, and write nothing")
    parser.add_argument("--push-to-hub", metavar="NAME/MODEL", help="upload it, too; HF_TOKEN or `hf auth login`")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="over the configuration")
    setup_logger()
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())

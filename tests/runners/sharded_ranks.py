"""Two processes with an LLM that is spread over them: `torchrun --nproc-per-node 2 sharded_ranks.py RECIPE FOLDER`.

As in `two_ranks.py` every function named `scenario_...` is one run; the pairs `ddp` and `fsdp` are to be equal.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from building import CONSTANT_RATE, WITHOUT_PROMPTS, batch, build, cut, fed, read, trained
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4.common.dist_utils import Processes, start_processes, stop_processes
from minigpt4.common.errors import RunError
from minigpt4.evaluation.generate import EvaluationRun, predict, read_checkpoint_list
from minigpt4.inference.captioning import AnswerStore, caption_images
from minigpt4.inference.image_list import ImageList, images_to_caption
from minigpt4.inference.pipeline import PromptRules, image_reader
from minigpt4.models.fsdp import is_sharded, uneven_inputs
from minigpt4.models.llm import fingerprint, load_llm
from minigpt4.runners import RunnerBase

FSDP = "run.parallel=fsdp"
DDP = "model.llm_prefix_cache=False"
"""A sharded LLM reads the text before the image in each step; another one is to do so, too, for the same roundings."""
UPDATES = 4
TEXT_ONLY = 1
"""Iteration whose batch has no images on rank 1."""


def _batches(rank: int) -> list[dict[str, Any]]:
    batches = cut(rank, 2, 1, UPDATES)
    if rank == 1:
        del batches[TEXT_ONLY]["image"]
    return batches


def _trained(recipe: Path, processes: Processes, *options: str) -> tuple[dict[str, Any], RunnerBase]:
    """`UPDATES` updates, with a checkpoint after each."""
    lengths = ("run.max_epoch=1", f"run.iters_per_epoch={UPDATES}", "run.save_every_iters=2", WITHOUT_PROMPTS)
    given = fed(_batches(processes.rank))
    runner = build(recipe, *CONSTANT_RATE, *lengths, *options, runner=given, processes=processes)
    losses, original = [], runner.train_step
    runner.train_step = lambda *a: (losses.append(original(*a)), losses[-1])[1]
    runner.train()
    result = {"losses": torch.stack(losses), "weights": trained(runner), "folder": str(runner.folder)}
    return result, runner


def scenario_training(recipe: Path, processes: Processes) -> dict[str, Any]:
    """The same run in both ways, in fp32 and with all that may meet a sharded layer's hooks; and each way's run, taken
    up in its middle by the other."""
    ddp, _ = _trained(recipe, processes, DDP)
    fsdp, runner = _trained(recipe, processes, FSDP)
    bf16 = ("model.llm_precision=bf16", "run.amp=True", "run.amp_dtype=bf16", "model.llm_logits=all")
    mixed, _ = _trained(recipe, processes, *bf16, DDP)
    mixed_fsdp, _ = _trained(recipe, processes, *bf16, FSDP, "model.llm_grad_checkpoint=True")
    results = {"ddp": ddp, "fsdp": fsdp, "mixed": mixed, "mixed_fsdp": mixed_fsdp, "held": _held(runner)}
    for name, begun, options in (("to_fsdp", ddp, (FSDP,)), ("to_ddp", fsdp, (DDP,))):
        middle = f"run.resume_ckpt_path={begun['folder']}/checkpoint_iter_2.pth"
        results[name] = _trained(recipe, processes, middle, *options)[0]
    return results


FROM_FILES = "model.ckpt_allow_keys=[llama_model.*]"
TRAINED_LLM = (FROM_FILES, "model.train.llm=full", "model.train.projection.lr=1e-3", "run.max_grad_norm=1.0")


def scenario_trained_llm(recipe: Path, processes: Processes) -> dict[str, Any]:
    """The LLM trained in full, whole and sharded; taken up between two updates by either way."""
    results = {}
    for name, way in {"ddp": (DDP,), "fsdp": (FSDP,)}.items():
        results[name], runner = _trained(recipe, processes, *TRAINED_LLM, *way)
        results[name]["held"] = _held(runner)
    for name, begun, way in (("to_fsdp", "ddp", FSDP), ("to_ddp", "fsdp", DDP), ("to_itself", "fsdp", FSDP)):
        middle = f"run.resume_ckpt_path={results[begun]['folder']}/checkpoint_iter_2.pth"
        results[name] = _trained(recipe, processes, middle, *TRAINED_LLM, way)[0]
    lora = (FROM_FILES, "model.train.llm.rule=lora", "model.train.llm.r=4", "run.accum_grad_iters=2")
    lora += ("run.save_every_iters=1",)
    results["lora"] = _trained(recipe, processes, *lora, FSDP)[0]
    pending = f"run.resume_ckpt_path={results['lora']['folder']}/checkpoint_iter_3.pth"
    results["lora_on"] = _trained(recipe, processes, pending, *lora, FSDP)[0]
    return results


def _held(runner: RunnerBase) -> dict[str, Any]:
    """Numbers in the layers' matrices and in the rest of the LLM: all, and those that this process holds."""
    llm = runner.model.llama_model
    counts = {"layers": [0, 0], "others": [0, 0], "is_sharded": is_sharded(runner.model.llama_model)}
    for name, parameter in llm.named_parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        count = counts["layers" if ".layers." in name and parameter.ndim > 1 else "others"]
        count[0] += parameter.numel()
        count[1] += own.numel()
    return counts


def scenario_validation(recipe: Path, processes: Processes) -> dict[str, Any]:
    """Three batches on rank 0, which also captions, and two on rank 1, which does not; then a step of training."""
    results = {}
    for name, options in {"ddp": (DDP,), "fsdp": (FSDP,)}.items():
        runner = build(recipe, *options, "run.valid_splits=[val]", "run.batch_size_eval=1", processes=processes)
        loss, _, shown = runner.eval_epoch(runner.valid_loaders)
        runner.train_step(0, 0, batch(processes.rank, 2))
        runner.loader.close()
        results[name] = {"loss": loss, "shown": shown}
    return results


def scenario_answers(recipe: Path, processes: Processes) -> dict[str, Any]:
    """Three batches of one image, so two on rank 0: by `predict`, greedy and by beams, and by `caption_images`."""
    results = {}
    for name, options in {"ddp": (DDP,), "fsdp": (FSDP, "model.llm_sanity_check=False")}.items():
        options += ("run.generation.max_new_tokens=6", "run.num_workers=0", "run.batch_size_eval=1")
        cfg = read(recipe, *options)
        folder = Path(cfg.run.output_dir) / name
        base, items = images_to_caption([Path(cfg.run.output_dir).parent / "cc_sbu_align" / "image"], None)
        images = ImageList(items[:3], image_reader(cfg))
        rules = [PromptRules.of(cfg, source="test", num_beams=beams) for beams in (1, 3)]
        checkpoints = read_checkpoint_list([cfg.model.ckpt])
        said = predict(EvaluationRun(cfg, checkpoints, folder, processes), images, rules)
        file = AnswerStore.captions(folder / "captions.jsonl")
        counts = caption_images(cfg, rules[0], base, items[:3], 1, file, processes)
        results[name] = [
            [[[key, one.text] for key, one in own.items()] for own in said[0]] if said else None,
            counts,
            sorted(line["caption"] for line in file.lines().values()),
        ]
    return results


def scenario_odd_rows(recipe: Path, processes: Processes) -> dict[str, Any]:
    """An LLM whose matrices do not divide evenly, in both formats of files."""
    folder = Path(read(recipe).run.output_dir) / "odd"
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    if processes.is_main:
        torch.manual_seed(0)
        llm = LlamaForCausalLM(LlamaConfig(vocab_size=51, intermediate_size=33, tie_word_embeddings=True, **sizes))
        llm.save_pretrained(folder / "safetensors")
        llm.save_pretrained(folder / "bin")
        (folder / "bin" / "model.safetensors").unlink()
        torch.save(llm.state_dict(), folder / "bin" / "pytorch_model.bin")
    processes.barrier()
    results = {}
    for name in ("safetensors", "bin"):
        whole, sharded = (load_llm(folder / name, "fp32", processes.device, sharded=way) for way in (False, True))
        own = sharded.state_dict()
        results[name] = {
            "whole": whole.state_dict(),
            "sharded": {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in own.items()},
            "fingerprints": [fingerprint(whole), fingerprint(sharded)],
            "rows": len(own["model.layers.0.mlp.up_proj.weight"].to_local()),
        }
    return results


def left_alone(recipe: Path, processes: Processes, folder: Path) -> None:
    """Rank 1 dies where rank 0 makes a pass: rank 0 writes down what it is told."""
    runner = build(recipe, FSDP, processes=processes)
    if not processes.is_main:
        return
    try:
        with uneven_inputs(runner.model.llama_model):
            runner.model.generate(None, ["a text"])
    except RunError as error:
        (folder / "left_alone.txt").write_text(str(error))


def main(recipe: str, folder: str) -> None:
    """Run the scenarios one after another and save what they return."""
    processes = start_processes("cpu")
    results = {
        name.removeprefix("scenario_"): scenario(Path(recipe), processes)
        for name, scenario in list(globals().items())
        if name.startswith("scenario_")
    }
    torch.save(results, Path(folder) / f"sharded{processes.rank}.pt")
    left_alone(Path(recipe), processes, Path(folder))
    stop_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])

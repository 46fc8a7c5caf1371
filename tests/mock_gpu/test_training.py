"""`train.py` on "cuda": every part of the path runs, tensors are where they belong, and no step waits for the GPU."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

TRAIN = Path(__file__).parents[2] / "train.py"
FP16 = ("run.amp=True", "model.vit_precision=fp16", "model.llm_precision=fp16")
BF16 = ("run.amp=True", "run.amp_dtype=bf16", "model.vit_precision=bf16", "model.llm_precision=bf16")
RECOMPUTED = ("model.llm_grad_checkpoint=True", "model.freeze_qformer=False", "model.ckpt=null")
CACHED = ("run.feature_cache=cache", "run.accum_grad_iters=2", "run.max_grad_norm=1.0", "model.vit_cuda_graph=True")
OPTIONS = {
    "fp16, workers": (*FP16, "run.num_workers=2"),
    "fp32": (),
    "cache, accumulation, clipping, graph": (*FP16, *CACHED),
    "recomputation, trained Q-Former": (*FP16, *RECOMPUTED),
    "trained ViT": (*BF16, "model.freeze_vit=False", "model.ckpt=null"),
    "nf4": (*BF16, "model.llm_precision=nf4"),
    "graph of the vision side": (*FP16, "model.vit_cuda_graph=True"),
}
"""In bf16 alone the runs below train."""


def _train(mock_gpu, tiny, *options, **more):
    arguments = (TRAIN, "--cfg-path", tiny.recipe, "--options", "run.device=cuda", *options)
    return mock_gpu(*arguments, cwd=tiny.folder, **more)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_on_cuda_never_waits(mock_gpu, tiny, options):
    if "model.llm_precision=nf4" in options and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    options = ("run.max_epoch=1", "run.log_freq=5", "run.iters_per_epoch=12", *options)
    if "run.feature_cache=cache" in options:
        _train(mock_gpu, tiny, *options, FREE_STEPS="12")  # to fill it takes what the device computed
    done = _train(mock_gpu, tiny, *options)
    assert "max mem: " in done.stdout
    assert (tiny.runs()[0] / "checkpoint_0.pth").is_file()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_on_cuda_never_wait(mock_gpu, tiny, parallel):
    options = (*BF16, "run.max_epoch=1", "run.save_every_iters=4", "run.accum_grad_iters=2", f"run.parallel={parallel}")
    options += ("model.vit_cuda_graph=True",)
    _train(mock_gpu, tiny, *options, processes=2)
    (run,) = tiny.runs()
    ranks = torch.load(run / "checkpoint_0.pth", map_location="cpu", weights_only=True)["state"]["ranks"]
    assert len(ranks) == 2


def test_a_run_on_cuda_resumes_in_mid_epoch_and_validates(mock_gpu, tiny):
    (tiny.folder / "val.json").write_text(json.dumps([{"image_id": "0", "caption": "A dog."}]))
    place = f"datasets.cc_sbu_align.build_info.val_ann_path={tiny.folder}/val.json"
    ones = {"MOCK_CUDA_FILL": "1"}  # flags of finite logits read as true, and those of steps to skip, too
    options = (*BF16, "run.max_epoch=1", "run.save_every_iters=4", "run.max_nonfinite_steps=100")
    _train(mock_gpu, tiny, *options, **ones)
    run = tiny.runs()[0]
    (run / "checkpoint_0.pth").unlink()
    more = (place, "run.valid_splits=[val]", "run.valid_captions=1", "run.resume_ckpt_path=auto")
    done = _train(mock_gpu, tiny, *options, *more, **ones)
    assert "[8/10]" in done.stdout.replace(" ", "")
    assert "[7/10]" not in done.stdout.replace(" ", "")
    assert (run / "checkpoint_0.pth").is_file()


def test_a_wait_is_noticed(cold_mock_gpu):
    script = (
        "import os, torch; torch.cuda.set_sync_debug_mode('error'); a = torch.ones(3, device='cuda'); a.sum().item()"
    )
    done = cold_mock_gpu("-c", script)
    assert done.returncode != 0
    assert "synchroniz" in done.stderr

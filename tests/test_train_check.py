"""`train.py --check` on the shipped files, without weights: sizes, advice, and errors before torch loads."""

import functools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minigpt4.check import check
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError

REPOSITORY = Path(__file__).parents[1]
RECIPES = sorted((REPOSITORY / "train_configs").glob("minigpt4_*.yaml"))  # the mini ones need the LLM to be sized
TINY = (
    f"model.llama_model={REPOSITORY}/tests/data/parity/vicuna_tiny",
    "model.vit_config={embed_dim: 64, depth: 3, num_heads: 4}",
    "model.qformer_config={hidden_size: 48, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 96}",
)
SHARDED = ("run.parallel=fsdp", *TINY)


@functools.cache
def checked(*options: str, recipe: str = "13b_flickr_finetune", gpu_gib: float = 23.6, gpus: int | None = None) -> str:
    """The report for a recipe."""
    path = REPOSITORY / f"train_configs/minigpt4_{recipe}.yaml"
    return check(Config(SimpleNamespace(cfg_path=str(path), options=list(options))), gpu_gib, gpus)


@pytest.mark.parametrize("recipe", [file.stem.removeprefix("minigpt4_") for file in RECIPES])
def test_every_recipe_is_sized_without_weights(recipe):
    report = checked(recipe=recipe)
    # The projection: 768 or 4 x 1408 channels in, 4096 or 5120 out, and biases.
    trained = "23,072,768" if "llama2" in recipe else "3,937,280" if "13b" in recipe else "3,149,824"
    row = next(line for line in report.splitlines() if line.startswith("sum"))
    assert row.split()[2] == trained
    assert "  model.llama_model: weights/" in report, "what is missing is named"


def test_flickr_recipe_fits_in_24_gib():
    report = checked(recipe="flickr_finetune")
    assert "7,832,625,024" in report
    assert "It fits in 23.6 GiB." in report
    assert "5 epochs x 500 iterations = 2,500 updates; batch 2 = 5,000 samples on each GPU." in report


def test_what_does_not_fit_comes_with_what_to_change():
    report = checked(recipe="stage2_finetune")
    assert "It does NOT fit in 23.6 GiB." in report
    assert "batch_size: 6, run.accum_grad_iters: 2: fits" in report
    assert "model.llm_grad_checkpoint: True:" in report
    assert "  run.parallel: fsdp on 2 GPUs: 20.63 GiB, fits" in checked()


@pytest.mark.parametrize("way", ["launcher", "configuration"])
def test_number_of_gpus_is_the_launchers_or_the_configurations(way, monkeypatch):
    if way == "launcher":
        monkeypatch.setenv("WORLD_SIZE", "4")
    report = checked.__wrapped__(*SHARDED, *["run.world_size=4"] * (way == "configuration"))
    assert "its layers spread over 4 GPUs" in report
    assert re.search(r"^LLM, gathered layers +0 +0 ", report, re.MULTILINE)


def test_one_gpu_is_said_to_share_nothing():
    assert "one GPU has all of it: --gpus N tells over how many run.parallel: fsdp spreads it" in checked(*SHARDED)


@pytest.mark.parametrize(("arguments", "option"), [({"gpus": 0}, "--gpus: 0"), ({"gpu_gib": 0}, "--gpu-gib: 0")])
def test_sizes_of_the_machine_must_be_above_0(arguments, option):
    with pytest.raises(ConfigError, match=option):
        checked(*TINY, **arguments)


def test_precisions_that_do_not_go_with_fsdp_are_no_advice():
    report = checked(*SHARDED, gpu_gib=0.5, gpus=4)
    assert "does NOT fit" in report
    assert "nf4" not in report.split("What changes that:")[1]


def test_memory_with_a_complete_feature_cache_is_told():
    report = checked("run.feature_cache=cache", *TINY)
    assert "Once run.feature_cache knows all images the vision side is not loaded: " in report


def test_command_prints_the_merged_configuration_with_its_options(load_script, capsys):
    recipe = ["--cfg-path", f"{REPOSITORY}/train_configs/minigpt4_13b_flickr_finetune.yaml", "--check"]
    command = ["--local-rank=0", *recipe, "--gpus=3", "--gpu-gib=24", "--options", *SHARDED]  # as old launchers call it
    assert load_script("train.py").main(command) == 0
    said = capsys.readouterr().out
    assert "init_lr:" in said
    assert "its layers spread over 3 GPUs" in said


def test_faults_are_reported_before_torch_loads():
    recipe = ["--cfg-path", "train_configs/minigpt4_flickr_finetune.yaml"]
    runs = [
        [*recipe, "--options", "model.llama_modle=x"],
        [*recipe, "--options", "model.vit_model=vit_base_patch16_224", "model.has_qformre=False"],
        [*recipe, "--check", "--options", "model.image_size=448"],
        ["--cfg-path", "train_configs/nothing.yaml", "--check"],
    ]
    code = (
        "import sys, minigpt4, minigpt4.conversation, minigpt4.doctor\n"
        "assert not {'torch', 'transformers', 'timm', 'numpy', 'PIL', 'omegaconf', 'pydantic'} & set(sys.modules)\n"
        f"import train\nassert [train.main(run) for run in {runs}] == [2, 2, 2, 2]\n"
        f"train.Config(train.parse_args({recipe})).validate()  # nor does what is good\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "--options model.llama_modle: unknown key; did you mean 'llama_model'?" in result.stderr
    assert "--options model.has_qformre: unknown key; did you mean 'has_qformer'?" in result.stderr
    assert "minigpt4_flickr_finetune.yaml" in result.stderr
    assert "vis_processor.train.image_size: 224 must equal model.image_size: 448" in result.stderr
    assert "train_configs/nothing.yaml" in result.stderr
    assert "Traceback" not in result.stderr

"""`train.py --check` as a user runs it: a process of its own, on the shipped files, without weights."""

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


def train(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def trained_parameters(recipe: Path) -> str:
    """What the projection of a recipe must have: 768 or 4 x 1408 channels in, 4096 or 5120 out, and biases."""
    if "llama2" in recipe.stem:
        return "23,072,768"
    return "3,937,280" if "13b" in recipe.stem else "3,149,824"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_is_sized_without_weights(recipe):
    report = check(Config(SimpleNamespace(cfg_path=str(recipe), options=None)), gpu_gib=24)
    row = next(line for line in report.splitlines() if line.startswith("sum"))
    assert row.split()[2] == trained_parameters(recipe)
    assert "  model.llama_model: weights/" in report, "what is missing is named"


def test_check_prints_the_merged_configuration_and_the_published_count():
    result = train("--cfg-path", "train_configs/minigpt4_flickr_finetune.yaml", "--check", "--gpu-gib", "24")
    assert result.returncode == 0, result.stderr
    assert "init_lr:" in result.stdout
    row = next(line for line in result.stdout.splitlines() if line.startswith("sum"))
    assert row.split()[1:3] == ["7,832,625,024", "3,149,824"]


def test_flickr_recipe_fits_in_24_gib():
    result = train("--cfg-path", "train_configs/minigpt4_flickr_finetune.yaml", "--check", "--gpu-gib", "24")
    assert "It fits in 24.0 GiB." in result.stdout
    assert "5 epochs x 500 iterations = 2,500 updates; batch 2 = 5,000 samples on each GPU." in result.stdout


def test_what_does_not_fit_comes_with_what_to_change():
    result = train("--cfg-path", "train_configs/minigpt4_stage2_finetune.yaml", "--check", "--gpu-gib", "24")
    assert "It does NOT fit in 24.0 GiB." in result.stdout
    assert "batch_size: 6, run.accum_grad_iters: 2: fits" in result.stdout
    assert "model.llm_grad_checkpoint: True:" in result.stdout


THIRTEEN_B = "train_configs/minigpt4_13b_flickr_finetune.yaml"


TINY = (
    f"model.llama_model={REPOSITORY}/tests/data/parity/vicuna_tiny",
    "model.vit_config={embed_dim: 64, depth: 3, num_heads: 4}",
    "model.qformer_config={hidden_size: 48, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 96}",
)


def checked(*options: str, gpu_gib: float = 24, gpus: int | None = None) -> str:
    """The report for the 13B Flickr30k recipe."""
    return check(Config(SimpleNamespace(cfg_path=str(REPOSITORY / THIRTEEN_B), options=list(options))), gpu_gib, gpus)


def test_13b_on_small_gpus_is_told_how_many_it_takes():
    assert "  run.parallel: fsdp on 2 GPUs: 19.42 GiB, fits" in checked()


def test_sharded_llm_is_sized_for_the_gpus_of_the_run():
    report = checked("run.parallel=fsdp", *TINY, gpus=2)
    assert "its layers spread over 2 GPUs" in report
    assert re.search(r"^LLM, gathered layers +0 +0 ", report, re.MULTILINE)


@pytest.mark.parametrize("way", ["environment", "configuration"])
def test_number_of_gpus_is_the_launchers_or_the_configurations(way, monkeypatch):
    options = ("run.parallel=fsdp",)
    if way == "environment":
        monkeypatch.setenv("WORLD_SIZE", "4")
    else:
        options = (*options, "run.world_size=4")
    assert "its layers spread over 4 GPUs" in checked(*options, *TINY)


def test_one_gpu_is_said_to_share_nothing():
    report = checked("run.parallel=fsdp", *TINY)
    assert "one GPU has all of it: --gpus N tells over how many run.parallel: fsdp spreads it" in report


def test_number_of_gpus_must_be_one_at_least():
    with pytest.raises(ConfigError, match="--gpus: 0 must be at least 1"):
        checked(gpus=0)


def test_precisions_that_do_not_go_with_fsdp_are_no_advice():
    report = checked("run.parallel=fsdp", *TINY, gpu_gib=0.5, gpus=4)
    assert "does NOT fit" in report
    assert "nf4" not in report.split("What changes that:")[1]


def test_memory_with_a_complete_feature_cache_is_told():
    report = checked("run.feature_cache=cache", *TINY)
    assert "Once run.feature_cache knows all images the vision side is not loaded: " in report


def test_options_go_over_the_file():
    result = train(
        "--cfg-path",
        "train_configs/minigpt4_flickr_finetune.yaml",
        "--check",
        "--gpus=3",
        "--options",
        "model.llama_model=weights/vicuna-13b",
        "run.parallel=fsdp",
    )
    assert "3,937,280" in result.stdout, "768 x 5120 + 5120 for the 13B LLM"
    assert "its layers spread over 3 GPUs" in result.stdout


def test_misspelt_key_is_reported_with_its_nearest_before_torch_loads():
    arguments = ["--cfg-path", "train_configs/minigpt4_flickr_finetune.yaml", "--options", "model.llama_modle=x"]
    code = f"import sys, train; assert train.main({arguments}) == 2; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, "a typo must not wait for torch"
    assert "model.llama_modle: unknown key; did you mean 'llama_model'?" in result.stderr
    assert "minigpt4_flickr_finetune.yaml" in result.stderr
    assert "Traceback" not in result.stderr
    assert train(*arguments).returncode == 2


def test_image_sizes_of_model_and_processor_must_agree():
    result = train(
        "--cfg-path", "train_configs/minigpt4_flickr_finetune.yaml", "--check", "--options", "model.image_size=448"
    )
    assert result.returncode == 2
    assert "vis_processor.train.image_size: 224 must equal model.image_size: 448" in result.stderr


def test_missing_file_is_named():
    result = train("--cfg-path", "train_configs/nothing.yaml", "--check")
    assert result.returncode == 2
    assert "train_configs/nothing.yaml" in result.stderr


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, minigpt4; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'timm', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0

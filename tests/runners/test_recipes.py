"""The shipped recipes as people run them, on tiny weights and data: only paths, sizes and lengths are replaced."""

import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "train_configs"
STAGE_1, STAGE_2 = CONFIGS / "minigpt4_stage1_pretrain.yaml", CONFIGS / "minigpt4_stage2_finetune.yaml"
FLICKR = CONFIGS / "minigpt4_flickr_finetune.yaml"
EPOCHS, ITERATIONS = 2, 3

# As in the published logs; a line may have more behind it.
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \[INFO\] "
PARAMETERS = re.compile(STAMP + r"number of trainable parameters: (\d+)")
START = re.compile(STAMP + r"Start training epoch (\d+), (\d+) iters per inner epoch\.")
AVERAGES = re.compile(STAMP + r"Averaged stats: lr: (\d\.\d{4})  loss: (\d+\.\d{4})")
TOTAL = re.compile(r"Train: data epoch: \[(\d+)\] Total time: \d+:\d\d:\d\d \(\d+\.\d{4} s / it\)")
STEP = re.compile(
    r"Train: data epoch: \[(?P<epoch>\d+)\]  \[ *(?P<iteration>\d+)/(?P<iterations>\d+)\]  eta: \d+:\d\d:\d\d  "
    r"lr: (?P<lr>\d\.\d{6})  loss: (?P<loss>\d+\.\d{4})  time: \d+\.\d{4}  data: \d+\.\d{4}(  max mem: \d+)?(  .*)?"
)
FLICKR_RATES = {0: 1.000e-6, 50: 8.25e-6, 100: 1.55e-5, 150: 2.275e-5, 200: 2.969e-5, 300: 2.930e-5, 2000: 1.191e-5}


@dataclass(frozen=True)
class Finished:
    """A run that ended well."""

    stdout: str
    stderr: str
    folder: Path

    def found(self, pattern: re.Pattern) -> list[re.Match]:
        """The lines of the whole console that have this form from their beginning to their end."""
        lines = [*self.stdout.splitlines(), *self.stderr.splitlines()]
        return [match for line in lines if (match := pattern.fullmatch(line))]

    @property
    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def _weights(parity: Path) -> list[str]:
    """Options that put the tiny parts in the place of the published ones."""
    return [
        "model.image_size=56",
        f"model.vit_weights={parity}/eva_vit_tiny.pth",
        "model.vit_config={embed_dim: 64, depth: 3, num_heads: 4}",
        f"model.q_former_model={parity}/blip2_tiny.pth",
        "model.num_query_token=8",
        "model.qformer_config={hidden_size: 48, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 96}",
        f"model.llama_model={parity}/vicuna_tiny",
    ]


def _data(name: str, **build_info: str) -> list[str]:
    """Options for one dataset: where it lies, small images, small batches."""
    places = [f"datasets.{name}.build_info.{key}={value}" for key, value in build_info.items()]
    return [*places, f"datasets.{name}.vis_processor.train.image_size=56", f"datasets.{name}.batch_size=2"]


def _image(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def _shards(folder: Path) -> str:
    """Two tars of four pairs, as img2dataset writes them; returns their brace pattern."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(4):
                key, caption = f"{shard:05d}{number:04d}", f"A photo of the harbour, number {shard}{number}!"
                files = {
                    "jpg": _image(number),
                    "txt": caption.encode(),
                    "json": json.dumps({"caption": caption}).encode(),
                }
                for ending, content in files.items():
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"{folder}/{{00000..00001}}.tar"


def _flickr(root: Path) -> Path:
    """`root` after `prepare_flickr30k.py`, from a CSV of the published form with all three splits."""
    (root / "flickr30k-images").mkdir(parents=True)
    rows = ["raw,sentids,split,filename,img_id"]
    for number in range(10):
        name, split = f"10000{number}.jpg", ("test" if number == 9 else "val" if number == 8 else "train")
        (root / "flickr30k-images" / name).write_bytes(_image(number))
        captions = json.dumps([f"Caption {place} of {number} ." for place in range(5)]).replace('"', '""')
        rows.append(f'"{captions}","[0, 1, 2, 3, 4]",{split},{name},{number}')
    (root / "flickr_annotations_30k.csv").write_text("\n".join(rows) + "\n")
    spec = importlib.util.spec_from_file_location("prepare_flickr30k", REPOSITORY / "prepare_flickr30k.py")
    prepare = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    assert prepare.main(["--root", str(root)]) == 0
    return root


@pytest.fixture(scope="module")
def options(tmp_path_factory, parity_dir, tools) -> dict[Path, list[str]]:
    """For each recipe what makes it tiny, lengths aside."""
    folder = tmp_path_factory.mktemp("data")
    align = tools["make_tiny"](folder / "align", parity_dir, 8).folder / "cc_sbu_align"
    flickr = _flickr(folder / "flickr30k")
    places = {"ann_path": f"{flickr}/flickr30k_grounded_detail.json", "image_path": f"{flickr}/flickr30k-images"}
    start = f"model.ckpt={parity_dir}/minigpt4_tiny.pth"
    stage_1 = [*_data("laion", storage=_shards(folder / "laion")), *_data("cc_sbu", storage=_shards(folder / "cc_sbu"))]
    own = {
        STAGE_1: stage_1,
        STAGE_2: [start, *_data("cc_sbu_align", storage=str(align))],
        FLICKR: [start, *_data("flickr30k_grounded_detail", **places)],
    }
    common = [*_weights(parity_dir), "run.device=cpu", "run.num_workers=1"]
    return {recipe: common + more for recipe, more in own.items()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, parity_dir, tools):
    """For its way to start `train.py`; the working directory is the repository, as in the recipes' commands."""
    return tools["make_tiny"](tmp_path_factory.mktemp("runs"), parity_dir, 1)


@pytest.fixture(scope="module")
def run(options, tiny, tmp_path_factory) -> Callable[..., Finished]:
    """Runs a recipe under torchrun with two processes, each combination once."""
    made: dict[tuple, Finished] = {}

    def run(recipe: Path, *more: str) -> Finished:
        if (recipe, more) not in made:
            output = tmp_path_factory.mktemp("output")
            lengths = [f"run.max_epoch={EPOCHS}", f"run.iters_per_epoch={ITERATIONS}", "run.log_freq=1"]
            chosen = [*options[recipe], *lengths, f"run.output_dir={output}", *more]
            result = replace(tiny, recipe=recipe).train(*chosen, processes=2, cwd=REPOSITORY, timeout=200)
            (folder,) = output.iterdir()
            made[recipe, more] = Finished(result.stdout, result.stderr, folder)
        return made[recipe, more]

    return run


@pytest.fixture(scope="module", params=[STAGE_1, STAGE_2, FLICKR], ids=lambda recipe: recipe.stem)
def finished(request, run) -> Finished:
    """Each recipe in the precision that it ships with: fp16 with a gradient scaler."""
    return run(request.param)


# Console


def test_console_has_the_published_start_lines(finished):
    (parameters,) = finished.found(PARAMETERS)
    assert parameters[1] == "4704"
    assert [match.groups() for match in finished.found(START)] == [("0", str(ITERATIONS)), ("1", str(ITERATIONS))]


def test_console_has_a_published_line_for_every_logged_step(finished):
    steps = finished.found(STEP)
    expected = [(str(epoch), str(n), str(ITERATIONS)) for epoch in range(EPOCHS) for n in range(ITERATIONS)]
    assert [match.group("epoch", "iteration", "iterations") for match in steps] == expected
    for match, record in zip(steps, finished.metrics, strict=True):
        assert match["lr"] == f"{record['lr']:.6f}"
        assert match["loss"] == f"{record['loss']:.4f}"


def test_console_has_the_published_lines_at_the_end_of_an_epoch(finished):
    assert [match[1] for match in finished.found(TOTAL)] == ["0", "1"]
    epochs = [json.loads(line) for line in (finished.folder / "log.txt").read_text().splitlines()]
    assert [f"{float(match[2]):.3f}" for match in finished.found(AVERAGES)] == [line["train_loss"] for line in epochs]


# What a run leaves


def test_every_epoch_has_its_checkpoint_of_trained_weights(finished, parity_dir):
    start = torch.load(parity_dir / "minigpt4_tiny.pth", weights_only=True)["model"]["llama_proj.weight"]
    for epoch in range(EPOCHS):
        saved = torch.load(finished.folder / f"checkpoint_{epoch}.pth", weights_only=True)
        assert set(saved["model"]) == {"llama_proj.weight", "llama_proj.bias"}
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in saved["model"].values())
        assert saved["epoch"] == epoch
        assert not torch.equal(saved["model"]["llama_proj.weight"], start)
        assert len(saved["state"]["ranks"]) == 2


def test_fp16_run_has_a_gradient_scaler(finished):
    scaler = torch.load(finished.folder / "checkpoint_1.pth", weights_only=True)["scaler"]
    assert scaler["scale"] == 65536.0  # no update was skipped
    assert not (finished.folder / "nonfinite.jsonl").exists()


def test_bf16_run_has_none_and_trains(run):
    finished = run(STAGE_2, "run.amp_dtype=bf16", "model.vit_precision=bf16", "model.llm_precision=bf16")
    assert torch.load(finished.folder / "checkpoint_1.pth", weights_only=True)["scaler"] is None
    assert len(finished.found(STEP)) == EPOCHS * ITERATIONS
    expected = [record["loss"] for record in run(STAGE_2).metrics]
    assert [record["loss"] for record in finished.metrics] == pytest.approx(expected, rel=0.02)


def test_stage_1_reads_both_sources_in_the_published_mix(run):
    finished = run(STAGE_1)
    for name, ratio in {"laion": 115, "cc_sbu": 14}.items():
        assert f"{name}/train: 2 shards" in finished.stderr
        assert (
            json.loads((finished.folder / "run.json").read_text())["config"]["datasets"][name]["sample_ratio"] == ratio
        )
    assert "4704" in finished.stderr


def test_flickr_recipe_trains_on_the_train_split_only(run):
    assert "flickr30k_grounded_detail/train: 8 records" in run(FLICKR).stderr


# Learning rates of the Flickr30k recipe


@pytest.fixture(scope="module")
def unshortened(options, tiny, tmp_path_factory, tools) -> Finished:
    """The Flickr30k recipe with its own lengths and rates, in fp32, asked to stop after iteration 300."""
    output = tmp_path_factory.mktemp("unshortened")
    exact = ["run.amp=False", "model.vit_precision=fp32", "model.llm_precision=fp32"]
    command = replace(tiny, recipe=FLICKR).command(*options[FLICKR], *exact, f"run.output_dir={output}")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=tools["environment"](), cwd=REPOSITORY
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if STEP.match(line) and "[300/500]" in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, "".join(lines)[-4000:]
    (folder,) = output.iterdir()
    return Finished("".join(lines), "", folder)


def test_rates_of_the_flickr_run_are_the_published_ones(unshortened):
    rates = {record["step"]: record["lr"] for record in unshortened.metrics}
    published = {step: rate for step, rate in FLICKR_RATES.items() if step <= 300}
    assert {step: rates[step] for step in published} == pytest.approx(published, rel=2e-4)


def test_flickr_run_logs_every_50_iterations(unshortened):
    logged = [int(match["iteration"]) for match in unshortened.found(STEP)]
    assert logged == list(range(0, 301, 50))


def test_schedule_of_the_flickr_run_has_all_published_rates(building, options, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    runner = building.build(FLICKR, *options[FLICKR], f"run.output_dir={tmp_path}")
    runner.loader.close()
    rates = {step: runner.schedule.lr_at(*divmod(step, 500)) for step in FLICKR_RATES}
    assert rates == pytest.approx(FLICKR_RATES, rel=2e-4)


# Weights & Biases


@pytest.mark.parametrize("login", [{}, {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}])
def test_run_with_wandb_waits_for_nobody(parity_dir, tools, tmp_path, login):
    """With neither a login nor a network, and with a login but no network, by the real package."""
    assert importlib.util.find_spec("wandb"), "the package wandb is needed: pip install -e .[dev]"
    tiny = tools["make_tiny"](tmp_path, parity_dir, 4)
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "no_proxy": "*", **login}
    start = time.monotonic()
    tiny.train("run.wandb_log=True", "run.max_epoch=1", "run.iters_per_epoch=2", env=home)
    assert time.monotonic() - start < 60
    (run,) = tiny.runs()
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert (run / "checkpoint_0.pth").exists()

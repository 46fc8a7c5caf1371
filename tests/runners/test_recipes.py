"""The shipped recipes as people run them, on tiny weights and data: only paths, sizes and lengths are replaced."""

import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt4.common.start_clock import PHASES

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "train_configs"
STAGE_1, STAGE_2 = CONFIGS / "minigpt4_stage1_pretrain.yaml", CONFIGS / "minigpt4_stage2_finetune.yaml"
FLICKR = CONFIGS / "minigpt4_flickr_finetune.yaml"
EPOCHS, ITERATIONS = 2, 3

# As in the published logs; a line may have more behind it.
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \[INFO\] "
PARAMETERS = STAMP + r"number of trainable parameters: (\d+)"
START = STAMP + r"Start training epoch (\d+), (\d+) iters per inner epoch\."
AVERAGES = STAMP + r"Averaged stats: lr: (\d\.\d{4})  loss: (\d+\.\d{4})"
START_UP = STAMP + r"Start-up took [\d.]+ s: " + ", ".join(rf"{name} (?:none|[\d.]+)" for name in [*PHASES, "other"])
TOTAL = r"Train: data epoch: \[(\d+)\] Total time: \d+:\d\d:\d\d \(\d+\.\d{4} s / it\)"
STEP = (
    r"Train: data epoch: \[(?P<epoch>\d+)\]  \[ *(?P<iteration>\d+)/(?P<iterations>\d+)\]  eta: \d+:\d\d:\d\d  "
    r"lr: (?P<lr>\d\.\d{6})  loss: (?P<loss>\d+\.\d{4})  time: \d+\.\d{4}  data: \d+\.\d{4}(  max mem: \d+)?(  .*)?"
)
FLICKR_RATES = {0: 1.000e-6, 50: 8.25e-6, 100: 1.55e-5, 150: 2.275e-5, 200: 2.969e-5, 300: 2.930e-5, 2000: 1.191e-5}


@dataclass(frozen=True)
class Finished:
    """A run that ended well."""

    console: str
    folder: Path

    def found(self, pattern: str) -> list[re.Match]:
        """The lines of the whole console that have this form from their beginning to their end."""
        return [match for line in self.console.splitlines() if (match := re.fullmatch(pattern, line))]

    def records(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def checkpoint(self, epoch: int) -> dict:
        return torch.load(self.folder / f"checkpoint_{epoch}.pth", weights_only=True)


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


def _data(name: str, **build_info: object) -> list[str]:
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
                caption = f"A photo of the harbour, number {shard}{number}!"
                about = json.dumps({"caption": caption}).encode()
                for ending, content in {"jpg": _image(number), "txt": caption.encode(), "json": about}.items():
                    info = tarfile.TarInfo(f"{shard:05d}{number:04d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"{folder}/{{00000..00001}}.tar"


def _flickr(root: Path, prepare: Callable) -> Path:
    """`root` after `prepare_flickr30k.py`, from a CSV of the published form with all three splits."""
    (root / "flickr30k-images").mkdir(parents=True)
    rows = ["raw,sentids,split,filename,img_id"]
    for number in range(10):
        name, split = f"10000{number}.jpg", ("test" if number == 9 else "val" if number == 8 else "train")
        (root / "flickr30k-images" / name).write_bytes(_image(number))
        captions = json.dumps([f"Caption {place} of {number} ." for place in range(5)]).replace('"', '""')
        rows.append(f'"{captions}","[0, 1, 2, 3, 4]",{split},{name},{number}')
    (root / "flickr_annotations_30k.csv").write_text("\n".join(rows) + "\n")
    assert prepare(["--root", str(root)]) == 0
    return root


@pytest.fixture(scope="module")
def options(tmp_path_factory, parity_dir, tools, load_script) -> dict[Path, list[str]]:
    """For each recipe what makes it tiny, lengths aside."""
    folder = tmp_path_factory.mktemp("data")
    align = tools["make_tiny"](folder / "align", parity_dir, 8).folder / "cc_sbu_align"
    flickr = _flickr(folder / "flickr30k", load_script("prepare_flickr30k.py").main)
    places = {"ann_path": f"{flickr}/flickr30k_grounded_detail.json", "image_path": f"{flickr}/flickr30k-images"}
    start = f"model.ckpt={parity_dir}/minigpt4_tiny.pth"
    own = {
        STAGE_1: [argument for name in ("laion", "cc_sbu") for argument in _data(name, storage=_shards(folder / name))],
        STAGE_2: [start, *_data("cc_sbu_align", storage=align)],
        FLICKR: [start, *_data("flickr30k_grounded_detail", **places)],
    }
    common = [*_weights(parity_dir), "run.device=cpu", "run.num_workers=1"]
    return {recipe: common + more for recipe, more in own.items()}


@pytest.fixture(scope="module")
def run(options, tmp_path_factory, parity_dir, tools, warm) -> Callable[..., Finished]:
    """Runs a recipe with two processes, each combination once, from the repository."""
    tiny = tools["make_tiny"](tmp_path_factory.mktemp("runs"), parity_dir, 1)
    made: dict[tuple, Finished] = {}

    def run(recipe: Path, *more: str) -> Finished:
        if (recipe, more) not in made:
            output = tmp_path_factory.mktemp("output")
            lengths = [f"run.max_epoch={EPOCHS}", f"run.iters_per_epoch={ITERATIONS}", "run.log_freq=1"]
            chosen = [*options[recipe], *lengths, f"run.output_dir={output}", *more]
            own = replace(tiny, folder=REPOSITORY, recipe=recipe)
            result = warm.train(own, *chosen, processes=2, apart=True)
            (folder,) = output.iterdir()
            made[recipe, more] = Finished(result.out.read_text() + result.text(), folder)
        return made[recipe, more]

    return run


@pytest.fixture(scope="module", params=[STAGE_1, STAGE_2, FLICKR], ids=lambda recipe: recipe.stem)
def finished(request, run) -> Finished:
    """Each recipe in the precision that it ships with: fp16 with a gradient scaler."""
    return run(request.param)


def test_console_has_the_published_lines(finished):
    (parameters,) = finished.found(PARAMETERS)
    assert parameters[1] == "4704"
    assert len(finished.found(START_UP)) == 1
    assert [match.groups() for match in finished.found(START)] == [("0", str(ITERATIONS)), ("1", str(ITERATIONS))]
    steps = finished.found(STEP)
    expected = [(str(epoch), str(n), str(ITERATIONS)) for epoch in range(EPOCHS) for n in range(ITERATIONS)]
    assert [match.group("epoch", "iteration", "iterations") for match in steps] == expected
    for match, record in zip(steps, finished.records("metrics.jsonl"), strict=True):
        assert (match["lr"], match["loss"]) == (f"{record['lr']:.6f}", f"{record['loss']:.4f}")
    assert [match[1] for match in finished.found(TOTAL)] == ["0", "1"]
    means = [line["train_loss"] for line in finished.records("log.txt")]
    assert [f"{float(match[2]):.3f}" for match in finished.found(AVERAGES)] == means


def test_every_epoch_has_its_checkpoint_of_trained_weights(finished, parity_dir):
    start = torch.load(parity_dir / "minigpt4_tiny.pth", weights_only=True)["model"]["llama_proj.weight"]
    for epoch in range(EPOCHS):
        saved = finished.checkpoint(epoch)
        assert set(saved["model"]) == {"llama_proj.weight", "llama_proj.bias"}
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in saved["model"].values())
        assert saved["epoch"] == epoch
        assert not torch.equal(saved["model"]["llama_proj.weight"], start)
        assert len(saved["state"]["ranks"]) == 2
        assert saved["scaler"]["scale"] == 65536.0  # no update was skipped
    assert not (finished.folder / "nonfinite.jsonl").exists()


def test_bf16_run_has_no_scaler_and_trains(run):
    finished = run(STAGE_2, "run.amp_dtype=bf16", "model.vit_precision=bf16", "model.llm_precision=bf16")
    assert finished.checkpoint(1)["scaler"] is None
    expected = [record["loss"] for record in run(STAGE_2).records("metrics.jsonl")]
    assert [record["loss"] for record in finished.records("metrics.jsonl")] == pytest.approx(expected, rel=0.02)


def test_recipes_read_their_sources_in_the_published_mix(run):
    stage_1 = run(STAGE_1)
    config = json.loads((stage_1.folder / "run.json").read_text())["config"]
    for name, ratio in {"laion": 115, "cc_sbu": 14}.items():
        assert f"{name}/train: 2 shards" in stage_1.console
        assert config["datasets"][name]["sample_ratio"] == ratio
    assert "flickr30k_grounded_detail/train: 8 records" in run(FLICKR).console


def test_schedule_of_the_flickr_run_has_the_published_rates(building, options, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    runner = building.build(FLICKR, *options[FLICKR], f"run.output_dir={tmp_path}")
    runner.loader.close()
    assert (runner.run.iters_per_epoch, runner.run.log_freq) == (500, 50)
    rates = {step: runner.schedule.lr_at(*divmod(step, 500)) for step in FLICKR_RATES}
    assert rates == pytest.approx(FLICKR_RATES, rel=2e-4)

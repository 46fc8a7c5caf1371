"""What happens to long runs: helpers to prepare and to compare them."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml


def change(tiny: Any, **sections: object) -> Any:
    """Replace whole sections of the recipe, and keys of `run`."""
    recipe = yaml.safe_load(tiny.recipe.read_text())
    recipe["run"].update(sections.pop("run", {}))
    tiny.recipe.write_text(yaml.safe_dump({**recipe, **sections}))
    return tiny


def plug_in(tiny: Any, name: str, **run: object) -> Any:
    """Have the recipe import plugins/NAME.py, with these keys of `run`."""
    shutil.copy(Path(__file__).with_name("plugins") / f"{name}.py", tiny.folder)
    return change(tiny, imports=[name], run=run)


def make_tricky(tiny: Any, kind: str) -> Any:
    """Give `tiny` data with bad samples, `json` (cc_sbu_align), `shards` (laion) or `mixed`, and 2 epochs of 7."""
    folder, images = tiny.folder, tiny.folder / "cc_sbu_align" / "image"
    shards = [_shard(folder / f"{number}.tar", sorted(images.iterdir())[number::3]) for number in range(3)]
    shards[2].write_bytes(shards[2].read_bytes()[:-6000])
    (images / "3.jpg").unlink()
    (images / "4.jpg").write_bytes((images / "5.jpg").read_bytes()[:700])
    datasets = yaml.safe_load(tiny.recipe.read_text())["datasets"]
    align = datasets["cc_sbu_align"]
    laion = {**align, "build_info": {"storage": f"{folder}/{{0..2}}.tar"}, "sample_ratio": 2}
    chosen = {"json": {"cc_sbu_align": align}, "shards": {"laion": laion}}
    chosen["mixed"] = {**chosen["json"], **chosen["shards"]}
    return change(tiny, datasets=chosen[kind], run={"max_bad_share": 0.6, "iters_per_epoch": 7})


def make_llava(tiny: Any, section: dict[str, Any], folder: Path) -> Any:
    """Give `tiny` a LLaVA, and conversations with images and without, one of a kind a step; an image is lost."""
    records = json.loads((folder / "data" / "instruct.json").read_text())
    records[4]["image"] = "lost.png"
    (tiny.folder / "talks.json").write_text(json.dumps(records))
    images = folder.with_name("parity") / "images"
    info = {"ann_path": str(tiny.folder / "talks.json"), "image_path": str(images), "id_field": "id"}
    talks = {"builder": "llava_conversations", "build_info": info, "batch_size": 2, "group_by_modality_length": True}
    steps = {"lr_sched": "cosine_lr", "accum_loss": "mean_of_means", "max_grad_norm": 1.0, "warmup_ratio": 0.03}
    return change(tiny, model=section, datasets={"talks": talks}, run={**steps, "max_bad_share": 0.6})


def _shard(path: Path, images: list[Path]) -> Path:
    """A tar of these images with captions; the caption of the first is empty."""
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images):
            caption = image.with_suffix(".txt")
            caption.write_text(f"A photo of {image.stem}." if number else " ")
            tar.add(image, image.name)
            tar.add(caption, caption.name)
            caption.unlink()
    return path


def alike(first: object, second: object) -> bool:
    """Equal, tensors bit for bit, whatever lies in what."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(alike(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(alike, first, second))
    return first == second


def logged(run: Path) -> list[tuple]:
    """(step, loss, rate) of each line of `metrics.jsonl`."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["lr"]) for line in lines]


def final(run: Path, name: str = "checkpoint_1.pth") -> dict:
    """Content of the last checkpoint, all but the configuration."""
    content = torch.load(run / name, weights_only=True)
    return {key: value for key, value in content.items() if key != "config"}


def bad_samples(run: Path) -> list[tuple]:
    """What was noted of them, each as often as it was; ranks write in any order."""
    lines = map(json.loads, (run / "bad_samples.jsonl").read_text().splitlines())
    return sorted((line["rank"], line["batch"], line["source"], line["key"]) for line in lines)


def compare(run: Path, whole: Path) -> None:
    """Asserts that a run ended as another did, to the bit, and noted the same."""
    assert alike(final(run), final(whole))
    assert logged(run) == logged(whole)
    assert (run / "log.txt").read_text() == (whole / "log.txt").read_text()
    assert bad_samples(run) == bad_samples(whole)


@pytest.fixture(scope="session")
def tools(tools: dict[str, Any]) -> dict[str, Any]:
    """The helpers of all runs, and the functions above."""
    functions = (plug_in, prepare_pause, alike, logged, final, compare)
    return {**tools, **{function.__name__: function for function in functions}}


@pytest.fixture(scope="session")
def make(
    tmp_path_factory: pytest.TempPathFactory,
    parity_dir: Path,
    llava_dir: Path,
    llava_section: Callable[..., dict[str, Any]],
    tools: dict[str, Any],
) -> Callable[[str], Any]:
    """Makes a Tiny with bad samples: `json`, `shards`, `mixed` or `llava`."""

    def make(kind: str) -> Any:
        tiny = tools["make_tiny"](tmp_path_factory.mktemp("run"), parity_dir, count=11)
        section = llava_section(model_type="v1", image_size=56, ckpt_allow_keys=["llama_model.*"])
        return make_llava(tiny, section, llava_dir) if kind == "llava" else make_tricky(tiny, kind)

    return make


@pytest.fixture(scope="session")
def undisturbed(make: Callable[[str], Any], warm: Any) -> Callable[..., Path]:
    """`undisturbed(kind, *options, processes=1)`: the folder of such a run from its start to its end, made once."""
    folders: dict[tuple, Path] = {}

    def run(kind: str, *options: str, processes: int = 1) -> Path:
        made = (kind, options, processes)
        if made not in folders:
            tiny = make(kind)
            warm.train(tiny, *options, processes=processes)
            (folders[made],) = tiny.runs()
        return folders[made]

    return run


@pytest.fixture
def paused(warm: Any, tools: dict[str, Any]) -> Callable[..., Any]:
    """`paused(tiny, steps, *options, processes=1)`: a start of which every rank waits after so many iterations."""

    def start(tiny: Any, steps: int, *options: str, processes: int = 1) -> Any:
        pause = prepare_pause(tiny, steps)
        run = warm.start(tiny, *options, processes=processes)
        for rank in range(processes):
            run.wait_for(f"rank {rank} pauses")
        pause.unlink()
        return run

    return start


def prepare_pause(tiny: Any, steps: int, task: str = "pausing") -> Path:
    """Have the next start wait for a file `go`; returns the file that says so."""
    plug_in(tiny, "pausing", task=task)
    (tiny.folder / "go").unlink(missing_ok=True)
    pause = tiny.folder / "pause"
    pause.write_text(str(steps))
    return pause

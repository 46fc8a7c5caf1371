"""Whole evaluations on tiny weights: in this process, or as processes of their own."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from minigpt4.common.config import Config
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.processors import open_image
from minigpt4.processors.blip_processors import Blip2ImageEvalProcessor

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "eval_configs" / "minigpt4_flickr_eval.yaml"
IMAGES = 11
CAPTIONS = (
    "A brown dog sleeps on a red blanket .",
    "Two people walk along the river .",
    "The table is set for dinner .",
    "A yellow bus waits at the station .",
)
FAST = ("--metrics", "BLEU", "CIDEr", "ROUGE-L")
"""METEOR takes eight seconds to start; and the plot of a single metric a second less than that of these."""


@dataclass(frozen=True)
class Evaluation:
    """A folder with data, checkpoints and a configuration, and a command that evaluates them."""

    folder: Path
    config: Path
    script: ModuleType
    checkpoints: Sequence[str]
    """As `--ckpt` takes them."""

    tiny: Mapping[str, Any]
    """Keys of `model:`."""

    more: Sequence[str] = ()
    """Further arguments."""

    def arguments(self, name: str, *more: str, checkpoints: Sequence[str] | None = None) -> list[str]:
        """The command line; `name` is that of the folder for the results."""
        chosen = self.checkpoints if checkpoints is None else checkpoints
        save = ["--save_path", str(self.folder / name)]
        return ["--cfg-path", str(self.config), "--ckpt", *chosen, *save, *self.more, *more]

    def run(self, name: str, *more: str, checkpoints: Sequence[str] | None = None) -> Path:
        """Evaluate in this process; asserts success and returns the folder of the results."""
        assert self.script.main(self.arguments(name, *more, checkpoints=checkpoints)) == 0
        return self.folder / name

    def start(self, warm: Any, name: str, processes: int = 1) -> Any:
        """Evaluate in processes of their own, one thread each; the plugins of the folder are on the path."""
        arguments = self.arguments(name)
        return warm.script(self.script.__file__, *arguments, cwd=REPOSITORY, processes=processes, path=(self.folder,))

    def with_plugin(self, name: str) -> "Evaluation":
        """The same with a configuration that imports plugins/NAME.py."""
        shutil.copy(Path(__file__).with_name("plugins") / f"{name}.py", self.folder)
        config = self.config.with_name(f"{name}.yaml")
        config.write_text(yaml.safe_dump({"imports": [name], **yaml.safe_load(self.config.read_text())}))
        return replace(self, config=config)

    def take(self, shipped: Path) -> None:
        """Take over a shipped configuration with tiny weights and short answers; paths of data stay as shipped."""
        shutil.copy(shipped, self.config)
        decoding = yaml.safe_load(shipped.read_text())["run"]["generation"] | {"max_new_tokens": 12}
        run = {"batch_size_eval": 3, "num_workers": 0, "device": "cpu", "generation": decoding}
        self.change(model=self.tiny, run=run, dataset={"vis_processor": {}})

    def change(self, dataset: Mapping[str, Any] | None = None, **sections: Mapping[str, Any]) -> None:
        """Change keys of `model`, `run` or the datasets."""
        config = yaml.safe_load(self.config.read_text())
        for section, keys in sections.items():
            config[section].update(keys)
        for own in config.get("datasets", {}).values():
            own.update(dataset or {})
        self.config.write_text(yaml.safe_dump(config))


def make_evaluation(folder: Path, script: ModuleType, parity: Path, tiny: Mapping[str, Any]) -> Evaluation:
    """Data, three checkpoints, and the shipped configuration with other paths and sizes."""
    torch.set_num_threads(1)
    _write_data(folder)
    _write_checkpoints(folder, parity)
    checkpoints = [f"pretrained={folder}/start.pth", *(f"{folder}/checkpoint_{n}.pth" for n in (0, 1))]
    model = {**tiny, "prompt_path": str(parity / "prompts_tiny.txt")}
    evaluation = Evaluation(folder, folder / "evaluation.yaml", script, checkpoints, model, FAST)
    evaluation.take(CONFIG)
    info = {"ann_path": "nobody/needs/the/training/file.json", "test_ann_path": str(folder / "test.json")}
    evaluation.change(dataset={"build_info": info | {"image_path": str(folder / "images")}})
    return evaluation


def _write_data(folder: Path) -> None:
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    records = []
    for number in range(IMAGES):
        pixels = random.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"10{number}.jpg")
        captions = [CAPTIONS[(number + place) % 4] for place in range(1 + number % 5)]
        records.append({"image_id": f"10{number}", "grounded_caption": " ".join(captions), "captions": captions})
    (folder / "test.json").write_text(json.dumps(records))


def _write_checkpoints(folder: Path, parity: Path) -> None:
    published = torch.load(parity / "minigpt4_tiny.pth", weights_only=True)["model"]
    start = {name: tensor for name, tensor in published.items() if name.startswith("llama_proj")}
    for number, name in enumerate(("start", "checkpoint_0", "checkpoint_1")):
        noise = torch.Generator().manual_seed(number)
        changed = {key: t + 0.05 * number * torch.randn(t.shape, generator=noise) for key, t in start.items()}
        torch.save({"model": changed}, folder / f"{name}.pth")


@pytest.fixture(scope="session")
def command(load_script: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """`command("score_captions")`: that script as a module."""
    return lambda name: load_script(f"eval_scripts/{name}.py")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, command: Callable, parity_dir: Path, tiny_section: Callable):
    """An `Evaluation` whose data nobody changes."""
    folder = tmp_path_factory.mktemp("evaluation")
    return make_evaluation(folder, command("eval_flickr30k"), parity_dir, tiny_section(ckpt=None))


@pytest.fixture
def own(tmp_path: Path, command: Callable, parity_dir: Path, tiny_section: Callable) -> Evaluation:
    """An evaluation of the test's own, with one metric."""
    evaluation = make_evaluation(tmp_path, command("eval_flickr30k"), parity_dir, tiny_section(ckpt=None))
    return replace(evaluation, more=("--metrics", "ROUGE-L"))


@pytest.fixture(scope="session")
def complete(shared: Evaluation) -> Path:
    """The results of all three checkpoints by one process."""
    return shared.run("complete")


@pytest.fixture(scope="session")
def last_model(shared: Evaluation) -> MiniGPT4:
    """The model of the last checkpoint."""
    config = Config(shared.script.parse_args(shared.arguments("unused")))
    model = MiniGPT4.from_config(config.validate(training=False).model).eval()
    model.load_checkpoint(shared.folder / "checkpoint_1.pth")
    return model


@pytest.fixture(scope="session")
def alone(shared: Evaluation, last_model: MiniGPT4) -> Callable[..., str]:
    """`alone(image, prompt)`: what the last checkpoint says to a prompt, the first of the model without one."""
    processor = Blip2ImageEvalProcessor(image_size=56)

    def generate(image: str | None, prompt: str = "", max_new_tokens: int = 12) -> str:
        pixels = processor(open_image(shared.folder / "images" / image))[None] if image else None
        prompts = [prompt or last_model.prompt_list[0]]
        return last_model.generate(pixels, prompts, max_new_tokens=max_new_tokens, stop=["###"])[0]

    return generate

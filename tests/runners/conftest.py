"""Whole runs of `train.py` on tiny weights: as processes of their own, alone or under torchrun."""

import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
CAPTIONS = (
    "A brown dog sleeps on a red blanket.",
    "Two people walk along the river.",
    "The table is set for dinner.",
    "A yellow bus waits at the station.",
    "There are many boats in the harbour.",
)

RECIPE = """
model:
  arch: minigpt4
  model_type: pretrain_vicuna0
  image_size: 56
  vit_weights: {parity}/eva_vit_tiny.pth
  vit_config: {{embed_dim: 64, depth: 3, num_heads: 4}}
  q_former_model: {parity}/blip2_tiny.pth
  num_query_token: 8
  qformer_config: {{hidden_size: 48, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 96}}
  llama_model: {parity}/vicuna_tiny
  vit_precision: fp32
  llm_precision: fp32
  ckpt: {parity}/minigpt4_tiny.pth
  prompt_path: {parity}/prompts_tiny.txt
  prompt_template: '###Human: {{}} ###Assistant: '
  max_txt_len: 60
  end_sym: '###'
datasets:
  cc_sbu_align:
    batch_size: 2
    build_info: {{storage: {folder}/cc_sbu_align}}
    vis_processor: {{train: {{name: blip2_image_train, image_size: 56}}}}
run:
  task: image_text_pretrain
  init_lr: 2e-3
  min_lr: 2e-4
  warmup_lr: 1e-5
  warmup_steps: 5
  max_epoch: 2
  iters_per_epoch: 10
  num_workers: 0
  log_freq: 1
  output_dir: {folder}/output
  device: cpu
  amp: False
"""


@dataclass(frozen=True)
class Tiny:
    """A folder with data and a recipe, and how to run it."""

    folder: Path
    recipe: Path

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def command(self, *options: str, processes: int = 1, launcher: tuple[str, ...] = ()) -> list[str]:
        """`train.py` with these options, under torchrun if there are several processes."""
        script = [str(REPOSITORY / "train.py"), "--cfg-path", str(self.recipe)]
        script += ["--options", *options] if options else []
        if processes == 1 and not launcher:
            return [sys.executable, *script]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        return [*torchrun, "--standalone", *launcher, *script]

    def train(self, *options: str, processes: int = 1, env: dict[str, str] | None = None, **more):
        """Run to the end; asserts success."""
        result = subprocess.run(
            self.command(*options, processes=processes, **more),
            capture_output=True,
            text=True,
            timeout=300,
            env=environment(env),
            cwd=self.folder,
        )
        assert result.returncode == 0, result.stderr[-6000:]
        return result

    def start(self, *options: str, processes: int = 1, env: dict[str, str] | None = None, **more) -> subprocess.Popen:
        """Run in the background, stderr and stdout together."""
        return subprocess.Popen(
            self.command(*options, processes=processes, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(env),
            cwd=self.folder,
        )

    def runs(self) -> list[Path]:
        """Run folders, oldest first."""
        return sorted(path for path in self.output.iterdir() if path.is_dir())


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """This environment with one thread a process, and the package on the path."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(more or {})}


def losses(run: Path) -> dict[int, float]:
    """Loss of rank 0 by global step, from `metrics.jsonl` (log_freq 1)."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Trained weights of a checkpoint."""
    return torch.load(checkpoint, weights_only=True)["model"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def tiny(tmp_path: Path, parity_dir: Path) -> Tiny:
    """24 images with captions and a stage-2 recipe of 2 x 10 iterations."""
    return make_tiny(tmp_path, parity_dir)


@pytest.fixture(scope="session")
def tools() -> dict[str, Callable]:
    """Helpers that tests cannot import from here."""
    functions = (losses, weights, same, environment, make_tiny, make_tricky, change, alike, free_port)
    return {function.__name__: function for function in functions}


def make_tiny(folder: Path, parity: Path, count: int = 24) -> Tiny:
    """Write data and recipe into `folder`."""
    random = np.random.default_rng(0)
    images = folder / "cc_sbu_align" / "image"
    images.mkdir(parents=True)
    annotations = []
    for number in range(count):
        Image.fromarray(random.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(images / f"{number}.jpg")
        caption = f"{CAPTIONS[number % len(CAPTIONS)]} It is number {number}."
        annotations.append({"image_id": str(number), "caption": caption})
    (images.parent / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(parity=parity, folder=folder))
    return Tiny(folder, recipe)


def change(tiny: Tiny, **sections: object) -> Tiny:
    """Replace whole sections of the recipe, and keys of `run`."""
    recipe = yaml.safe_load(tiny.recipe.read_text())
    recipe["run"].update(sections.pop("run", {}))
    tiny.recipe.write_text(yaml.safe_dump({**recipe, **sections}))
    return tiny


def make_tricky(folder: Path, parity: Path, kind: str) -> Tiny:
    """A recipe on data with bad samples: `json` (cc_sbu_align), `shards` (laion) or `mixed`, 2 epochs of 7."""
    tiny = make_tiny(folder, parity, count=11)
    images = folder / "cc_sbu_align" / "image"
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


WAIT = 120.0
"""Seconds after which a test gives up on a process."""


def until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    """Look again and again until it holds; fails with `what` when it takes too long."""
    end = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"timeout: {what()}")
        time.sleep(0.002)


@dataclass
class WarmRun:
    """The processes of one run, by rank, and what they wrote."""

    server: "WarmServer"
    pids: list[int]
    log: Path

    def __post_init__(self) -> None:
        self.statuses: list[int | None] = [None] * len(self.pids)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def alive(self) -> bool:
        """Whether any process still runs."""
        for rank, pid in enumerate(self.pids):
            if self.statuses[rank] is None:
                self.statuses[rank] = self.server.ask({"poll": pid})
        return None in self.statuses

    def wait_for(self, *texts: str) -> None:
        """Until the log holds one of the texts; fails if the run ends before."""

        def seen() -> bool:
            alive = self.alive()
            found = any(text in self.text() for text in texts)
            assert found or alive, f"ended without {texts}: {self.text()[-4000:]}"
            return found

        until(seen, lambda: f"no {texts} in {self.text()[-4000:]}")

    def send(self, number: signal.Signals, rank: int = 0) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """Kill -9 for every process, workers of the loaders included."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> list[int | None]:
        """Exit statuses by rank."""
        until(lambda: not self.alive(), lambda: f"still running: {self.text()[-4000:]}")
        return self.statuses


class WarmServer:
    """Starts `train.py` in a tenth of the time, from a process that has imported everything (see warm_server.py)."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._runs: list[WarmRun] = []
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def ask(self, request: dict) -> int | None:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, tiny: Tiny, *options: str, processes: int = 1) -> WarmRun:
        """A run in the background; several processes are launched by environment variables, as srun does."""
        log = self._logs / f"{len(self._runs)}.log"
        argv = ["--cfg-path", str(tiny.recipe), *(["--options", *options] if options else [])]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        pids = []
        for rank in range(processes):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            pids.append(self.ask({"argv": argv, "env": env, "cwd": str(tiny.folder), "log": str(log)}))
        self._runs.append(WarmRun(self, pids, log))
        return self._runs[-1]

    def train(self, tiny: Tiny, *options: str, processes: int = 1) -> WarmRun:
        """Run to the end; asserts success."""
        run = self.start(tiny, *options, processes=processes)
        assert run.wait() == [0] * processes, run.text()[-6000:]
        return run

    def close(self) -> None:
        for run in self._runs:
            if run.alive():
                run.kill()
        self._process.stdin.close()
        self._process.wait(10)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmServer]:
    """Starts runs of a Tiny quickly."""
    server = WarmServer(tmp_path_factory.mktemp("warm"))
    yield server
    server.close()

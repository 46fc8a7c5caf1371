"""Shared fixtures: the golden numbers of the reference implementation (see tests/data/parity/README.md), a chat server,
a browser."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny matrices, and as many processes as cores
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each process would compile the package anew
sys.dont_write_bytecode = False

BROWSER_TESTS = "MINIGPT4_BROWSER_TESTS"
"""Set to `required`, as `.ci/run` does, a missing browser is a failure; else the tests are skipped with the reason."""
PARITY = Path(__file__).parent / "data" / "parity"
LLAVA = PARITY.with_name("parity_llava")
QFORMER = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
TOGETHER = {
    "mock GPU": ("mock_gpu/",),
    "two ranks": ("runners/test_finite.py", "runners/test_updates.py", "runners/test_validation.py"),
    "mini world": ("mini/test_quickstart.py", "mini/test_llava.py", "test_install.py", "docs/test_notebook.py"),
}
LONGEST = (
    *("mini world", "mock GPU", "runners/lifetime/test_kill.py", "scripts/test_ablate.py"),
    *("runners/lifetime/test_resume.py", "curation/test_curate.py", "runners/lifetime/test_signals.py"),
    *("runners/test_recipes.py", "runners/lifetime/test_feature_cache.py", "two ranks", "runners/test_sharded.py"),
    *("evaluation/test_lmms_eval_adapter.py", "test_export.py", "eval_scripts/test_eval_flickr30k.py"),
    *("runners/lifetime/test_starts.py", "runners/lifetime/test_full_disk.py", "serving/test_page_in_browser.py"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-factor", type=int, default=1, help="so many times the cases of tests/fuzz, and kills")
    parser.addoption("--fuzz-seed", type=int, default=0, help="other cases in tests/fuzz")
    parser.addoption("--pictures", help="folder for pictures of pages, as docs has them")


def unit_of(nodeid: str) -> str:
    """What one process of `-n` runs: a file, or files that share what takes long to make."""
    file = nodeid.partition("::")[0].removeprefix("tests/")
    return next((name for name, files in TOGETHER.items() if file.startswith(files)), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Units(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    return Units(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end every process of `-n` has short ones left."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(unit_of(item.nodeid), len(places)))


@pytest.fixture(scope="session")
def fuzz_factor(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--fuzz-factor")


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    return PARITY


@pytest.fixture(scope="session")
def golden() -> dict:
    """Inputs and expected results that are not tensors, by section."""
    return json.loads((PARITY / "golden.json").read_text())


@pytest.fixture(scope="session")
def golden_tensors() -> dict:
    """All expected tensors, named `<section>/<case>/<name>`."""
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(PARITY.glob("golden_*.safetensors")):
        tensors.update(load_file(file))
    return tensors


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLM of the mini world, written once, for tests that are about something else."""
    from minigpt4.mini.files import write_language_model

    folder = tmp_path_factory.mktemp("mini") / "llm"
    write_language_model(folder)
    return folder


@pytest.fixture(scope="session")
def shallow_language_model(tmp_path_factory: pytest.TempPathFactory, language_model: Path) -> Path:
    """The same with 2 of its 30 layers, for tests where nobody asks what it says."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(language_model, tmp_path_factory.mktemp("mini") / "shallow"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    weights = load_file(language_model / "model.safetensors")
    kept = {name: weights[name] for name in weights if int((*re.findall(r"layers\.(\d+)", name), 0)[0]) < 2}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to put into PYTHONPATH, with the package as its wheel installs it, without the checkout."""
    folder, source = tmp_path_factory.mktemp("wheel"), Path(__file__).parents[1]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    copy = folder / "source"  # building writes beside the sources
    left_out = shutil.ignore_patterns(".*", "data", "output", "build", "docs", "tests", "__pycache__", "*.egg-info")
    shutil.copytree(source, copy, ignore=left_out)
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(copy)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    shutil.rmtree(copy)
    return folder / "site"


def load(name: str, file: Path | None = None) -> Any:
    """A module beside this file, or of another file, which tests cannot import by its name; once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file or Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], Any]:
    """`load_script("scripts/caption.py")`: a command of the repository as a module."""
    return lambda file: load(f"command {file}", Path(__file__).parents[1] / file)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts scripts of the repository in a tenth of the time; see warm.py."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    # peft looks for a GPU when it is imported, which the mock of CUDA must not see before a fork
    server = load("warm").WarmServer(tmp_path_factory.mktemp("warm"), environment, load("supervised"), "peft")
    yield server
    server.close()


@pytest.fixture
def chat_server() -> Iterator[Any]:
    """A fresh chat endpoint on this machine; see judge_server.py."""
    server = load("judge_server").ChatServer()
    yield server
    server.stop()


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`flaky(folder, ...)`: a web server that fails, see flaky_server.py, and tries that do not wait for long."""
    from minigpt4.common import remote

    monkeypatch.setattr(remote, "FIRST_WAIT", 1e-3)
    servers = []

    def start(*args: Any, **keys: Any) -> Any:
        servers.append(load("flaky_server").FlakyServer(*args, **keys))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that can be made read-only; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], capture_output=True).returncode:
        pytest.skip("cannot mount a disk here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of Debian's Chromium, which playwright drives."""
    found = shutil.which("chromium")
    lack = None if found else "there is no chromium on the PATH"
    if importlib.util.find_spec("playwright") is None:
        lack = "the package playwright is missing"
    if lack is None:
        return found
    reason = f'{lack}: apt-get install chromium; pip install -e ".[dev]"'
    if os.environ.get(BROWSER_TESTS) == "required":
        pytest.fail(f"{BROWSER_TESTS} is 'required', but {reason}")
    return pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers give little shared memory, and Chromium's own sandbox refuses to run as root.
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--disable-dev-shm-usage", "--disable-gpu"], timeout=300_000
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def make_png() -> Callable[[int, int], bytes]:
    """`make_png(width, height)`: a valid PNG of one grey bit a pixel, made row by row, which takes no memory."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    def png(width: int, height: int) -> bytes:
        header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
        packer = zlib.compressobj()
        row = bytes(1 + (width + 7) // 8)
        many = max(1, (1 << 20) // len(row))
        counts = [many] * (height // many) + [height % many]
        rows = b"".join([packer.compress(row * count) for count in counts]) + packer.flush()
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")

    return png


@pytest.fixture(scope="session")
def tiny_section(parity_dir) -> Callable[..., dict[str, Any]]:
    """`model:` section of the reference's tiny model in fp32, with changes by keyword."""

    def section(**changes: Any) -> dict[str, Any]:
        published = "minigpt4_tiny.pth" if changes.get("has_qformer", True) else "minigpt4_tiny_noqformer.pth"
        return {
            "image_size": 56,
            "vit_weights": str(parity_dir / "eva_vit_tiny.pth"),
            "vit_config": {"embed_dim": 64, "depth": 3, "num_heads": 4},
            "vit_precision": "fp32",
            "q_former_model": str(parity_dir / "blip2_tiny.pth"),
            "qformer_config": dict(QFORMER),
            "num_query_token": 8,
            "llama_model": str(parity_dir / "vicuna_tiny"),
            "llm_precision": "fp32",
            "ckpt": str(parity_dir / published),
            "truncate_end_sym": True,  # as the reference does
        } | changes

    return section


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost more than they give on matrices as small as those of the tiny model, most on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def build_model(tiny_section) -> Callable[..., Any]:
    """A model of its own for the test, from `tiny_section(**changes)`."""

    def build(**changes: Any) -> Any:
        from minigpt4.models.mini_gpt4 import MiniGPT4

        return MiniGPT4.from_config(tiny_section(**changes))

    return build


@pytest.fixture(scope="session")
def shared_model(build_model) -> Callable[..., Any]:
    """The same as `build_model`, built once for the whole run; nobody changes it."""
    built: dict[str, Any] = {}

    def shared(**changes: Any) -> Any:
        key = repr(sorted(changes.items()))
        if key not in built:
            built[key] = build_model(**changes).eval()
        return built[key]

    return shared


@pytest.fixture(scope="session")
def llava_dir() -> Path:
    """Golden numbers and tiny weights of the LLaVA reference; its README says what they are."""
    return LLAVA


@pytest.fixture(scope="session")
def llava_section() -> Callable[..., dict[str, Any]]:
    """`model:` section of the reference's tiny LLaVA in fp32 with a projector of its own, with changes by keyword."""

    def section(**changes: Any) -> dict[str, Any]:
        projector = LLAVA / f"projector_{changes.get('projection', 'linear')}.bin"
        return {
            "arch": "llava",
            "vit_model": str(LLAVA / "clip_tiny"),
            "vit_precision": "fp32",
            "llama_model": str(LLAVA / "vicuna_tiny"),
            "llm_precision": "fp32",
            "ckpt": str(projector) if projector.is_file() else None,
        } | changes

    return section


@pytest.fixture(scope="session")
def build_llava(llava_section) -> Callable[..., Any]:
    """A model of its own for the test, from `llava_section(**changes)`."""

    def build(**changes: Any) -> Any:
        from minigpt4.models.mini_gpt4 import VisionLanguageModel

        return VisionLanguageModel.from_config(llava_section(**changes))

    return build


@pytest.fixture(scope="session")
def write_recipe() -> Callable[..., Path]:
    """`write_recipe(folder, section, **run)`: a YAML file with this `model:`, and no data unless it is given."""

    def write(folder: Path, section: dict[str, Any], datasets: dict[str, Any] | None = None, **run: Any) -> Path:
        import yaml

        content = {"model": section, "datasets": datasets or {}, "run": {"task": "image_text_pretrain", **run}}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
        return folder / "recipe.yaml"

    return write


@pytest.fixture
def demo_config(tmp_path, tiny_section, write_recipe) -> Path:
    """A YAML file to talk to the tiny model."""
    return write_recipe(tmp_path, tiny_section(arch="minigpt4", model_type="pretrain_vicuna0", end_sym="###"))


@pytest.fixture(scope="session")
def siglip_tower(tmp_path_factory) -> str:
    """The directory of a tiny SigLIP, as wide as the tiny CLIP."""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    folder = str(tmp_path_factory.mktemp("siglip"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=56, patch_size=14)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder)
    return folder

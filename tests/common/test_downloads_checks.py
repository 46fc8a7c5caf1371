"""Is a file of weights whole? Files as torch and safetensors write them, and as links break them."""

import hashlib
import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from minigpt4.common.errors import WeightsError
from minigpt4.common.torch_files import check_opens, digest


def test_checks_know_torch_zip_old_torch_and_safetensors(tmp_path):
    tensors = {"w": torch.ones(3)}
    torch.save(tensors, tmp_path / "new.pth")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "a.safetensors")
    for path in tmp_path.iterdir():
        check_opens(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        ("a.pth", b"hello", "neither a torch file nor safetensors"),
        ("a.pth", b"PK\x03\x04" + bytes(600), "whose end is missing"),
        ("a.safetensors", b"\xff" * 600, "not a safetensors file"),
        ("a.safetensors", (9).to_bytes(8, "little") + b"[1, 2, 3]", "broken safetensors header"),
    ],
)
def test_checks_refuse_what_is_not_weights(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        check_opens(tmp_path / name)


def test_checks_refuse_safetensors_that_are_cut_short(tmp_path):
    save_file({"w": torch.ones(300)}, tmp_path / "a.safetensors")
    os.truncate(tmp_path / "a.safetensors", 1000)
    with pytest.raises(WeightsError, match="1000 bytes long, its header says"):
        check_opens(tmp_path / "a.safetensors")


def test_checks_refuse_another_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match="not one that torch.save wrote"):
        check_opens(tmp_path / "a.pth")


def test_digest_is_the_sha256_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 10**6)
    assert digest(tmp_path / "a") == hashlib.sha256(b"abc" * 10**6).hexdigest()

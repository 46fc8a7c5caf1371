"""Files of torch that claim what they do not have are refused before they are read."""

import io
import resource
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from minigpt4.common.checkpoint import read_weights
from minigpt4.common.errors import WeightsError
from minigpt4.common.torch_files import check_whole

STEM = "archive"


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def rezipped(path, change):
    """The torch file of one tensor of 100 ones with its entries changed: `change` of a list of (name, bytes)."""
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.ones(100)}))) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in change(entries):
            archive.writestr(name, data)
    return path


def edited(name, change):
    return lambda entries: [(key, change(data) if key == f"{STEM}/{name}" else data) for key, data in entries]


def refusal(path):
    with pytest.raises(WeightsError) as error:
        read_weights(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_whole_files_of_all_formats_are_read_also_without_checksums(tmp_path):
    tensors = {"a": torch.ones(100)}
    rezipped(tmp_path / "copy.pth", list)
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "w.safetensors")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    for path in list(tmp_path.iterdir()):
        assert read_weights(path)["a"].sum() == 100
        check_whole(path.rename(tmp_path / "a.part"), path.name)  # as downloads are


def test_little_that_unpacks_to_much_is_refused_before_it_takes_memory(tmp_path):
    path, zeros = tmp_path / "bomb.pth", bytes(1 << 20)
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.ones(100)}))) as plain:
        pickled = plain.read(f"{STEM}/data.pkl").replace(b"Kdtq", b"J" + struct.pack("<i", 120 << 18) + b"tq", 1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(f"{STEM}/data/0", "w") as entry:
            for _ in range(120):
                entry.write(zeros)
        archive.writestr(f"{STEM}/data.pkl", pickled, zipfile.ZIP_STORED)
    assert path.stat().st_size < 400_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "data/0 is compressed" in refusal(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda entries: [*entries, entries[4]], "same name"),
        (lambda entries: entries[1:], "data.pkl"),
        (edited("data/0", lambda data: data[:-4]), "claims 400 bytes of data/0"),
        (edited("data.pkl", lambda data: data.replace(b"Kdtq", b"M\xe8\x03tq", 1)), "claims 4,000 bytes of data/0"),
        (edited("data.pkl", lambda data: data.replace(b"_rebuild_tensor_v2", b"_rebuild_qtensor")), "_rebuild_qtensor"),
        (edited("data.pkl", lambda data: data.replace(b"storage", b"module", 1)), "Get it again."),
        (edited("data.pkl", lambda data: data[:40]), "broken"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_that_torch_would_not_write_are_refused(tmp_path, change, text):
    assert text in refusal(rezipped(tmp_path / "w.pth", change))


def test_shared_bytes_a_flipped_bit_a_file_before_the_file_and_old_ones_that_claim_too_much_are_found(tmp_path):
    shared = bytearray(rezipped(tmp_path / "w.pth", list).read_bytes())
    last = shared.rfind(b"PK\x01\x02")
    shared[last + 42 : last + 46] = bytes(4)  # the last entry begins where the first one does
    flipped = bytearray(saved({"a": torch.full((100,), 7.0)}))
    flipped[flipped.find(struct.pack("<f", 7.0)) + 40] ^= 1
    old = saved({"a": torch.ones(100)}, _use_new_zipfile_serialization=False)
    assert old.count(b"Kdq") + old.count(b"KdN") == 1
    old = old.replace(b"KdN", b"J\x00\x00\x00\x7fN").replace(b"Kdq", b"J\x00\x00\x00\x7fq")
    twice = ("does not begin with", saved({"a": torch.ones(100)}) * 2)
    for text, data in (("shares its bytes", shared), ("data/0", flipped), ("claims 8,522,825,728 bytes", old), twice):
        (tmp_path / "w.pth").write_bytes(data)
        assert text in refusal(tmp_path / "w.pth")

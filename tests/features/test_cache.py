"""What may happen to the folder of a feature cache while runs use it."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.datasets import feature_store as store_module
from minigpt4.datasets.feature_store import FeatureStore, RowShape, image_digest
from minigpt4.models.feature_cache import FeatureCache
from minigpt4.processors.blip_processors import Blip2ImageEvalProcessor

SHAPE = RowShape(tokens=4, width=6, dtype="float16")


def digest(number):
    return image_digest(str(number).encode())


def row(number):
    return np.full((4, 6), number, np.float16)


def fill(store, numbers):
    for number in numbers:
        store.add(digest(number), row(number))
    store.flush()


def have(store, numbers):
    return [number for number in numbers if store.get(digest(number)) is not None]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


STARTS = """
import os, sys
from pathlib import Path
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.feature_cache import FeatureCache
from minigpt4.processors.blip_processors import Blip2ImageEvalProcessor

cache = FeatureCache(Path(sys.argv[1]), MiniGPT4Config())
for turn in range(12):
    processor = Blip2ImageEvalProcessor(image_size=14 + turn)
    together, go = os.pipe()
    children = []
    for _ in range(8):
        if not (child := os.fork()):
            os.close(go)
            os.read(together, 1)  # all start when the parent closes its end
            cache.store(processor)
            os._exit(0)
        children.append(child)
    os.close(go)
    os.close(together)
    assert not any(os.waitpid(child, 0)[1] for child in children), turn
"""


def test_a_fresh_cache_is_opened_by_many_ranks_at_once(tmp_path):
    result = subprocess.run([sys.executable, "-c", STARTS, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {len(list(path.iterdir())) for path in tmp_path.iterdir()} == {1}


def test_a_path_that_cannot_be_a_folder_is_an_error_that_names_the_key(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(ConfigError, match=r"run\.feature_cache: .*name another folder"):
            FeatureCache(path, MiniGPT4Config()).store(Blip2ImageEvalProcessor(image_size=224))


@pytest.mark.parametrize("lost", ["folder", "root", "rows", "index"])
def test_what_is_deleted_while_it_is_used_is_encoded_again_and_kept_again(lost, folder, monkeypatch, caplog):
    monkeypatch.setattr(store_module, "SECONDS_BETWEEN_LOOKS", 0.0)
    writer = FeatureStore(folder / "key", SHAPE)
    fill(writer, range(5))
    reader = FeatureStore(folder / "key", SHAPE)
    if lost in ("rows", "index"):
        next((folder / "key").glob(f"*.{lost}")).unlink()
    else:
        shutil.rmtree(folder / "key" if lost == "folder" else folder)
    if lost != "index":
        assert have(reader, range(5)) == []
    fill(writer, range(5, 10))
    fill(writer, range(5))
    assert have(writer, range(10)) == list(range(10))
    assert have(reader, range(10)) == list(range(10))
    assert have(FeatureStore(folder / "key", SHAPE), range(10)) == list(range(10))
    assert caplog.text.count("deleted while it was in use") == 1


def test_without_a_folder_that_can_be_written_the_run_goes_on(folder, caplog):
    store = FeatureStore(folder, SHAPE)
    fill(store, range(3))
    shutil.rmtree(folder)
    folder.write_text("a file in its place")
    fill(store, range(3, 6))
    fill(store, range(6, 9))
    assert have(store, range(3, 9)) == []
    assert caplog.text.count("keeps no more rows") == 1
    assert FeatureStore(folder, SHAPE).get(digest(0)) is None


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from minigpt4.datasets.feature_store import FeatureStore, RowShape, image_digest

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that would grow beyond the limit is an OSError, as a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
store = FeatureStore(Path(sys.argv[1]), RowShape(4, 6, "float16"))
for number in range(100):
    store.add(image_digest(str(number).encode()), np.full((4, 6), number, np.float16))
    store.flush()
print(sum(store.get(image_digest(str(number).encode())) is not None for number in range(100)))
"""


def test_a_full_disk_costs_rows_and_one_warning(folder):
    result = subprocess.run([sys.executable, "-c", FULL, str(folder)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "20"
    assert result.stderr.count("keeps no more rows") == 1
    assert "Exception ignored" not in result.stderr
    assert have(FeatureStore(folder, SHAPE), range(100)) == list(range(20))


def test_a_file_that_shrinks_while_it_is_read_does_not_kill_the_process(folder):
    fill(FeatureStore(folder, RowShape(64, 768, "float32")), [])
    script = f"""
import numpy as np
from pathlib import Path
from minigpt4.datasets.feature_store import FeatureStore, RowShape, image_digest
folder, shape = Path({str(folder)!r}), RowShape(64, 768, "float32")
store = FeatureStore(folder, shape)
for number in range(3):
    store.add(image_digest(bytes([number])), np.full((64, 768), number, np.float32))
store.flush()
first = store.get(image_digest(bytes([0])))
(rows,) = folder.glob("*.rows")
with rows.open("r+b") as file:
    file.truncate(1000)
print([store.get(image_digest(bytes([number]))) is None for number in range(3)], first.sum())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "[True, True, True] 0.0"), result.stderr

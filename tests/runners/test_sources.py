"""Training from other places: the losses of folders of files to the bit, with data at addresses and weights by name."""

import hashlib
import io
import json
import tarfile
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from minigpt4.common.hub import hub_name

TRAIN = Path(__file__).parents[2] / "train.py"
SHORT = ("run.max_epoch=1", "run.iters_per_epoch=4", "run.warmup_steps=0")


@pytest.fixture
def losses(building, tools):
    """`losses(recipe, *options)`: those of a short run in this process, by step."""

    def losses(recipe, *options):
        runner = building.build(recipe, *SHORT, *options)
        runner.train()
        return tools["losses"](sorted((recipe.parent / "output").iterdir())[-1])

    return losses


@pytest.fixture
def columns(tiny):
    """The tiny data as a table."""
    records = json.loads((tiny.folder / "cc_sbu_align/filter_cap.json").read_text())["annotations"]
    images = [(tiny.folder / f"cc_sbu_align/image/{record['image_id']}.jpg").read_bytes() for record in records]
    texts = {key: [record[key] for record in records] for key in ("image_id", "caption")}
    return pa.table({**texts, "image": [{"bytes": content, "path": None} for content in images]})


def test_captions_of_every_form_and_place_give_the_losses_of_the_folder(tiny, columns, losses, flaky):
    import datasets

    folder, info = tiny.folder, "datasets.cc_sbu_align.build_info"
    parquet.write_table(columns, folder / "align.parquet", row_group_size=5)
    datasets.Dataset(columns).save_to_disk(str(folder / "saved"), num_shards=2)
    server = flaky(folder)
    at_address = [f"{info}.ann_path={server.url}/cc_sbu_align/filter_cap.json"]
    at_address += [f"{info}.image_path={server.url}/cc_sbu_align/image"]
    wanted = losses(tiny.recipe)
    assert len(set(wanted.values())) == 4
    for options in (
        [f"{info}.storage={folder}/align.parquet"],
        [f"{info}.storage=null", f"{info}.ann_path={folder}/saved"],
        [f"{info}.storage={server.url}/align.parquet"],
        [f"{info}.storage=null", *at_address],
    ):
        assert losses(tiny.recipe, *options) == wanted, options
    assert {fault for _, _, fault in server.asked} >= {"503", "drop", "cut", "500", "slow"}


def test_shards_at_an_address_give_the_losses_of_the_folder(tiny, columns, losses, flaky):
    for number in range(3):
        with tarfile.open(tiny.folder / f"{number}.tar", "w") as tar:
            for row in columns.slice(8 * number, 8).to_pylist():
                for suffix, content in (("jpg", row["image"]["bytes"]), ("txt", row["caption"].encode())):
                    member = tarfile.TarInfo(f"{row['image_id']}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    server = flaky(tiny.folder)
    kind = "datasets.cc_sbu_align.builder=image_caption_shards"
    place = "datasets.cc_sbu_align.build_info.storage={}/{{0..2}}.tar".format
    wanted = losses(tiny.recipe, kind, place(tiny.folder))
    assert losses(tiny.recipe, kind, place(server.url)) == wanted
    cache = f"datasets.cc_sbu_align.build_info.cache_dir={tiny.folder}/cache"
    assert losses(tiny.recipe, kind, place(server.url), cache, "run.num_workers=1") == wanted
    assert {fault for _, _, fault in server.asked} >= {"503", "drop", "cut", "500"}


def test_conversations_with_images_among_the_words_train_alike_from_json_and_parquet(
    tiny, columns, losses, llava_section
):
    folder, pictures = tiny.folder, columns["image"].to_pylist()
    records, cells = [], []
    for number in range(12):
        count = number % 4
        asked = " and ".join(["<image>"] * count) or "Nothing"
        turns = [{"from": "human", "value": f"Is {asked} old?"}, {"from": "gpt", "value": f"It is number {number}."}]
        own = range(number, number + count)
        fields = {"image": [f"{n}.jpg" for n in own]} if count else {}
        records.append({"id": str(number), **fields, "conversations": turns})
        cells.append([pictures[n] for n in own])
    (folder / "talks.json").write_text(json.dumps(records))
    table = pa.table({key: [record[key] for record in records] for key in ("id", "conversations")} | {"image": cells})
    parquet.write_table(table, folder / "talks.parquet", row_group_size=5)
    content = yaml.safe_load(tiny.recipe.read_text())
    info = {"ann_path": f"{folder}/talks.json", "image_path": f"{folder}/cc_sbu_align/image", "id_field": "id"}
    section = {"builder": "llava_conversations", "batch_size": 3, "build_info": info, "group_by_modality_length": True}
    content |= {"model": llava_section(model_type="v1", image_size=56), "datasets": {"talks": section}}
    recipe = folder / "llava.yaml"
    recipe.write_text(yaml.safe_dump(content))
    wanted = losses(recipe)
    assert len(set(wanted.values())) == 4
    other = ["datasets.talks.build_info.image_path=null", f"datasets.talks.build_info.ann_path={folder}/talks.parquet"]
    assert losses(recipe, *other) == wanted


# Weights by name


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("lmsys/vicuna-7b-v1.5/", ("lmsys/vicuna-7b-v1.5", None, None)),
        ("hf:me/lora@v1/a/b.bin", ("me/lora", "v1", "a/b.bin")),
        ("https://huggingface.co/lmsys/vicuna-7b-v1.5", ("lmsys/vicuna-7b-v1.5", None, None)),
        ("https://huggingface.co/me/lora/tree/v1", ("me/lora", "v1", None)),
        ("https://huggingface.co/me/lora/resolve/main/a/b.bin?download=true", ("me/lora", "main", "a/b.bin")),
        *((path, None) for path in ("weights/vicuna-7b/", "a/b/c.bin", "me/b.pth", "https://example.org/me/lora")),
    ],
)
def test_what_names_the_hub_and_what_is_a_path(value, name):
    assert hub_name(value) == name


class Hub:
    """As much of the hub as a download asks; `repositories`: folders by name, each with the one revision `v1`."""

    def __init__(self, port: int, repositories: dict[str, Path]) -> None:
        self.repositories, self.asked = repositories, []
        self.server = ThreadingHTTPServer(("127.0.0.1", port), _HubHandler)
        self.server.hub = self
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.server.hub.asked.append(path)
        owner, name, kind, revision, *file = path.removeprefix("api/models/").split("/")
        folder = self.server.hub.repositories.get(f"{owner}/{name}")
        commit = hashlib.sha1(f"{owner}/{name}".encode()).hexdigest()
        if folder is None or revision not in ("main", "v1", commit):
            code = "RepoNotFound" if folder is None else "RevisionNotFound"
            self._answer(404, b"", {"X-Error-Code": code})
        elif kind == "revision":
            self._answer(200, json.dumps({"id": f"{owner}/{name}", "sha": commit, "siblings": []}).encode())
        elif kind == "tree":
            files = [one for one in sorted(folder.iterdir()) if one.is_file()]
            listed = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _oid(f)} for f in files]
            self._answer(200, json.dumps(listed).encode())
        else:
            content = (folder / file[0]).read_bytes()
            self._answer(200, content, {"ETag": f'"{_oid(folder / file[0])}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def _answer(self, status, content, headers=()) -> None:
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def port(tools) -> int:
    """Where a `Hub` is looked for."""
    return tools["free_port"]()


@pytest.fixture(scope="module")
def serve(port, tools, tmp_path_factory):
    """`serve(**variables)`: a server whose scripts look for the hub at the port, which its library reads at import."""
    folder = tmp_path_factory.mktemp("hub")

    def serve(**variables):
        variables |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1"}
        logs = tmp_path_factory.mktemp("logs")
        return closing(tools["WarmServer"](logs, tools["environment"](variables), tools["supervised"]))

    return serve


@pytest.fixture(scope="module")
def online(serve):
    with serve() as online:
        yield online


def test_names_on_the_hub_train_as_the_folders_do_and_without_network_from_its_cache(
    tiny, losses, tools, llava_dir, llava_section, port, serve, online
):
    folders = {name: llava_dir / f"{name}_tiny" for name in ("vicuna", "clip")}
    folders |= {"parts": llava_dir, "lora": llava_dir / "lora"}
    content = yaml.safe_load(tiny.recipe.read_text())
    content["model"] = llava_section(model_type="v1")
    content["datasets"]["cc_sbu_align"].pop("vis_processor")
    tiny.recipe.write_text(yaml.safe_dump(content))
    wanted = losses(tiny.recipe)
    names = ["model.llama_model=me/vicuna@v1", "model.vit_model=me/clip", "model.ckpt=hf:me/parts/projector_linear.bin"]
    with closing(Hub(port, {f"me/{name}": folder for name, folder in folders.items()})) as hub:
        online.train(tiny, *SHORT, *names)
        assert tools["losses"](tiny.runs()[-1]) == wanted
        fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
        assert {"config.json", "projector_linear.bin"} <= fetched
        assert not {"projector_mlp2x_gelu.bin", "README.md"} & fetched
        script = tiny.folder / "lora.py"
        code = (
            "from minigpt4.common import hub; print(hub.local_path('hf:me/lora/adapter_model.safetensors', '').parent)"
        )
        script.write_text(code)
        lora = online.script(script, cwd=tiny.folder, apart=True)
        assert lora.wait() == [0], lora.text()
        names_there = {file.name for file in Path(lora.out.read_text().strip()).iterdir()}
        assert names_there == {file.name for file in folders["lora"].iterdir()}
    failed = online.start(tiny, *SHORT, *names, "model.llama_model=me/vicuna@v2")
    assert failed.wait() == [2], failed.text()[-2000:]
    for text in ("model.llama_model", "me/vicuna@v2", "the hub does not answer"):
        assert text in failed.text()
    with serve(HF_HUB_OFFLINE="1") as offline:
        offline.train(tiny, *SHORT, *names)
        assert tools["losses"](tiny.runs()[-1]) == wanted
        for name, arguments, status, texts in (
            ("me/other", (), 2, ("model.llama_model", "hf download me/other")),
            ("me/other", ("--check",), 2, ("me/other", "config.json")),
            ("me/vicuna-7b", ("--check",), 0, ("LLaMA 7B, by the name",)),
        ):
            options = ("--options", *SHORT, *names, f"model.llama_model={name}")
            done = offline.script(TRAIN, "--cfg-path", tiny.recipe, *options, *arguments, cwd=tiny.folder)
            assert done.wait() == [status], done.text()[-2000:]
            for text in (*texts, "HF_HUB_OFFLINE is set"):
                assert text in done.text()


def test_the_folder_of_a_run_is_read_from_the_hub(tiny, port, online):
    online.train(tiny, *SHORT, "run.keep_last=1")
    (run,) = tiny.runs()
    with closing(Hub(port, {"me/run": run})):
        for source, output in ((run, "local"), ("me/run", "fetched")):
            command = ("minigpt4.export", source, "--format", "safetensors", "--output", output)
            done = online.script(*command, cwd=tiny.folder)
            assert done.wait() == [0], done.text()[-3000:]
    local, fetched = (
        {file.name: file.read_bytes() for file in (tiny.folder / name).glob("*.safetensors")}
        for name in ("local", "fetched")
    )
    assert local
    assert local == fetched

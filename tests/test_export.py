"""`python -m minigpt4.export`: stock transformers, in a process without this package, says what this package says."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from minigpt4 import export, merge
from minigpt4.common.torch_files import file_sha256
from minigpt4.conversation.decoding import Decoding
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER
from minigpt4.inference.pipeline import Pipeline, PromptRules
from minigpt4.models.fsdp import whole
from minigpt4.models.generation import generate_ids
from minigpt4.models.mini_gpt4 import VisionLanguageModel
from minigpt4.models.transformers_layout import IMAGE_TOKEN

pytestmark = pytest.mark.usefixtures("one_thread")
PIXELS_ATOL, LOGITS_ATOL = 2.5e-7, 1e-4
QUESTION, TOKENS = "What is this?", 40
STOP = ["###", "hck"]
"""The second is in what the tiny model says about the first image, in two tokens."""
LORA = {"rule": "lora", "r": 4, "alpha": 8, "dropout": 0.0}
VICUNA = {"arch": "minigpt4", "model_type": "pretrain_vicuna0", "end_sym": "###"}
LLAMA = {"arch": "minigpt4", "model_type": "pretrain_llama2", "has_qformer": True, "end_sym": "</s>"}
V1 = {"model_type": "v1", "image_size": 56}
MINIGPT4 = {
    "vicuna0": {**VICUNA, "prompt_template": "###Human: {} ###Assistant: "},
    "llama2": {**LLAMA, "prompt_template": "[INST] {} [/INST] "},
    "all trained": {**VICUNA, "prompt_template": "{}", "freeze_vit": False, "freeze_qformer": False},
}
LLAVA = {
    "linear": V1,
    "mlp2x_gelu": V1 | {"model_type": "v1.5", "projection": "mlp2x_gelu", "image_aspect_ratio": "pad"},
    "lora": V1 | {"train": {"llm": LORA}},
    "siglip": V1,
    "whole": V1 | {"ckpt": None},
}
ASKED = ["vicuna0", "llama2", "linear", "mlp2x_gelu"]
"""One of each chat template, for the whole way from messages to an answer."""
STOCK = """
import json, sys
sys.modules["minigpt4"] = None  # importing it is an error
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, small, large, question, prompt, tokens, asked = json.loads(sys.stdin.read())
found = {}
for name, whole in prompt.items():
    path = f"{folder}/{name}/out"
    model, loading = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert not any(loading.values()), loading
    processor = AutoProcessor.from_pretrained(path, backend="pil")
    inputs = processor(images=Image.open(large), text=whole, return_tensors="pt")
    count = inputs["input_ids"].shape[1]
    stopping = {"stop_strings": model.generation_config.stop_strings, "tokenizer": processor.tokenizer}
    messages = [{"role": "user", "content": [{"type": "image", "path": small}, {"type": "text", "text": question}]}]
    with torch.no_grad():
        found[name] = {
            "input_ids": inputs["input_ids"][0],
            "pixels": inputs["pixel_values"][0],
            "logits": model(**inputs).logits[0],
            "greedy": model.generate(**inputs, max_new_tokens=tokens)[0, count:],
            "stopped": model.generate(**inputs, **stopping, max_new_tokens=tokens)[0, count:],
            "prompt": processor.apply_chat_template(messages, add_generation_prompt=True),
            "templates": ["default"] if isinstance(processor.chat_template, str) else sorted(processor.chat_template),
        }
    if name in asked:
        answer = pipeline("image-text-to-text", path)(messages, return_tensors=True)  # with its own limit, 256
        found[name]["asked"] = answer[0]["generated_token_ids"]
torch.save(found, f"{folder}/found.pt")
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_section, llava_section, llava_dir, siglip_tower, write_recipe) -> dict[str, Path]:
    """The YAML of each case, exported to `out` beside it."""
    folder, files = tmp_path_factory.mktemp("export"), {}
    for name, changes in (MINIGPT4 | LLAVA).items():
        section = tiny_section(**changes) if name in MINIGPT4 else llava_section(**changes)
        if name == "all trained":
            section["ckpt"] = trained_everywhere(section, folder / "checkpoint.pth")
        elif name == "lora":
            section["ckpt"] = str(llava_dir / "lora" / "adapter_model.safetensors")
        elif name == "siglip":
            section["vit_model"] = siglip_tower
        elif name == "whole":
            section["llama_model"] = str(llava_dir / "stage2_linear")
        generation = {"stop": STOP} if name == "vicuna0" else {}
        run = {"device": "cpu", "max_epoch": 3, "init_lr": 0.001, "generation": generation}
        files[name] = write_recipe(folder / name, section, **run)
        layout = "blip2" if name in MINIGPT4 else "llava"
        assert export.main([str(files[name]), "--format", layout, "--output", str(folder / name / "out")]) == 0
    return files


def trained_everywhere(section: dict, path: Path) -> str:
    """A checkpoint with other weights of vision side, Q-Former and projection."""
    model = VisionLanguageModel.from_config(section | {"ckpt_allow_keys": ["*"]})
    noise = torch.Generator().manual_seed(0)
    weights = {name: whole(own) for name, own in model.stored_parameters().items()}
    weights = {name: own + 0.02 * torch.randn(own.shape, generator=noise) for name, own in weights.items()}
    torch.save({"model": weights}, path)
    return str(path)


def prompt_of(config) -> str:
    """The question in the template of the model, with `<ImageHere>`."""
    prompt = PromptRules.of(config, f"<Img>{IMAGE_PLACEHOLDER}</Img> {QUESTION}").prompt
    return config.model.as_read(prompt).replace(IMAGE_TOKEN, IMAGE_PLACEHOLDER)


@pytest.fixture(scope="module")
def stock(world, parity_dir) -> dict[str, dict]:
    """What transformers makes of the folders in a process that cannot import this package."""
    folder = next(iter(world.values())).parents[1]
    images = [str(parity_dir / "images" / f"{name}.png") for name in ("img3_rgb", "img0_rgb_nonsquare")]
    configs = {name: export.source_of(str(file), None, []) for name, file in world.items()}
    prompts = {name: prompt_of(config).replace(IMAGE_PLACEHOLDER, IMAGE_TOKEN) for name, config in configs.items()}
    told = json.dumps([str(folder), *images, QUESTION, prompts, TOKENS, ASKED])
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", STOCK]
    done = subprocess.run(command, input=told, cwd=folder, env=alone, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "found.pt", weights_only=True)


@torch.inference_mode()
def said_by(ours: Pipeline, image: Path, tokens: int, stop: list[str]) -> tuple[torch.Tensor, torch.Tensor, list, list]:
    """Pixels, logits and ids of the prompt, and the answer's ids."""
    model, prompt = ours.model, prompt_of(ours.cfg)
    pixels_3SS = ours.processor(Image.open(image))
    embeds = [model.project(model.image_features(pixels_3SS[None]))]
    (row,), _ = model.prompt_rows([prompt], [embeds])
    ids = [token if place < 0 else IMAGE_TOKEN for token, place in zip(row.ids, row.images, strict=True)]
    inputs = model.prompt_embeds([prompt], [embeds])
    answer = generate_ids(model.llama_model, model.llama_tokenizer, *inputs, Decoding(max_new_tokens=tokens), stop)
    return pixels_3SS, model.llama_model(inputs_embeds=inputs[0]).logits[0], ids, answer[0, 1:].tolist()


@pytest.mark.parametrize("name", MINIGPT4 | LLAVA)
def test_stock_transformers_says_the_same(name, world, stock, parity_dir):
    ours, theirs = Pipeline(export.source_of(str(world[name]), None, []), "cpu"), stock[name]
    small, large = (parity_dir / "images" / f"{image}.png" for image in ("img3_rgb", "img0_rgb_nonsquare"))
    pixels, logits, ids, answer = said_by(ours, large, TOKENS, [])
    image_id = json.loads((world[name].parent / "out" / "config.json").read_text())["image_token_index"]
    assert theirs["input_ids"].tolist() == [image_id if token == IMAGE_TOKEN else token for token in ids]
    torch.testing.assert_close(theirs["pixels"], pixels, rtol=0, atol=PIXELS_ATOL)
    rows = logits.shape[-1]
    torch.testing.assert_close(theirs["logits"][:, :rows], logits, rtol=0, atol=LOGITS_ATOL)
    if theirs["logits"].shape[-1] > rows:  # the new row of `<image>`, which is never the answer
        torch.testing.assert_close(theirs["logits"][:, rows], logits.mean(dim=-1), rtol=0, atol=LOGITS_ATOL)
    assert theirs["prompt"].replace(IMAGE_TOKEN, IMAGE_PLACEHOLDER) == prompt_of(ours.cfg)
    assert theirs["templates"] == (["chat", "default"] if name in MINIGPT4 else ["default"])
    assert theirs["greedy"].tolist() == answer
    stopped = said_by(ours, large, TOKENS, PromptRules.of(ours.cfg).stop)[3]
    assert theirs["stopped"].tolist() == stopped
    assert (len(stopped) < len(answer)) == (name == "vicuna0")
    if name in ASKED:
        _, _, ids, answer = said_by(ours, small, 256, [])
        assert theirs["asked"].tolist()[len(ids) :] == answer
        assert not (name == "vicuna0" and len(answer) == 256)  # it ends, which config.json of this LLM would not let it


@pytest.mark.parametrize("name", [*MINIGPT4, *LLAVA])
def test_checkpoint_comes_back_to_the_bit(name, world, tmp_path, capsys):
    config = export.source_of(str(world[name]), None, [])
    trained, out = export.Export(config).trained, world[name].parent / "out"
    status = export.main([str(out), "--format", "safetensors", "--output", str(tmp_path / "back")])
    if name == "lora":
        assert status == 2
        assert "other adapters are merged into its LLM" in capsys.readouterr().err
        return
    again = export.source_of(str(world[name]), None, [f"model.ckpt={tmp_path / 'back' / export.WEIGHTS}"])
    model = VisionLanguageModel.from_config(again.model)
    stored = {name: own.detach() for name, own in model.stored_parameters().items()}
    assert stored.keys() == trained.keys()
    assert all(torch.equal(stored[name], own.to(stored[name].dtype)) for name, own in trained.items())
    assert export.main([str(out), "--format", "blip2", "--output", str(tmp_path / "other")]) == 2
    assert "is an export already" in capsys.readouterr().err


REFUSED = [
    ("blip2", VICUNA, {"has_qformer": False}, "connector: 'join4', but transformers' BLIP-2 has a Q-Former"),
    ("blip2", VICUNA, {"proj_layers": 3, "ckpt": None}, "projection: 'linear3', but transformers' BLIP-2 has one"),
    (
        "blip2",
        VICUNA,
        {"train": {"connector": LORA}},
        "train.connector: .* adapters beside the connector are not merged",
    ),
    ("llava", V1, {"connector": "join2x2"}, "connector: 'join2x2', but in transformers' LLaVA each patch is an image"),
    ("llava", V1, {"image_size": 28}, "image_size: 28, but transformers' LLaVA keeps to its tower's"),
    ("llava", V1, {"mm_use_im_start_end": True}, "new_tokens: .*<im_start>.*, but tokens that were added"),
    (
        "gguf",
        VICUNA,
        {"prompt_template": "{}"},
        "connector: 'qformer', but in llama.cpp's LLaVA each patch is an image",
    ),
    ("gguf", V1, {"connector": "join2x2"}, "connector: 'join2x2'"),
    ("gguf", V1, {"vit_prefix": "keep"}, "vit_prefix: 'keep', but llama.cpp's LLaVA leaves out"),
    ("gguf", V1, {"mm_use_im_start_end": True}, "new_tokens: "),
]


@pytest.mark.parametrize(("layout", "kind", "changes", "text"), REFUSED)
def test_what_a_format_has_no_place_for_is_refused(
    layout, kind, changes, text, tiny_section, llava_section, write_recipe, tmp_path, capsys
):
    section = tiny_section(**kind) if kind is VICUNA else llava_section(**kind)
    file, output = write_recipe(tmp_path, section | changes), tmp_path / "out"
    assert export.main([str(file), "--format", layout, "--output", str(output)]) == 2
    assert re.search(f"--format {layout}: model.{text}", capsys.readouterr().err)
    assert not output.exists()


@pytest.mark.parametrize(("name", "layout"), [("vicuna0", "blip2"), ("linear", "llava"), ("mlp2x_gelu", "gguf")])
def test_dry_run_lists_what_is_written_then(name, layout, world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(merge, "SHARD_SIZE", "300KB")
    command = [str(world[name]), "--format", layout, "--output", str(tmp_path / "new")]
    listed = []
    for more in (["--dry-run"], []):
        assert export.main([*command, *more]) == 0
        listed.append(capsys.readouterr().out)
        assert (tmp_path / "new").exists() == (not more)
    assert listed[0] == listed[1]
    sizes = {file: int(size.replace(",", "")) for size, file in re.findall(r"([\d,]+)  (\S.*)", listed[0])}
    assert sizes.pop("in all") == sum(sizes.values())
    assert sizes == {name: len(content) for name, content in files_of(tmp_path / "new").items()}
    assert layout == "gguf" or sum(file.endswith(".safetensors") for file in sizes) > 2


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_card_has_data_recipe_and_the_scores_of_this_checkpoint(world, tiny_section, tmp_path, capsys):
    run = tmp_path / "20260101_120000"
    (run / "evaluation").mkdir(parents=True)
    checkpoint = run / "checkpoint_1.pth"
    checkpoint.write_bytes(Path(tiny_section()["ckpt"]).read_bytes())
    config = yaml.safe_load(world["vicuna0"].read_text())
    config["datasets"] = {"cc_sbu_align": {"build_info": {"storage": "/private/folder/cc_sbu_align"}}}
    (run / "run.json").write_text(json.dumps({"config": config}))
    mine = {"name": "epoch 1", "sha256": file_sha256(checkpoint), "scores": {"CIDEr": 1.5}}
    other = {**mine, "name": "epoch 0", "sha256": "0" * 64, "scores": {"CIDEr": 0.25}}
    best = mine | {"intervals": {"CIDEr": [1.25, 1.75]}}
    captions = {"data": "flickr30k, test", "images": 9, "checkpoints": [other, best]}
    accuracy = {"benchmark": "gqa", "questions": 7, "checkpoints": [mine | {"accuracy": 0.5, "interval": [0.25, 0.75]}]}
    for name, results in {"metrics": captions, "gqa": accuracy}.items():
        (run / "evaluation" / f"{name}.json").write_text(json.dumps(results))
    assert export.main([str(checkpoint), "--format", "safetensors", "--output", str(tmp_path / "small")]) == 0
    card = (tmp_path / "small" / "README.md").read_text()
    scores = "| epoch 1 | 1.5000 (95% 1.2500 - 1.7500) |", "| gqa, n 7 | accuracy |", "0.5000 (95% 0.2500 - 0.7500)"
    facts = "cc_sbu_align: cc_sbu_align", "| init_lr | 0.001 |", "license: other", "- LLM: `vicuna_tiny`"
    for text in (*facts, *scores):
        assert text in card
    for text in ("epoch 0", str(tmp_path), "/private/folder"):
        assert text not in card
    (run / "run.json").unlink()
    assert export.main([str(checkpoint), "--format", "safetensors", "--output", str(tmp_path / "more")]) == 2
    assert "name its YAML with --cfg-path" in capsys.readouterr().err
    assert export.main([str(checkpoint), "--format", "blip2", "--output", str(run)]) == 2
    assert "is not empty" in capsys.readouterr().err


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        url = f"http://{self.headers['Host']}/me/tiny"
        answer = {"url": url, "commitUrl": f"{url}/commit/1", "commitOid": "1"}
        if "/preupload/" in self.path:
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [one | regular for one in json.loads(body)["files"]]}
        self.send_response(403 if "refused" in f"{body}" else 200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def do_GET(self) -> None:
        self.send_error(404)


def test_push_to_hub_uploads_the_folder(world, tmp_path, monkeypatch, capsys):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    command = [str(world["linear"]), "--format", "llava"]
    try:
        for name, status in (("me/tiny", 0), ("me/refused", 2)):
            output = ["--output", str(tmp_path / name), "--push-to-hub", name]
            assert export.main([*command, *output]) == status
    finally:
        server.shutdown()
    told = capsys.readouterr()
    assert f"http://127.0.0.1:{server.server_port}/me/tiny/commit/1" in told.out
    assert "--push-to-hub me/refused" in told.err
    path, token, _ = server.asked[0]
    assert (path, token) == ("/api/repos/create", "Bearer hf_secret")
    commit = next(body for path, _, body in server.asked if "/api/models/me/tiny/commit/" in path).decode()
    sent = [line["value"] for line in map(json.loads, commit.splitlines()) if line["key"] == "file"]
    assert {one["path"]: base64.b64decode(one["content"]) for one in sent} == files_of(tmp_path / "me/tiny")

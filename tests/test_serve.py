"""`python serve.py` on tiny weights: asked by the official client, ended by a signal."""

import base64
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from minigpt4.common.errors import MiniGPT4Error

REPOSITORY = Path(__file__).parents[1]
KEY = "sk-nobody-may-see-this"


@pytest.fixture(scope="module")
def command(load_script):
    return load_script("serve.py")


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_section, write_recipe):
    model = tiny_section(arch="minigpt4", model_type="pretrain_mini", llm_attention="sdpa")
    model["vit_config"] |= {"mlp_ratio": 4.3637}  # the others of pretrain_mini are those of the tiny model
    model["qformer_config"] |= {"cross_attention_frequency": 2}
    model |= {"prompt_template": "###Human: {} ###Assistant: ", "end_sym": "@@@@"}  # which it never says
    return write_recipe(tmp_path_factory.mktemp("serve"), model)


@pytest.fixture(scope="module")
def process(warm, config, parity_dir):
    """For all tests here; the last one ends it."""
    arguments = ("--ckpt", f"second={parity_dir / 'train_main_checkpoint_0.pth'}", "--limits", "shutdown_seconds=0.01")
    command = (REPOSITORY / "serve.py", "--port", "0", "--cfg-path", config, *arguments)
    return warm.script(*command, cwd=REPOSITORY, env={"MINIGPT4_API_KEY": KEY})


@pytest.fixture(scope="module")
def url(process):
    process.wait_for("Listening on")
    return re.search(r"Listening on (\S+);", process.text())[1]


LMMS_EVAL = """
import json, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

server, tasks = sys.argv[1:]
manager = TaskManager(include_path=tasks, include_defaults=False)
found = simple_evaluate(
    model="openai", model_args=server, tasks=["tiny_answers"], batch_size=1, task_manager=manager, bootstrap_iters=0
)
rows = sorted(found["samples"]["tiny_answers"], key=lambda row: row["doc_id"])
sys.stdout.write("\\n" + json.dumps([row["filtered_resps"][0] for row in rows]))
"""


def test_lmms_eval_asks_it_as_a_client(url, parity_dir, tmp_path):
    """Its own model `openai` in its own evaluator, on a task with an image a document."""
    if lacking := [name for name in ("lmms_eval", "dotenv") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs lmms-eval with its requirements, not found: {', '.join(lacking)}")
    images = [parity_dir / "images" / f"{name}.png" for name in ("img3_rgb", "img0_rgb_nonsquare")]
    questions = list(zip(images, ("What is this?", "Why?"), strict=True))
    lines = [json.dumps({"images": [str(image)], "question": text, "answer": 0}) for image, text in questions]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines))
    (tmp_path / "tasks").mkdir()
    for file in ("tiny_answers.yaml", "utils.py"):
        text = (REPOSITORY / "tests" / "evaluation" / "lmms_eval_run" / file).read_text()
        (tmp_path / "tasks" / file).write_text(text.replace("DOCUMENTS", str(tmp_path / "documents.jsonl")))
    server = f"base_url={url}/v1,api_key={KEY},model=minigpt4_tiny,timeout=120"
    command = [sys.executable, "-c", LMMS_EVAL, server, str(tmp_path / "tasks")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**os.environ, **offline}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    client, answers = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY), []
    for image, text in questions:
        data = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": text}]
        asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, "temperature": 0}
        answers.append(client.chat.completions.create(model="minigpt4_tiny", **asked).choices[0].message.content)
    assert json.loads(done.stdout.splitlines()[-1]) == answers
    assert all(answers)


def test_the_command_serves_until_a_signal_and_logs_no_contents(process, url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=2)
    assert [model.id for model in client.models.list()] == ["minigpt4_tiny", "second"]
    question = [{"role": "user", "content": "Zebras in pyjamas?"}]
    answer = client.chat.completions.create(model="second", messages=question, max_tokens=5)
    question = [{"role": "user", "content": "What is this?"}]  # answered in more than 500 tokens
    long = {"messages": question, "max_tokens": 1000, "temperature": 0, "n": 8}
    stream = client.chat.completions.create(model="minigpt4_tiny", **long, stream=True)
    next(iter(stream))
    with ThreadPoolExecutor(1) as pool:
        impatient = client.with_options(max_retries=0)
        whole = pool.submit(impatient.chat.completions.create, model="second", **long)
        while not httpx.get(f"{url}/healthz").json()["waiting"] and not whole.done():
            pass
        process.send(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="stopped"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="stopped"):
            whole.result()
    assert process.wait() == [0]
    tokens = f"{answer.usage.prompt_tokens}\\+{answer.usage.completion_tokens}"
    assert re.search(rf"model=second tokens={tokens} [\d.]+ s", process.text())
    assert '"POST /v1/chat/completions HTTP/1.1" 200' in process.text()
    for secret in ("Zebras", KEY, "Traceback"):
        assert secret not in process.text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--limits", "imagebytes=5"], "did you mean 'image_bytes'?"),
        (["--ckpt", "other=nowhere.pth"], "there is no file"),
        (["--host", "256.1.1.1"], "choose another --port or --host"),
        (["--max-rows", "0"], "--max-rows: 0 must be above 0"),
    ],
)
def test_what_cannot_be_served_is_an_error_before_the_model_loads(config, command, arguments, reason):
    with pytest.raises(MiniGPT4Error, match=re.escape(reason)):
        command.serve(command.parse_args(["--cfg-path", str(config), "--port", "0", *arguments]))


@pytest.mark.parametrize(("file", "calls"), [("README.md", 1), ("docs/serve.md", 2), ("serve.py", 2)])
def test_commands_of_the_text_have_arguments_of_the_command(command, file, calls):
    text = re.sub(r"\\\n\s*", "", (REPOSITORY / file).read_text(encoding="utf-8"))
    found = re.findall(r"^ {4}(?:\S+=\S+ )?python serve\.py (.*)$", text, re.MULTILINE)
    assert len(found) == calls
    for call in found:
        assert (REPOSITORY / command.parse_args(shlex.split(call, comments=True)).cfg_path).is_file()

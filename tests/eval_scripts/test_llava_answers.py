"""The tiny LLaVA asked by the commands of evaluations: the reference's answers, the model's own template and images."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from minigpt4.conversation.llava import as_llava
from minigpt4.inference.image_list import cut
from minigpt4.processors import ClipImageEvalProcessor, open_image

REPOSITORY = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "data"
WHOLE = DATA / "parity_llava" / "stage2_linear"
IMAGES = DATA / "parity" / "images"
RUNS = json.loads((DATA / "llava_eval" / "golden.json").read_text())["answering"]
SHIPPED = yaml.safe_load((REPOSITORY / "eval_configs" / "llava_bench_eval.yaml").read_text())
SCRIPTS = {"model_vqa": "eval_llava_bench", "model_vqa_science": "eval_science_qa"}
BENCH = DATA / "llava_eval" / "vqa_questions.jsonl"
SCIENCE = DATA / "llava_eval" / "scienceqa" / "questions_for_answering.json"
WIDE = "img4_rgb_wide.png"
"""An image that `pad` and `square` make something else of."""


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts_of(folder: Path) -> list[str]:
    (file,) = folder.glob("answers_*.jsonl")
    return [line["text"] for line in lines_of(file)]


@pytest.fixture
def configure(tmp_path, llava_section) -> Callable[..., Path]:
    """`configure(generation, **model)`: the shipped configuration with tiny weights and short answers; its file.

    Without a checkpoint, the model is the whole tiny LLaVA.
    """

    def write(generation: dict, **model) -> Path:
        torch.set_num_threads(1)
        section = llava_section(projection="linear", llama_model=str(WHOLE)) | {"ckpt": None}
        decoding = SHIPPED["run"]["generation"] | {"max_new_tokens": 20} | generation
        run = SHIPPED["run"] | {"batch_size_eval": 3, "num_workers": 0, "device": "cpu", "generation": decoding}
        config = SHIPPED | {"model": SHIPPED["model"] | section | model, "run": run}
        path = tmp_path / "llava.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


@pytest.fixture
def answer(command, tmp_path) -> Callable[..., Path]:
    """`answer(script, config, questions, name, *more)`: asks, asserts the status, and returns the folder."""

    def ask(script: str, config: Path, questions: Path, name: str, *more: str, kind="answer", status=0) -> Path:
        arguments = [kind, "--cfg-path", str(config), "--questions", str(questions), "--image-path", str(IMAGES)]
        assert command(script).main([*arguments, "--save_path", str(tmp_path / name), *more]) == status
        return tmp_path / name

    return ask


@pytest.fixture(scope="module")
def whole(build_llava):
    """The whole tiny LLaVA."""
    return build_llava(llama_model=str(WHOLE), ckpt=None).eval()


@pytest.fixture(scope="module")
def said(whole) -> Callable[..., str]:
    """`said(image, text)`: its answer to a message in its template, about a padded image."""
    processor = ClipImageEvalProcessor(image_size=56, image_aspect_ratio="pad")

    def generate(image: Path, text: str) -> str:
        pixels = processor(open_image(image))[None]
        return whole.generate(pixels, [whole.prompt_template.format(text)], max_new_tokens=20)[0]

    return generate


# The reference's answers


@pytest.mark.parametrize("case", RUNS, ids=lambda case: f"{case['script']}-{case['arguments']['conv_mode']}")
def test_answers_are_the_published_ones(configure, answer, tmp_path, case):
    own = case["arguments"]
    model = {"llama_model": str(WHOLE.parent / "vicuna_tiny"), "image_aspect_ratio": "square"}
    config = configure({"num_beams": own.get("num_beams", 1)}, conv_template=own["conv_mode"], **model)
    questions, more = BENCH, []
    if case["script"] == "model_vqa_science":
        questions, more = SCIENCE, ["--single-pred-prompt"] * own["single_pred_prompt"]
    elif "num_chunks" in own:
        lines = BENCH.read_text().splitlines(keepends=True)
        questions = tmp_path / "chunk.jsonl"
        questions.write_text("".join(cut(lines, -(-len(lines) // own["num_chunks"]))[own["chunk_idx"]]))
    projector = f"tiny-llava={WHOLE.parent / 'projector_linear.bin'}"
    folder = answer(SCRIPTS[case["script"]], config, questions, "answers", "--ckpt", projector, *more)
    answers = lines_of(folder / "answers_tiny-llava.jsonl")
    assert len({line["answer_id"] for line in answers if isinstance(line["answer_id"], str)}) == len(answers)
    assert [line | {"answer_id": None} for line in answers] == case["lines"]


# A whole LLaVA


def test_whole_llava_needs_no_checkpoint(configure, answer, whole, tmp_path):
    config, projector = configure({}), tmp_path / "mm_projector.bin"
    torch.save({f"model.mm_projector.{n}": p.detach() for n, p in whole.llama_proj.named_parameters()}, projector)
    alone = answer("eval_llava_bench", config, BENCH, "alone")
    beside = answer("eval_llava_bench", config, BENCH, "beside", "--ckpt", str(projector))
    assert texts_of(alone) == texts_of(beside)
    (line, *_), setup = lines_of(alone / "answers_stage2_linear.jsonl"), json.loads((alone / "setup.json").read_text())
    assert line["model_id"] == "stage2_linear"
    assert setup["checkpoints"][0]["file"] == str(WHOLE / "model.safetensors")
    assert "USER: <image>\n{} ASSISTANT:" in setup["prompt"]


def test_whole_llava_comes_back_after_another_checkpoint(whole, build_llava):
    model = build_llava(llama_model=str(WHOLE), ckpt=None)
    model.load_checkpoint(WHOLE.parent / "projector_linear.bin")
    assert not torch.equal(model.llama_proj.weight, whole.llama_proj.weight)
    model.load_checkpoint(model.whole_file)
    assert torch.equal(model.llama_proj.weight, whole.llama_proj.weight)


def test_llm_alone_needs_a_checkpoint(configure, answer, capsys):
    config = configure({}, llama_model=str(WHOLE.parent / "vicuna_tiny"))
    answer("eval_llava_bench", config, BENCH, "none", status=2)
    assert "--ckpt: is missing, and model.llama_model is no whole LLaVA" in capsys.readouterr().err


# Prompts and images


def test_prompt_may_be_written_as_llava_writes_it(configure, answer, said, whole):
    folder = answer("eval_science_qa", configure({}), SCIENCE, "own", "--prompt", "<image>\n{} Why?")
    for record, text in zip(json.loads(SCIENCE.read_text()), texts_of(folder), strict=True):
        question = record["conversations"][0]["value"].replace("\n<image>", "") + " Why?"
        if "image" in record:
            assert text == said(IMAGES / record["image"], f"<image>\n{question}")
        else:
            prompt = whole.prompt_template.format(question)
            assert text == whole.generate(None, [prompt], max_new_tokens=20)[0]


@pytest.mark.parametrize("mark", ["<image>", "<ImageHere>"])
def test_question_with_a_place_for_an_image_is_named(configure, answer, tmp_path, capsys, mark):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": 7, "image": WIDE, "text": f"{mark}\nWhy?", "category": "conv"}))
    answer("eval_llava_bench", configure({}), questions, "none", status=2)
    assert f"question 7 holds {mark}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "message", ["<Img><ImageHere></Img> What?", "<Img><ImageHere></Img>\nWhat?", "<ImageHere>\nWhat?"]
)
def test_tags_of_a_template_stand_around_every_image(message):
    assert as_llava(message, "<im_start><image><im_end>") == "<im_start><image><im_end>\nWhat?"


def test_yes_or_no_questions(configure, answer, said, tmp_path):
    questions = tmp_path / "pope.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "image": WIDE, "text": "Is it a dog?", "label": "no"}) + "\n")
    folder = answer("eval_hallucination", configure({}), questions, "pope", kind="pope")
    (line,) = lines_of(folder / "answers_stage2_linear.jsonl")
    assert line["answer"] == said(IMAGES / WIDE, "<image>\nIs it a dog? Answer with yes or no.")


def test_captions_of_a_data_set_and_of_a_folder(configure, command, load_script, said, tmp_path):
    config, images = configure({"prompt": "<image>\nDescribe it."}), sorted(IMAGES.glob("*.png"))
    wanted = {path.name: said(path, "<image>\nDescribe it.") for path in images}
    lines = tmp_path / "captions.jsonl"
    given = ["--cfg-path", str(config), "--images", str(IMAGES), "--output", str(lines)]
    assert load_script("scripts/caption.py").main(given) == 0
    assert {line["image"]: line["caption"] for line in lines_of(lines)} == wanted
    (tmp_path / "test.json").write_text(json.dumps([{"image": path.name, "captions": ["A dog."]} for path in images]))
    info = {"test_ann_path": str(tmp_path / "test.json"), "image_path": str(IMAGES)}
    datasets = {"mine": {"builder": "image_caption_json", "build_info": info}}
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"datasets": datasets}))
    given = ["--cfg-path", str(config), "--save_path", str(tmp_path / "found"), "--metrics", "BLEU"]
    assert command("eval_flickr30k").main(given) == 0
    captions = json.loads((tmp_path / "found" / "captions_stage2_linear.json").read_text())
    assert {f"{line['image_id']}.png": line["caption"] for line in captions} == wanted

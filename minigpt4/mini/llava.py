"""LLaVA in the mini world: its vision tower, and how many questions about test scenes are answered right.

    python -m minigpt4.mini.llava output/mini_llava output/mini_llava/evaluation data/mini/llava

reads the files of answers of `eval_llava_bench.py answer`; it writes `report.md`, `report.txt` (the same for a
terminal), `report.json` and `scenes.png`.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minigpt4.common.utils import quick_imports
from minigpt4.evaluation.report import Table
from minigpt4.mini.files import IMAGE_SIZE, PATCH_SIZE, TRUTH_FILE, VIT_FILE, VIT_SIZES
from minigpt4.mini.report import COLOUR_PATTERN, COLUMNS, draw_figure, measure, named_things, percent, shuffled
from minigpt4.mini.scenes import LARGE, NUMBERS, SMALL

# The tower: the mini world's EVA-ViT as a CLIP


_WIDTH = 256
"""Of the CLIP: the ViT's 192 channels, and others that stay 0."""
_ANCHOR = 500.0


@torch.no_grad()
def write_clip(folder: Path) -> bool:
    """Write the mini world's vision encoder as a directory of a CLIP; False if `folder` is there already.

    Its tokens are those of `eva_vit_mini.pth`, each minus its mean, in the first 192 of 256 channels. Centred writes
    change nothing in a pre-norm transformer, and a norm over more channels of mean 0 is the old one after rescaling.
    CLIP's first norm, which EVA lacks, finds two channels so large that it divides every token by the same number,
    and drops them.
    """
    if (folder / "config.json").is_file():
        return False
    with quick_imports():
        from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

        from minigpt4.models.eva_vit import EVA_NORM_EPS
    eva = {name: tensor.float() for name, tensor in torch.load(VIT_FILE, weights_only=True).items()}
    width, depth = VIT_SIZES["embed_dim"], VIT_SIZES["depth"]
    config = CLIPVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=width * VIT_SIZES["mlp_ratio"],
        num_hidden_layers=depth,
        num_attention_heads=VIT_SIZES["num_heads"] * _WIDTH // width,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
        layer_norm_eps=EVA_NORM_EPS * width / _WIDTH,
    )
    model = CLIPVisionModel(config)
    weights = model.state_dict()
    for tensor in weights.values():
        tensor.zero_()

    def put(name: str, tensor: Tensor) -> None:
        weights[name][tuple(slice(size) for size in tensor.shape)] = tensor

    def centred(tensor: Tensor) -> Tensor:
        """Of a weight that writes tokens: channels first."""
        return tensor - tensor.mean(0)

    positions_NV = eva["pos_embed"][0].clone()
    positions_NV[1:] += eva["patch_embed.proj.bias"]
    put("embeddings.class_embedding", centred(eva["cls_token"][0, 0]))
    put("embeddings.patch_embedding.weight", centred(eva["patch_embed.proj.weight"]))
    put("embeddings.position_embedding.weight", centred(positions_NV.T).T)
    weights["embeddings.position_embedding.weight"][:, -2:] = torch.tensor([_ANCHOR, -_ANCHOR])
    weights["pre_layrnorm.weight"][:width] = _ANCHOR * (2 / _WIDTH) ** 0.5
    for block in range(depth):
        own, new = f"blocks.{block}.", f"encoder.layers.{block}."
        for number in "12":
            put(f"{new}layer_norm{number}.weight", eva[f"{own}norm{number}.weight"] * (width / _WIDTH) ** 0.5)
            put(f"{new}layer_norm{number}.bias", eva[f"{own}norm{number}.bias"])
        for name, weight in zip("qkv", eva[f"{own}attn.qkv.weight"].chunk(3), strict=True):
            put(f"{new}self_attn.{name}_proj.weight", weight)
        for name in "qv":  # EVA's keys have no bias
            put(f"{new}self_attn.{name}_proj.bias", eva[f"{own}attn.{name}_bias"])
        for end in ("weight", "bias"):
            put(f"{new}self_attn.out_proj.{end}", centred(eva[f"{own}attn.proj.{end}"]))
            put(f"{new}mlp.fc1.{end}", eva[f"{own}mlp.fc1.{end}"])
            put(f"{new}mlp.fc2.{end}", centred(eva[f"{own}mlp.fc2.{end}"]))
    CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE).save_pretrained(folder)
    model.save_pretrained(folder)
    return True


# Whether answers are right


KIND_NAMES = {"conv": "conversation", "detail": "detail", "complex": "complex reasoning"}
ALL = "all"
_NUMBER = re.compile(rf"\b({'|'.join(NUMBERS)})\b")
_SIZE = re.compile(rf"\b({SMALL}|{LARGE})\b")
_LOOKS: tuple[tuple[str, str, Callable[[str], object]], ...] = (
    ("how many", "numbers", lambda text: _NUMBER.findall(text)[-1:]),
    ("is there|are there more", "yes or no", lambda text: re.findall(r"[a-z]+", text)[:1]),
    (r".*\bsmall or large", "sizes", lambda text: set(_SIZE.findall(text))),
    ("what colour", "background", lambda text: set(COLOUR_PATTERN.findall(text))),
    ("", "things and places", named_things),
)
"""Beginning of a question, what it asks for, and what two right answers have in common."""
TEXT = """# LLaVA in the mini world

Right answers to {questions} questions about {images} test scenes, whose combinations no training scene has:

{kinds}
By what a question asks for:

{asked}
How true the detailed descriptions are; in the last row each image has the description of another:

{measures}
- scenes with their descriptions: `{output}/scenes.png`; answers: `{evaluation}/answers_*.jsonl`
- checkpoints: `{output}/stage1.pth`, `stage2.pth`; logs: `{output}/logs`
- ask about a picture: `python demo.py --cfg-path eval_configs/mini_llava_eval.yaml`, or in the terminal, with \
`--cli --image FILE`
"""


def asks_for(question: str) -> tuple[str, Callable[[str], object]]:
    """What a short question or one of complex reasoning asks for, and how an answer to it is read."""
    return next((name, look) for start, name, look in _LOOKS if re.match(start, question.lower()))


def rightness(question: str, category: str, answer: str, truth: str) -> float:
    """0 or 1; of a detailed description the share of the true sentences that stand in it, word by word."""
    if category == "detail":
        sentences = re.findall(r"[^.]+\.", truth.lower())
        return sum(sentence.strip() in answer.lower() for sentence in sentences) / len(sentences)
    _, look = asks_for(question)
    return float(look(answer.lower()) == look(truth.lower()))


def score(questions: Mapping[str, dict], answers: Mapping[str, str], truth: Mapping[str, str]) -> dict[str, dict]:
    """{"kinds": by kind of conversation and, their mean, all; "asked": by what is asked for}, shares from 0 to 1."""
    kinds, asked = defaultdict(list), defaultdict(list)
    for key, question in questions.items():
        text, category = question["text"], question["category"]
        right = rightness(text, category, answers[key], truth[key])
        kinds[KIND_NAMES[category]].append(right)
        if category != "detail":
            asked[asks_for(text)[0]].append(right)
    both = [{name: sum(own) / len(own) for name, own in groups.items()} for groups in (kinds, asked)]
    return {"kinds": both[0] | {ALL: sum(both[0].values()) / len(both[0])}, "asked": both[1]}


def write_report(output: Path, evaluation: Path, data: Path) -> None:
    """Read answers and truth; write the files of the report into `output`, `report.txt` last.

    SampleError if a file of answers does not hold exactly the questions.
    """
    with quick_imports():
        from minigpt4.evaluation.caption_data import require_same_ids
        from minigpt4.evaluation.questions import read_answer_lines, read_lines
    questions = {key: record for key, record, _ in read_lines(data / "questions_test.jsonl")}
    truth = {key: record["text"] for key, record in read_answer_lines(data / "answers_test.jsonl").items()}
    scenes = json.loads((data / TRUTH_FILE).read_text(encoding="utf-8"))
    setup = json.loads((evaluation / "setup.json").read_text(encoding="utf-8"))
    scores, measures, said = {}, {}, {}
    for name in (checkpoint["name"] for checkpoint in setup["checkpoints"]):
        file = evaluation / f"answers_{name.replace(' ', '_')}.jsonl"
        answers = {key: record["text"] for key, record in read_answer_lines(file).items()}
        require_same_ids(questions, answers, f"{file}: ")
        scores[name] = score(questions, answers, truth)
        details = {key: one for key, one in questions.items() if one["category"] == "detail"}
        said = {Path(one["image"]).stem: answers[key] for key, one in details.items()}
        measures[name] = measure(said, scenes)
    measures[f"{name}, shuffled"] = measure(shuffled(said), scenes)
    draw_figure(output / "scenes.png", data / "images" / "test", said)

    def table(group: str) -> str:
        rows = [[name, *map(percent, own[group].values())] for name, own in scores.items()]
        return Table(["checkpoint", *scores[name][group]], rows).markdown()

    rows = [[name, *(percent(getattr(own, field)) for field in COLUMNS)] for name, own in measures.items()]
    text = TEXT.format(
        questions=len(questions),
        images=len(scenes),
        kinds=table("kinds"),
        asked=table("asked"),
        measures=Table(["checkpoint", *COLUMNS.values()], rows).markdown(),
        output=output,
        evaluation=evaluation,
    )
    (output / "report.md").write_text(text, encoding="utf-8")
    content = {"scores": scores, "measures": {name: vars(own) for name, own in measures.items()}}
    (output / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (output / "report.txt").write_text(text.replace("`", ""), encoding="utf-8")


if __name__ == "__main__":
    write_report(*map(Path, sys.argv[1:]))

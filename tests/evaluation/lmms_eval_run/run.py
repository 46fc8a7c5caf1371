"""What `test_lmms_eval_adapter.py` runs in a process of its own, for lmms-eval changes settings of Pillow and torch.

python run.py FOLDER     writes FOLDER/found.json: what lmms-eval's own evaluator reports of the two tasks there, and
                         what single requests of lmms-eval's own kind give
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from PIL import Image

TASK, SPLIT = "drawn", "test"


def evaluated(folder: Path) -> dict[str, Any]:
    """Both tasks by lmms-eval, which finds and builds the model by its name: answers and scores."""
    results = simple_evaluate(
        model="minigpt4",
        model_args=f"cfg_path={folder / 'model.yaml'}",
        tasks=["tiny_answers", "tiny_choices"],
        batch_size=2,
        device="cpu",
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = {
        task: [sample["filtered_resps"] for sample in sorted(own, key=lambda sample: sample["doc_id"])]
        for task, own in results["samples"].items()
    }
    return {"samples": samples, "results": results["results"]}


def instance(kind: str, *arguments: Any) -> Instance:
    """A request as lmms-eval's tasks make it."""
    return Instance(kind, arguments, 0, {"task": TASK, "doc_id": 0, "repeats": 1, "split": SPLIT})


def visuals(document: list[str]) -> list[Any]:
    """The images that a document names; a word without a dot stands for something that is no image."""
    return [Image.open(name) if "." in name else name for name in document]


def single(folder: Path) -> dict[str, Any]:
    """Requests with decodings of their own, in one call; and what is refused."""
    model = get_model("minigpt4").create_from_arg_string(
        f"cfg_path={folder / 'model.yaml'},ckpt={folder / 'other.pth'}", {"batch_size": 2, "device": "cpu"}
    )
    images = sorted(str(path) for path in folder.glob("*.png"))
    model.task_dict = {TASK: {SPLIT: [images[:1], images[:2], [], ["sound"]]}}
    settings: dict[str, dict[str, Any]] = {
        "plain": {"max_new_tokens": 6},
        "stopped": {"max_new_tokens": 6, "until": ["e"]},
        "beams": {"max_new_tokens": 6, "num_beams": 2, "temperature": 0, "top_p": 0},
        "unknown": {"max_new_tokens": 6, "image_aspect_ratio": "pad"},
    }
    requests = [instance("generate_until", "What is it?", own, visuals, 0, TASK, SPLIT) for own in settings.values()]
    texts = {"marked": ("First <image> then <image>?", 1), "before": ("Which differ?", 1), "text": ("Say it.", 2)}
    requests += [
        instance("generate_until", text, settings["plain"], visuals, document, TASK, SPLIT)
        for text, document in texts.values()
    ]
    answers = dict(zip([*settings, *texts], model.generate_until(requests), strict=True))
    torch.manual_seed(0)
    hot = {"max_new_tokens": 20, "temperature": 5.0}
    drawn = [model.generate_until([instance("generate_until", "?", hot, visuals, 0, TASK, SPLIT)]) for _ in range(2)]
    targets = [
        instance("loglikelihood", "What?", lambda document: f"{len(document)} images", visuals, 1, TASK, SPLIT),
        instance("loglikelihood", "What?", " no", visuals, 0, TASK, SPLIT),
        instance("loglikelihood", "", "no"),
    ]
    return {
        "answers": answers,
        "drawn": drawn,
        "losses": [result.text for result in model.loglikelihood(targets)],
        "errors": errors(model, folder, settings["plain"]),
    }


def errors(model: Any, folder: Path, plain: dict[str, Any]) -> dict[str, str]:
    """The texts of what is refused."""
    yaml = folder / "model.yaml"
    attempts = {
        "sound": lambda: model.generate_until([instance("generate_until", "?", plain, visuals, 3, TASK, SPLIT)]),
        "marks": lambda: model.generate_until([instance("generate_until", "<image>", plain, visuals, 1, TASK, SPLIT)]),
        "rounds": lambda: model.generate_until_multi_round([]),
        "argument": lambda: get_model("minigpt4")(cfg_path=str(yaml), chekpoint="a.pth"),
        "no file": lambda: get_model("minigpt4")(),
        "batch": lambda: get_model("minigpt4")(cfg_path=str(yaml), batch_size="auto"),
        "checkpoint": lambda: get_model("minigpt4")(cfg_path=str(yaml), ckpt="gone.pth"),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    place = Path(sys.argv[1])
    torch.set_num_threads(1)
    (place / "found.json").write_text(json.dumps(evaluated(place) | single(place)))

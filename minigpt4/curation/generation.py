"""The step `generate`: the stage-1 model describes each image, and goes on once where it said little."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from minigpt4.common.checkpoint import file_sha256
from minigpt4.common.config import Config
from minigpt4.common.curation_schema import GenerateConfig
from minigpt4.common.dist_utils import Processes
from minigpt4.common.errors import ConfigError
from minigpt4.common.run_folder import versions
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER
from minigpt4.curation.records import CurationFolder, Progress, Record, digest_of, dropped, text_of
from minigpt4.datasets.feature_store import CachedBatch
from minigpt4.evaluation.questions import IMAGE_MARKS
from minigpt4.inference.captioning import AnswerStore, Line, answer_missing, caption_provenance
from minigpt4.inference.image_list import ImageFile
from minigpt4.inference.pipeline import BATCH_SIZE, Pipeline, PromptRules, image_reader
from minigpt4.models.feature_cache import FeatureEncoder
from minigpt4.models.tokenizer import load_tokenizer
from minigpt4.processors import process_image

STEP = "generate"


def token_counter(cfg: Config) -> Callable[[str], int]:
    """Counts the tokens of a text by the LLM's tokenizer, without special tokens."""
    tokenizer = load_tokenizer(cfg.model.llm_directory())
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def generate_descriptions(
    folder: CurationFolder, cfg: Config, settings: GenerateConfig, processes: Processes, *, retry_failed: bool = False
) -> list[Record] | None:
    """Write `2_generated.jsonl`, on rank 0; every rank must call it.

    Answers are kept by what they depend on: the same command goes on after a kill, and images that are added later
    cost only themselves.
    """
    records = processes.on_main(lambda: folder.read("select"))
    # By content: equal images are described once, and one that changed is described anew.
    images = {one["sha256"]: folder.image(one) for one in records if "dropped" not in one}
    items = [ImageFile(sha256, file, sha256) for sha256, file in images.items()]
    count, size = token_counter(cfg), cfg.run.batch_size_eval or BATCH_SIZE
    rules = PromptRules.of(cfg, settings.prompt, source="curation.generate.prompt")
    own, about = processes.on_main(lambda: caption_provenance(cfg, rules, folder.path))
    del own["image_folder"]
    about |= {"batch_size": size, "versions": versions()}

    def turn(name: str, rules: PromptRules, items: Sequence[ImageFile], **more: str) -> Mapping[str, Line]:
        made_from = own | more
        path = folder.path / "progress" / f"{STEP}.{digest_of(made_from)}.{name}.jsonl"
        fields = ("image_id", "image", "caption", "ended", "error")
        store = AnswerStore(path, path.with_suffix(".made_from.json"), "image", fields, "--output")
        answer_missing(
            cfg, rules, items, size, store, processes, made_from, about, name=name, retry_failed=retry_failed
        )
        return processes.broadcast(store.lines() if processes.is_main else None)

    first = turn("first", rules, items)
    said = {sha256: line.get("caption", "") for sha256, line in first.items()}
    short = [item for item in items if said[item.name].strip() and count(said[item.name]) <= settings.more_up_to]
    prompts = {item.image_id: second_prompt(cfg, rules, settings, said[item.name]) for item in short}
    second = turn("second", replace(rules, own_prompts=prompts), short, more=settings.more)
    asked = {sha256: second[sha256] for sha256 in prompts}  # there may be others, of another limit
    if not processes.is_main:
        return None
    described = [
        one if "dropped" in one else one | _fields(*(said.get(one["sha256"]) for said in (first, asked)), count)
        for one in records
    ]
    said_more = {"more": settings.more, "more_up_to": settings.more_up_to}
    folder.write(STEP, described, {"input": folder.sha256("select"), **own, **said_more})
    return described


def second_prompt(cfg: Config, rules: PromptRules, settings: GenerateConfig, first: str) -> str:
    """The whole conversation up to the second answer, in the template of the first turn."""
    instruction = settings.prompt.replace(cfg.model.PLACEHOLDER, IMAGE_PLACEHOLDER)
    said = first.replace(IMAGE_PLACEHOLDER, "")  # the model's words must not open a place for an image
    return f"{rules.prompt}{said}{cfg.model.end_sym}{rules.prompt.replace(instruction, settings.more)}"


def _fields(first: Line, second: Line | None, count: Callable[[str], int]) -> Record:
    """Of a record: both answers, their tokens, whether the model ended them, and both joined."""
    if error := first.get("error") or (second or {}).get("error"):
        return {"dropped": dropped(STEP, "unreadable image", error)}
    texts = [line["caption"] for line in (first, second) if line]
    fields: Record = {}
    for name, line in (("first", first), ("second", second)):
        if line:
            fields |= {name: line["caption"], f"tokens_{name}": count(line["caption"]), f"ended_{name}": line["ended"]}
    fields["text"] = " ".join(text.strip() for text in texts if text.strip())
    return fields if fields["text"] else fields | {"dropped": dropped(STEP, "empty", "the model said nothing")}


# What the filter needs of the model


def image_features(folder: CurationFolder, cfg: Config, records: Sequence[Record]) -> dict[str, np.ndarray]:
    """The mean of an image's features, of length 1, by record id; float32. `run.feature_cache` keeps them, and what it
    lacks is computed; ConfigError without one."""
    if not cfg.run.feature_cache:
        raise ConfigError("run.feature_cache: is missing; curation.filter.image_alike reads features from it")
    reader, encoder, found = image_reader(cfg), None, {}
    for record in records:
        if "dropped" not in record:
            image = CachedBatch.of([reader.read(folder.image(record))])
            features_1QV = image.features
            if image.missing:
                encoder = encoder or FeatureEncoder(Pipeline(cfg).model)
                features_1QV = encoder.features(image).cpu()
            mean_V = features_1QV[0].float().mean(dim=0)
            found[record["id"]] = (mean_V / mean_V.norm().clamp(min=1e-12)).numpy()
    return found


def image_gains(
    folder: CurationFolder, cfg: Config, settings: GenerateConfig, records: Sequence[Record]
) -> dict[str, float]:
    """How much likelier the image makes each text, nats a token, by record id; what is known is not computed again."""
    rules = PromptRules.of(cfg, settings.prompt, source="curation.generate.prompt")
    path, bare = Path(cfg.model.ckpt), IMAGE_MARKS.sub("", rules.prompt)
    progress = Progress(folder, "likelihood", {"prompt": rules.prompt, "checkpoint": file_sha256(path)})
    gains, model, count = {}, None, token_counter(cfg)
    for record in records:
        text = text_of(record)
        if "dropped" in record or not text:
            continue
        of = [record["sha256"], text]
        fields = progress.get(record["id"], of)
        if fields is None:
            model = model or Pipeline(cfg)
            image_13SS = process_image(model.processor, folder.image(record))[None].to(model.model.device)
            (seen, _), (blind, _) = (
                model.model.log_likelihoods(image, [prompt], [text])[0]
                for image, prompt in ((image_13SS, rules.prompt), (None, bare))
            )
            fields = {"gain": (seen - blind) / max(1, count(text))}
            progress.add(record["id"], of, fields)
        gains[record["id"]] = fields["gain"]
    return gains

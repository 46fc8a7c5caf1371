"""A YAML section becomes its dataclass, or one error that names every fault with key, file and remedy.

First values, then paths, then the sections `run:`, `datasets:` and `model:`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import yaml
from omegaconf import OmegaConf

from minigpt4.common.binding import PathTo, bind, expand_braces, missing_paths, require_paths
from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.common.schemas import DatasetConfig, GenerationSettings, RunConfig

SHARDS = {"builder": "image_caption_shards", "build_info": {"storage": "x/{0..3}.tar"}}
PAIR = {"builder": "image_caption_json", "build_info": {"ann_path": "a.json", "image_path": "images"}}
INFO = PAIR["build_info"]


def _section(schema: type, **values):
    return bind(schema, values, section="own", source="user.yaml")


@pytest.mark.parametrize(
    ("schema", "key", "value", "bound"),
    [
        (RunConfig, "seed", "5", 5),
        (RunConfig, "max_epoch", 1e0, 1),
        (RunConfig, "init_lr", "1e-4", 1e-4),
        (RunConfig, "init_lr", 1, 1.0),
        (RunConfig, "train_splits", ["a", "b"], ["a", "b"]),
        (RunConfig, "generation", {"max_new_tokens": 9}, GenerationSettings(max_new_tokens=9)),
        (MiniGPT4Config, "end_sym", "</s>", "</s>"),
        *[
            (RunConfig, "job_name", text, text)
            for text in ("###", "<Img><ImageHere></Img>", "a/footpath/to", "/todo_list")
        ],
    ],
)
def test_value_of_the_right_type_is_bound(schema, key, value, bound):
    result = getattr(_section(schema, **{key: value}), key)
    assert result == bound
    assert type(result) is type(bound)


def test_omegaconf_node_is_bound_with_its_interpolations():
    config = OmegaConf.create({"root": "data", "run": {"job_name": "${root}/x"}})
    assert bind(RunConfig, config.run, section="run", source="user.yaml").job_name == "data/x"


@pytest.mark.parametrize(
    "text", ["please set this value to the path of x", "/path/to/x/", "path/to/x.pth", "<your path>", "TODO", "???"]
)
def test_placeholder_is_refused(text):
    with pytest.raises(
        ConfigError, match=r"^user\.yaml:\n  - own\.end_sym: .* is a placeholder(?s:.*)- own.llama_model: "
    ):
        _section(MiniGPT4Config, end_sym=text, llama_model="<vicuna>")


# Paths


@dataclass
class Data:
    storage: Annotated[str | None, PathTo("data", training=True)] = None


@dataclass
class Section:
    weights: Annotated[str | None, PathTo("file")] = None
    llm: Annotated[str | None, PathTo("dir")] = None
    output: Annotated[str, PathTo("dir", later=True)] = "no/such/output"
    resume: Annotated[str | None, PathTo("checkpoint")] = None
    note: str = "no/such/note"
    evaluate: bool = False
    data: Data = field(default_factory=Data)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llm").mkdir()
    for name in ("w.pth", "0.tar", "1.tar"):
        (tmp_path / name).touch()


@pytest.mark.parametrize(
    ("section", "missing"),
    [
        (Section(), []),
        (Section(weights="w.pth", llm="llm", resume="auto"), []),
        (Section(weights="https://example.org/w.pth"), []),
        (Section(data=Data("{0..1}.tar")), []),
        (Section(data=Data("llm")), []),
        (Section(data=Data("pipe:cat nowhere.tar")), []),
        (Section(data=Data("s3://bucket/{0..9}.tar")), []),
        (Section(data=Data("gone"), evaluate=True), []),
        (Section(weights="gone.pth"), [("run.weights", "gone.pth")]),
        (Section(weights="llm"), [("run.weights", "llm")]),
        (Section(llm="w.pth"), [("run.llm", "w.pth")]),
        (Section(data=Data("{0..7}.tar")), [("run.data.storage", "7.tar")]),
    ],
)
def test_missing_paths_are_those_that_are_not_here_and_not_remote(section, missing, files):
    assert missing_paths({"run": section}) == missing


def test_missing_paths_of_all_sections_stand_in_one_error(files):
    require_paths({"model": Section(weights="w.pth")}, "user.yaml")
    with pytest.raises(ConfigError, match=r"user\.yaml") as error:
        require_paths({"model": Section(weights="a.pth"), "datasets.x": Section(data=Data("b"))}, "user.yaml")
    assert "model.weights: a.pth does not exist; set it" in str(error.value)
    assert "datasets.x.data.storage: b does not exist" in str(error.value)
    with pytest.raises(ConfigError) as error:
        require_paths({"run": Section(weights="llm", llm="w.pth")}, "user.yaml")
    assert "run.weights: llm is a folder, not a file" in str(error.value)
    assert "run.llm: w.pth is a file, not a folder" in str(error.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..2000000000}.tar",
        "http://x/{0..2000000000}.tar",
        "{0..99999}{0..99999}.tar",
        "{" + "0" * 5000 + "..9}.tar",
    ],
)
def test_braces_that_stand_for_too_much_are_refused_before_they_are_expanded(pattern, monkeypatch):
    monkeypatch.setattr("minigpt4.common.binding.MOST_SHARDS", 100_000)
    with pytest.raises(ConfigError, match=r"data\.storage"):
        bind(Section, {"data": {"storage": pattern}}, section="model", source="user.yaml")


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{08..10..2}", ["08", "10"]),
        ("{a,b{1..2},}x", ["ax", "b1x", "b2x", "x"]),
        ("{z..y}", ["z", "y"]),
        ("a{b}c", ["a{b}c"]),
        (r"\{1..3\}", ["{1..3}"]),
        ("{0..9..0}", list("0123456789")),
    ],
)
def test_braces_stand_for_what_a_shell_makes_of_them(pattern, expanded):
    assert expand_braces(pattern) == expanded


def test_published_shards_are_few_enough():
    assert len(expand_braces("data/{cc/{00000..01255},laion/{00000..10488}}.tar")) == 11745


def test_tilde_is_the_home_directory_in_path_fields_only(monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    values = {"llm": "~/llm", "weights": "https://x/~me/y", "note": "~/note", "data": {"storage": "~/{0..9}.tar"}}
    section = bind(Section, values, section="model", source="a.yaml")
    expected = Data("/users/me/{0..9}.tar")
    assert section == Section(llm="/users/me/llm", weights="https://x/~me/y", note="~/note", data=expected)


@pytest.mark.parametrize("name", ["~nouser/x", "a\0b", "\ud800"])
@pytest.mark.parametrize("key", ["output", "weights"])
def test_name_that_no_file_can_have_is_refused(key, name):
    with pytest.raises(ConfigError, match=f"model.{key}: "):
        bind(Section, {key: name}, section="model", source="user.yaml")


# The sections of a run

PUBLISHED_KEYS = """
task runner lr_sched init_lr min_lr warmup_lr lr_decay_rate weight_decay beta2 max_epoch iters_per_epoch
warmup_steps accum_grad_iters num_workers batch_size_train batch_size_eval seed output_dir amp resume_ckpt_path
evaluate train_splits valid_splits test_splits device world_size dist_url distributed use_dist_eval_sampler
wandb_log job_name log_freq
"""


def test_published_keys_of_a_run_are_known():
    assert set(PUBLISHED_KEYS.split()) <= {field.name for field in dataclasses.fields(RunConfig)}


def test_training_runs_of_the_reference_are_bound_unchanged(golden):
    for run in golden["train"]["runs"]:
        bound = dataclasses.asdict(_section(RunConfig, **run["run"]))
        assert {key: bound[key] for key in run["run"]} == run["run"]


def test_training_needs_rate_and_length_which_an_evaluation_does_not():
    faults = list(_section(RunConfig, max_epoch=2).training_faults())
    assert [fault.partition(":")[0] for fault in faults] == ["run.init_lr", "run.iters_per_epoch"]
    assert not list(_section(RunConfig, evaluate=True).training_faults())


def test_processors_default_to_the_published_ones_and_take_further_keys():
    config = _section(DatasetConfig, **SHARDS)
    assert config.vis_processor.train.name == "blip2_image_train"
    assert config.vis_processor.eval.name == "blip2_image_eval"
    assert config.text_processor.eval.name == "blip_caption"
    assert config.text_processor.eval.arguments() == {}
    vision = {"train": {"name": "blip2_image_train", "image_size": 448, "min_scale": 0.5}}
    config = _section(DatasetConfig, **SHARDS, vis_processor=vision)
    assert config.vis_processor.train.arguments() == {"image_size": 448, "min_scale": 0.5}


@pytest.mark.parametrize("good", [SHARDS, PAIR, {**PAIR, "build_info": {"storage": "cc_sbu_align"}}])
def test_either_way_to_name_the_data_is_accepted(good):
    assert _section(DatasetConfig, **good).builder == good["builder"]


RUN_FAULTS = """
init_lr=0 init_lr=.nan init_lr=.inf min_lr=-1 min_lr=1e-3 max_epoch=0 iters_per_epoch=-5 accum_grad_iters=0
warmup_steps=-1 job_name=5 log_freq=null log_freq=2.5 3=4
num_workers=-1 num_workers=1000000 batch_size_train=0 batch_size_eval=1000000000000000 beta2=0 beta2=1.0
lr_decay_rate=0 lr_decay_rate=1.5 max_grad_norm=0 max_bad_share=-0.1 max_bad_share=1.1 device=gpu device=cuda:x
amp_dtype=fp8 seed=-1 seed=1e30 seed=9223372036854775808 seed=true max_epochs=5 max_iters=5
generation.num_beams=0 generation.max_new_tokens=0 generation.min_length=-1 generation.top_p=0 generation.top_p=1.1
generation.temperature=0 generation.repetition_penalty=-2 generation.stop=[""] generation.do_sample=maybe
generation.beams=5 generation=fast train_splits=train train_splits=[a,3] train_splits=[TODO]
"""
MODEL_FAULTS = """
vit_config.depth=2.5 vit_config.mlp_ratio=0 vit_config.dept=3 qformer_config.hidden_size=1000000000 vit_precision=int8
llm_precision=fp8 proj_layers=2 vit_layer=0 drop_path_rate=1 device_8bit=-1 max_txt_len=0 prompt=Describe.
train.lmm=full train.llm=full train.llm=half train.projection=lora train.vision=qlora train.llm=last lora_alpha=0
lora_dropout=1
"""
FAULTS = [(RunConfig, fault) for fault in RUN_FAULTS.split()]
FAULTS += [(MiniGPT4Config, fault) for fault in MODEL_FAULTS.split()]


@pytest.mark.parametrize(("schema", "fault"), FAULTS)
def test_faulty_value_is_refused_by_its_key(schema, fault):
    key, _, text = fault.partition("=")
    outer, _, inner = key.partition(".")
    value = yaml.safe_load(text)
    good = {"init_lr": 1e-4} if schema is RunConfig else {}
    outer = int(outer) if outer.isdigit() else outer
    with pytest.raises(ConfigError, match=rf"^user\.yaml:\n  - own\.{key}\b"):
        bind(schema, good | {outer: {inner: value} if inner else value}, section="own", source="user.yaml")


def test_all_rules_that_are_broken_are_told_and_a_list_is_no_section():
    with pytest.raises(ConfigError, match=r"own\.min_lr: .*\n.*own\.device: "):
        _section(RunConfig, init_lr=1e-4, min_lr=1, device="gpu")
    with pytest.raises(ConfigError, match=r"own: \[1\] must be keys with values"):
        bind(RunConfig, [1], section="own", source="user.yaml")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("builder", {}),
        ("build_info.storage", {"builder": "image_caption_shards"}),
        ("build_info.ann_path", {"builder": "image_caption_json"}),
        ("build_info.image_path", {**PAIR, "build_info": {"ann_path": "a.json"}}),
        ("build_info.storage", {**PAIR, "build_info": {**INFO, "storage": "c"}}),
        ("build_info.split_field", {**PAIR, "build_info": {**INFO, "split_field": "s", "val_ann_path": "v"}}),
        ("build_info.storage", {**SHARDS, "build_info": {"storage": "/path/to/{0..3}.tar"}}),
        ("build_info.images", {**SHARDS, "build_info": {"storage": "x", "images": {"storage": "i"}}}),
        ("batch_size", {**SHARDS, "batch_size": 0}),
        ("sample_ratio", {**SHARDS, "sample_ratio": 0}),
        ("data_type", {**SHARDS, "data_type": "videos"}),
        ("sample_ration", {**SHARDS, "sample_ration": 2}),
        ("vis_processor.trian", {**SHARDS, "vis_processor": {"trian": {"name": "x"}}}),
        ("vis_processor.train.image_size", {**SHARDS, "vis_processor": {"train": {"name": "x", "image_size": 0}}}),
    ],
)
def test_faulty_dataset_is_refused_by_its_key(key, values):
    with pytest.raises(ConfigError, match=rf"^user\.yaml:\n  - own\.{key}: "):
        _section(DatasetConfig, **values)


def test_whole_ratio_stays_whole_for_the_feature_cache():
    sizes = [_section(MiniGPT4Config, vit_config={"mlp_ratio": ratio}).vit_config for ratio in (4, 4.0, 4.5)]
    assert str(sizes) == "[{'mlp_ratio': 4}, {'mlp_ratio': 4}, {'mlp_ratio': 4.5}]"


def test_keys_of_other_lavis_models_may_be_switched_off():
    assert _section(MiniGPT4Config, lora_r=0, prompt="") == MiniGPT4Config()


@pytest.mark.parametrize("template", ["", "tokenizer", "{}", "###Human: {} ###Assistant: ", "{{json}} {}", "{{{}}}"])
def test_template_with_one_place_is_taken(template):
    assert _section(MiniGPT4Config, prompt_template=template).prompt_template == template


def test_any_other_template_is_refused_and_not_tried_out():
    wrong = "none|{} {}|{0}|{name}|{0.__class__}|{0[0]}|{!r}|{:10}|{:>9999999999}|{0:>9999999999}|{:{}}|{|} {}|{}}|{{}}"
    for template in wrong.split("|"):
        with pytest.raises(ConfigError, match=r"own\.prompt_template: "):
            _section(MiniGPT4Config, prompt_template=template)

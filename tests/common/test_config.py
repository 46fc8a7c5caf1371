"""Merging default files, the user's YAML and options: the reference's result, and clear errors around it."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minigpt4.common.config import Config
from minigpt4.common.config_files import DefaultFiles, find_default_files
from minigpt4.common.errors import ConfigError

PARITY = Path(__file__).parents[1] / "data" / "parity"
GOLDEN = json.loads((PARITY / "golden.json").read_text())["config"]
MERGED = [case for case in GOLDEN["cases"] if "merged" in case]
REFUSED = [case for case in GOLDEN["cases"] if "error" in case]

LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))])
MINIMAL = "model: {arch: minigpt4, model_type: pretrain_vicuna0}\ndatasets: {cc_sbu_align: {}}\nrun: {}\n"


def _merge(file: Path, options: list[str] | None = None, defaults: DefaultFiles | None = None) -> Config:
    return Config(SimpleNamespace(cfg_path=str(file), options=options), defaults)


@pytest.fixture
def reference_defaults() -> DefaultFiles:
    """The default files that the reference had when the golden results were made."""
    return DefaultFiles(
        models={"minigpt4": {kind: PARITY / file for kind, file in GOLDEN["defaults"]["model"].items()}},
        datasets={
            name: {kind: PARITY / file for kind, file in files.items()}
            for name, files in GOLDEN["defaults"]["datasets"].items()
        },
    )


@pytest.fixture
def user_file(tmp_path):
    """Writes a YAML file and returns its path."""

    def write(text: str, name: str = "user.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize("case", MERGED, ids=lambda case: f"{case['user']}-{case['options']}"[:60])
def test_merged_configuration_is_the_references(case, reference_defaults):
    merged = _merge(PARITY / case["user"], case["options"], reference_defaults).to_dict()
    # 1 == 1.0 == True in Python; as JSON they differ.
    assert json.dumps(merged, sort_keys=True) == json.dumps(case["merged"], sort_keys=True)


REASONS = ("--options model.prompt_template=", "`datasets:`", "model.model_type", "model.model_type", "--options")


@pytest.mark.parametrize(("case", "text"), zip(REFUSED, REASONS, strict=True), ids=lambda value: str(value)[:40])
def test_what_the_reference_cannot_merge_is_an_error_that_says_why(case, text, reference_defaults):
    with pytest.raises(ConfigError) as error:
        _merge(PARITY / case["user"], case["options"], reference_defaults)
    assert text in str(error.value)


def test_sections_are_reachable_by_the_lavis_names(reference_defaults, user_file):
    cfg = _merge(PARITY / "config/user_multi.yaml", None, reference_defaults)
    assert cfg.run_cfg.plain_int == 5000
    assert cfg.model_cfg.model_type == "pretrain_llama2"
    assert list(cfg.datasets_cfg) == ["laion", "cc_sbu_align", "llava_detail"]
    assert cfg.evaluation_datasets_cfg.vizwiz.batch_size == 10
    assert "plain_int: 5000" in cfg.pretty()
    assert dict(_merge(user_file(MINIMAL)).evaluation_datasets_cfg) == {}


@pytest.mark.parametrize(
    ("more", "options", "text"),
    [
        ("modle: {arch: x}\n", [], "unknown section `modle:` is ignored; did you mean `model:`?"),
        ("preprocess: {a: 1}\n", [], "`preprocess:` is ignored"),
        ("", ["run.seed", "7", "run.odd"], "'run.odd' has no value"),
        ("", ["model.model_type=pretrain_llama2"], "model.model_type=pretrain_llama2: changes the value only"),
        ("", ["datasets.cc_sbu_align.type=mini"], "datasets.cc_sbu_align.type=mini: changes the value only"),
        ("", ["datasets.laion.batch_size=3"], "datasets.laion: not in"),
        ("", ["run.seed=7", "datasets.cc_sbu_align.batch_size=2"], ""),
    ],
)
def test_what_has_less_effect_than_it_seems_is_warned_of(more, options, text, user_file, caplog):
    with caplog.at_level(logging.WARNING):
        merged = _merge(user_file(MINIMAL + more), options).to_dict()
    assert set(merged) == {"run", "model", "datasets"}
    assert text in caplog.text
    assert bool(text) == bool(caplog.text)


RUN, ALIGN = "run: {}", "{cc_sbu_align: {}}"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "holds a list"),
        ("run: {a: 1\nmodel: [", "cannot be read as YAML"),
        ("run: {a: 1}\nrun: {b: 2}", "cannot be read as YAML"),
        (MINIMAL.replace(RUN, ""), "has no section `run:`"),
        (MINIMAL.replace(RUN, "run:"), "write `run: {}` for none"),
        (MINIMAL.replace(RUN, "run: ???"), "`run:`"),
        (MINIMAL.replace(RUN, "run: ${nowhere}"), "`run:`"),
        (MINIMAL.replace(RUN, "run: ${run}"), "run"),
        (MINIMAL.replace(RUN, "run: {seed: '${oc.env:NOT_SET_ANYWHERE}'}"), "run.seed"),
        (MINIMAL.replace(RUN, "run: {a: '${run.b}', b: '${run.a}'}"), "run"),
        (MINIMAL.replace(RUN, f"run: {'[' * 900}{']' * 900}"), "cannot be read as YAML"),
        (MINIMAL + LAUGHS, "cannot be read as YAML"),
        (MINIMAL + "\tx: 1", "line 4"),
        (MINIMAL.replace(ALIGN, "???"), "`datasets:`"),
        (MINIMAL.replace(ALIGN, "{cc_sbu_align: }"), "write `cc_sbu_align: {}` for none"),
        (MINIMAL.replace(ALIGN, "{cc_sbu_align: '???'}"), "datasets.cc_sbu_align"),
        (MINIMAL.replace(ALIGN, "{cc_sbu_align: '${nope}'}"), "datasets.cc_sbu_align"),
        (MINIMAL.replace(ALIGN, "{cc_sbu_aling: {}}"), "did you mean 'cc_sbu_align'?"),
        (MINIMAL.replace(ALIGN, "{cc_sbu_align: {type: mini}}"), "datasets.cc_sbu_align.type: unknown name 'mini'"),
        (MINIMAL.replace(ALIGN, "{cc_sbu_align: {build_info: [1]}}"), "datasets.cc_sbu_align: does not fit"),
        (MINIMAL.replace(ALIGN, "{llava_conversations: {}}"), "llava_conversations.type: unknown name 'default'"),
        (MINIMAL.replace(ALIGN, "{3: {}}"), "datasets.3: unknown dataset"),
        (MINIMAL.replace(ALIGN, "{3: {builder: image_caption_json}}"), "datasets.3"),
        (MINIMAL.replace("arch: minigpt4, ", ""), "model.arch is missing"),
        (MINIMAL.replace("minigpt4,", "minigtp4,"), "model.arch: unknown name 'minigtp4'; did you mean 'minigpt4'?"),
        (MINIMAL.replace("minigpt4,", "[1],"), "model.arch cannot be [1]"),
        (MINIMAL.replace("vicuna0", "vicuna"), "did you mean 'pretrain_vicuna0'? Known: pretrain_llama2, "),
        (MINIMAL + "evaluation_datasets: 3\n", "`evaluation_datasets:` must hold keys"),
        (MINIMAL + "imports: [no_such_module_here]", "cannot import 'no_such_module_here': ModuleNotFoundError"),
        (MINIMAL + "imports: no_such_module_here", "must be a list of modules"),
    ],
)
def test_faulty_file_is_refused_by_name_and_key(text, complaint, user_file):
    with pytest.raises(ConfigError, match=r"user\.yaml") as error:
        _merge(user_file(text))
    assert complaint in str(error.value)


@pytest.mark.parametrize("path", ["gone.yaml", "n" * 300, "d/" * 3000, "a\0b", ".", "\ud800", "weights.yaml"])
def test_path_that_is_no_text_file_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.yaml").write_bytes(b"\x80\x02\xff\xfe")
    with pytest.raises(ConfigError, match=": (no such file|cannot be read as YAML)"):
        _merge(Path(path))


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("rnu.seed=7", "--options rnu: unknown section; did you mean 'run'?"),
        ("run=7", "name a key of the section"),
        ("run.amp", "--options run.amp: write KEY=VALUE"),
        ("=7", "write KEY=VALUE"),
        ("run.seed=!!int ''", "run.seed"),
        ("run.seed=${nowhere}", "--options run.seed"),
        ("run.seed=${oc.env:NOT_SET_ANYWHERE}", "run.seed"),
        ("run.seed=\x01", "run.seed"),
        ("run=${model}", "run"),
        ("datasets.cc_sbu_align=[1]", "datasets.cc_sbu_align"),
        ("model={a: 1}.b", "model"),
    ],
)
def test_option_at_fault_is_named(option, complaint, user_file):
    with pytest.raises(ConfigError, match="--options") as error:
        _merge(user_file(MINIMAL), ["run.max_epoch=1", option])
    assert complaint in str(error.value)


def test_dataset_of_ones_own_needs_a_format_which_may_be_its_name_and_no_default_file(user_file):
    own = "birds: {builder: image_caption_json, batch_size: 2}, llava_conversations: {build_info: {ann_path: a.json}}"
    assert _merge(user_file(MINIMAL.replace("cc_sbu_align: {}", own))).to_dict()["datasets"] == {
        "birds": {"builder": "image_caption_json", "batch_size": 2},
        "llava_conversations": {"builder": "llava_conversations", "build_info": {"ann_path": "a.json"}},
    }


def test_shipped_defaults_are_found_by_convention_and_lie_under_the_users_values(user_file):
    text = MINIMAL.replace("align: {}", "align: {batch_size: 5}").replace("vicuna0", "llama2")
    merged = _merge(user_file(text)).to_dict()
    assert merged["model"]["has_qformer"] is False
    assert merged["datasets"]["cc_sbu_align"]["batch_size"] == 5
    assert merged["datasets"]["cc_sbu_align"]["build_info"] == {"storage": "cc_sbu_align"}
    files = find_default_files()
    assert set(files.models["minigpt4"]) == {"pretrain_vicuna0", "pretrain_llama2", "pretrain_mini"}
    assert {"laion", "cc_sbu", "cc_sbu_align", "flickr30k_grounded_detail"} <= set(files.datasets)


OWN_CODE = """
from minigpt4.common.registry import registry

@registry.register_model("outside_model")
class Model:
    PRETRAINED_MODEL_CONFIG_DICT = {"small": "model.yaml"}

@registry.register_builder("outside_data")
class Data:
    DATASET_CONFIG_DICT = {"default": "data.yaml"}

@registry.register_builder("outside_bare")
class Bare:
    pass
"""


def test_imported_code_brings_names_and_default_files(tmp_path, user_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
    user_file(OWN_CODE, "outside_code.py")
    user_file("model: {arch: outside_model, width: 3}", "model.yaml")
    user_file("datasets: {outside_data: {limit: 4}}", "data.yaml")
    file = user_file(
        "imports: [outside_code]\nmodel: {arch: outside_model, model_type: small}\n"
        "datasets: {outside_data: {batch_size: 1}, outside_bare: {}}\nrun: {}\n"
    )
    assert _merge(file).to_dict() == {
        "run": {},
        "model": {"arch": "outside_model", "model_type": "small", "width": 3},
        "datasets": {"outside_data": {"limit": 4, "batch_size": 1}, "outside_bare": {}},
    }
    with pytest.raises(ConfigError, match="model.arch: outside_model: Model needs a `config_class`"):
        _merge(file).validate(training=False)


@pytest.mark.parametrize("body", ["x = (", "import sys; sys.exit(3)", "class E(BaseException): ...\nraise E", "1 / 0"])
def test_import_that_fails_in_any_way_names_module_and_file(body, user_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    user_file(body, "failing_module.py")
    with pytest.raises(ConfigError, match=r"user\.yaml: .*'failing_module'"):
        _merge(user_file(MINIMAL + "imports: [failing_module]\n"))

"""The plugin for vLLM: where that is installed, it finds, resolves and feeds our model as its version wants it.

vLLM pins versions of torch and transformers, so it needs an environment of its own, and no extra brings it; answers are
compared by `benchmarks/vllm_parity.py`.
"""

import ast
import importlib
import importlib.util
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image

from minigpt4 import export, serving
from minigpt4.common.errors import ConfigError
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER
from minigpt4.inference.pipeline import Pipeline
from minigpt4.models.transformers_layout import IMAGE_TOKEN

ROOT = Path(__file__).parents[2]
has_vllm = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not has_vllm, reason="needs vLLM, in an environment of its own: pip install vllm")
PROMPTS = {
    "one image": ("###Human: <Img><image></Img> What is this? ###Assistant: ", 1),
    "two, where they stand": ("###Human: Is <image> in <Img><image></Img>? ###Assistant: ", 2),
}


def test_entry_point_is_a_function_and_names_a_class_that_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["minigpt4"].partition(":")
    assert getattr(importlib.import_module(module), name) is serving.vllm_plugin
    tree = ast.parse((ROOT / "minigpt4" / "serving" / "vllm_model.py").read_text())
    assert serving.VLLM_ARCHITECTURE in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


@pytest.mark.skipif(has_vllm, reason="vLLM is installed")
def test_without_vllm_its_model_says_what_to_install():
    with pytest.raises(ConfigError, match="pip install vllm"):
        importlib.import_module("minigpt4.serving.vllm_model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_section, write_recipe) -> Path:
    """A tiny model, exported."""
    place = tmp_path_factory.mktemp("vllm")
    section = tiny_section(
        arch="minigpt4", model_type="pretrain_vicuna0", end_sym="###", prompt_template="###Human: {} ###Assistant: "
    )
    recipe = write_recipe(place, section, device="cpu")
    assert export.main([str(recipe), "--format", "blip2", "--output", str(place / "out")]) == 0
    return place


@needs_vllm
@pytest.mark.parametrize("case", PROMPTS)
def test_vllm_registers_the_model_and_reads_prompts_as_we_do(case, folder, parity_dir):
    from vllm.config import ModelConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.multimodal import MULTIMODAL_REGISTRY

    prompt, count = PROMPTS[case]
    for _ in range(2):  # in each of its processes, and perhaps again
        serving.vllm_plugin()
    overrides = {"architectures": [serving.VLLM_ARCHITECTURE]}
    config = ModelConfig(model=str(folder / "out"), hf_overrides=overrides, limit_mm_per_prompt={"image": 2})
    assert ModelRegistry.resolve_model_cls(overrides["architectures"], config)[1] == serving.VLLM_ARCHITECTURE
    assert config.is_multimodal_model
    images = [Image.open(parity_dir / "images" / f"{name}.png") for name in ("img3_rgb", "img0_rgb_nonsquare")][:count]
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    read = processor(prompt, mm_items=processor.info.parse_mm_data({"image": images}))
    ours = Pipeline(export.source_of(str(folder / "recipe.yaml"), None, []), "cpu")
    embeds = [torch.zeros(1, 8, 96)] * count
    (row,), _ = ours.model.prompt_rows([prompt.replace(IMAGE_TOKEN, IMAGE_PLACEHOLDER)], [embeds])
    token = config.hf_config.image_token_index
    assert read["prompt_token_ids"] == [i if at < 0 else token for i, at in zip(row.ids, row.images, strict=True)]
    assert [(span.offset, span.length) for span in read["mm_placeholders"]["image"]] == [
        (start, 8) for start in range(len(row.ids)) if row.images[start] >= 0 and row.images[start] % 8 == 0
    ]

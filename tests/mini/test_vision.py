from pathlib import Path

import numpy as np

from minigpt4.common.config import Config
from minigpt4.common.experiment import read_experiment
from minigpt4.mini import vision
from minigpt4.mini.drawing import draw
from minigpt4.mini.scenes import ALONE, COLUMN, LARGE, SMALL, Group, Scene
from minigpt4.mini.things import THINGS

REPOSITORY = Path(__file__).parents[2]


class Arguments:
    cfg_path = "train_configs/mini_stage1_pretrain.yaml"
    options = None


def test_the_words_of_a_scene():
    scene = Scene("blue", COLUMN, (Group(THINGS[0], 2, SMALL), Group(THINGS[1], 1, LARGE)), 0)
    assert vision.words(scene) == ["blue", "column", "cat", "2 small", "dog", "1 large", "nothing", "nothing"]
    assert [vision.WORDS[i] for i in vision.word_ids(scene)] == vision.words(scene)


def test_patches_of_a_scene_show_the_thing_where_it_is_and_the_background_elsewhere():
    scene = Scene("pink", ALONE, (Group(THINGS[33], 1, LARGE),), 0)
    ids = vision.patch_ids(scene, draw(scene)[1]).reshape(8, 8)
    assert {vision.WORDS[i] for i in ids.flatten()} == {"pink", THINGS[33].name}
    assert {vision.WORDS[i] for i in ids[3:5, 3:5].flatten()} == {THINGS[33].name}
    assert {vision.WORDS[i] for i in np.r_[ids[0], ids[7]]} == {"pink"}


def test_the_packaged_model_type_has_the_sizes_of_the_shipped_weights(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    model = read_experiment(Config(Arguments())).model
    assert model.vit_config == vision.VIT_SIZES
    assert model.qformer_config == vision.QFORMER_SIZES
    assert (model.image_size, model.num_query_token) == (vision.IMAGE_SIZE, vision.QUERIES)
    assert (REPOSITORY / model.vit_weights).samefile(vision.VIT_FILE)
    assert (REPOSITORY / model.q_former_model).samefile(vision.QFORMER_FILE)

from pathlib import Path

import numpy as np
import torch

from minigpt4.common.config import Config
from minigpt4.mini import files
from minigpt4.mini.scenes import ALONE, COLUMN, LARGE, SMALL, THINGS, Group, Scene, draw

REPOSITORY = Path(__file__).parents[2]


class Arguments:
    cfg_path = "train_configs/mini_stage1_pretrain.yaml"
    options = None


def test_the_words_of_a_scene():
    scene = Scene("blue", COLUMN, (Group(THINGS[0], 2, SMALL), Group(THINGS[1], 1, LARGE)), 0)
    assert files.words(scene) == ["blue", "column", "cat", "two small", "dog", "one large", "nothing", "nothing"]
    assert [files.WORDS[i] for i in files.word_ids(scene)] == files.words(scene)


def test_patches_of_a_scene_show_the_thing_where_it_is_and_the_background_elsewhere():
    scene = Scene("pink", ALONE, (Group(THINGS[33], 1, LARGE),), 0)
    ids = files.patch_ids(scene, draw(scene)[1]).reshape(8, 8)
    assert {files.WORDS[i] for i in ids.flatten()} == {"pink", THINGS[33].name}
    assert {files.WORDS[i] for i in ids[3:5, 3:5].flatten()} == {THINGS[33].name}
    assert {files.WORDS[i] for i in np.r_[ids[0], ids[7]]} == {"pink"}


def test_codes_of_words_and_places_are_equally_long_and_apart():
    embeddings_WE = torch.randn(98, 576, generator=torch.Generator().manual_seed(0))
    codes_QWD = files.word_codes(embeddings_WE)
    assert codes_QWD.shape == (files.QUERIES, 98, files.QFORMER_SIZES["hidden_size"])
    torch.testing.assert_close(codes_QWD.norm(dim=-1), torch.full((files.QUERIES, 98), 192**0.5))
    torch.testing.assert_close(codes_QWD.mean(-1), torch.zeros(files.QUERIES, 98), atol=1e-6, rtol=0)
    scores_QWW = codes_QWD @ codes_QWD.mT
    assert (scores_QWW.argmax(-1) == torch.arange(98)).all()
    place_QQ = torch.einsum("qwd,pwd->qp", codes_QWD, codes_QWD) / 98
    torch.testing.assert_close(place_QQ.diagonal(), torch.full((files.QUERIES,), 192.0), rtol=1e-4, atol=0)
    assert place_QQ.fill_diagonal_(0).max() < 100


def test_one_linear_map_brings_the_embeddings_back_from_the_codes_of_any_place():
    embeddings_WE = torch.randn(98, 576, generator=torch.Generator().manual_seed(0))
    centred_WE = torch.nn.functional.normalize(embeddings_WE - embeddings_WE.mean(0), dim=-1)
    codes_QWD = files.word_codes(embeddings_WE)
    codes = torch.nn.functional.pad(codes_QWD, (0, 1), value=1.0).double()  # with a bias
    solution = torch.linalg.lstsq(codes.flatten(0, 1), centred_WE.double().repeat(files.QUERIES, 1), driver="gelsd")
    restored_QWE = codes @ solution.solution
    torch.testing.assert_close(restored_QWE[3].float(), centred_WE, atol=1e-3, rtol=0)


def test_the_packaged_model_type_has_the_sizes_of_the_shipped_weights(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    model = Config(Arguments()).validate().model
    assert model.vit_config == files.VIT_SIZES
    assert model.qformer_config == files.QFORMER_SIZES
    assert (model.image_size, model.num_query_token) == (files.IMAGE_SIZE, files.QUERIES)
    assert (REPOSITORY / model.vit_weights).samefile(files.VIT_FILE)
    assert (REPOSITORY / model.q_former_model).samefile(files.QFORMER_FILE)

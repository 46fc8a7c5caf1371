"""Answers of `generate`, and a chat's embeddings and answers, are the reference's."""

import json
from pathlib import Path

import pytest
import torch

from minigpt4.common.errors import SampleError
from minigpt4.conversation import clean_answer
from minigpt4.models.generation import Decoding, generate_ids

ATOL = 1e-5
GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "parity" / "golden.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["generate"]["cases"]}
PROMPT = "###Human: <Img><ImageHere></Img> What is this? ###Assistant: "


@pytest.mark.parametrize("name", CASES)
def test_left_padded_prompts_and_answers_meet_the_reference(shared_model, pool, golden_tensors, assert_near, name):
    case = CASES[name]
    model, given = shared_model(has_qformer=case["has_qformer"]), []
    hook = model.llama_model.register_forward_pre_hook(lambda llm, args, kwargs: given.append(kwargs), with_kwargs=True)
    answers = model.generate(pool[torch.tensor(case["image_pool_index"])], case["texts"], **case["kwargs"])
    hook.remove()
    assert_near(given[0]["inputs_embeds"], golden_tensors[f"generate/{name}/inputs_embeds"], ATOL)
    assert torch.equal(given[0]["attention_mask"], golden_tensors[f"generate/{name}/attention_mask"])
    assert answers == case["answers"]
    parts = (model.llama_model, model.llama_tokenizer, given[0]["inputs_embeds"], given[0]["attention_mask"])
    assert generate_ids(*parts, Decoding(**case["kwargs"])).tolist() == case["output_ids"]


# What `images` may be


def test_each_prompt_may_have_its_own_number_of_images(model, pool):
    two = "<Img><ImageHere></Img> and <Img><ImageHere></Img> differ in what? "
    texts = ["Say something. ", PROMPT, two]
    together = model.generate([None, pool[0], pool[1:3]], texts)
    alone = [
        model.generate(None, texts[:1])[0],
        model.generate(pool[:1], texts[1:2])[0],
        model.generate(pool[1:3][None], texts[2:])[0],
    ]
    assert together == alone


@pytest.mark.parametrize(
    ("index", "texts", "text"),
    [
        (slice(0, 2), [PROMPT], r"images: 2 entries \(shape \(2, 3, 56, 56\)\) for 1 texts"),
        (0, [PROMPT], r"images: 3 entries \(shape \(3, 56, 56\)\) for 1 texts"),
        (slice(0, 1), PROMPT, "texts: must be a list of prompts"),
        (slice(0, 2), [PROMPT, "none"], r"texts\[1\]: the prompt has 0 <ImageHere>, but 1 images were given"),
        (slice(0, 1), [PROMPT * 2], r"texts\[0\]: the prompt has 2 <ImageHere>, but 1 images were given"),
    ],
)
def test_images_that_do_not_fit_the_prompts_are_refused(model, pool, index, texts, text):
    with pytest.raises(SampleError, match=text):
        model.generate(pool[index], texts)


def test_answer_is_cut_before_a_stop_string_given_alone_or_in_a_list(model, pool):
    answer = model.generate(pool[:1], [PROMPT])[0]
    stop = answer[2]
    assert model.generate(pool[:1], [PROMPT], stop=stop) == [answer.split(stop)[0].strip()]
    assert model.generate(pool[:1], [PROMPT], stop=[stop, "never"]) == [answer.split(stop)[0].strip()]


# Chat


# Text that the ids of the reference's stop sequence have completed when they come.
STOPS = {
    "vicuna0": {"answer": [], "answer_stop1": ["o\ufffd"], "answer_stop2": ["\ufffdter"]},
    "llama2": {"answer": [], "answer_stop1": ["\u0134"], "answer_stop2": ["\u0134\x12"]},
}


@pytest.mark.parametrize("name", STOPS)
@torch.no_grad()
def test_contexts_and_answers_of_a_chat_meet_the_reference(shared_model, pool, golden_tensors, assert_near, name):
    expected = GOLDEN["chat"][name]
    model, tensor = shared_model(has_qformer=expected["has_qformer"]), lambda key: golden_tensors[f"chat/{name}/{key}"]
    image_emb = tensor("image_emb")
    assert_near(model.encode_img(pool[:1])[0], image_emb, ATOL)
    for turn in ("turn1", "turn2"):
        embeds = model.get_context_emb(expected[f"prompt_{turn}"], [image_emb])
        assert_near(embeds, tensor(f"embs_{turn}"), ATOL)
    assert embeds.shape[1] == expected["left_cut"]["full"]
    assert_near(embeds[:, -expected["left_cut"]["kept"] :], tensor("embs_turn2_left_cut"), ATOL)
    mask, decoding = torch.ones(embeds.shape[:2], dtype=torch.long), Decoding(**expected["answer"]["kwargs"])
    parts = (model.llama_model, model.llama_tokenizer, tensor("embs_turn2"), mask)
    for case, stop in STOPS[name].items():
        ids = generate_ids(*parts, decoding, stop)[0].tolist()
        assert ids == expected[case]["ids"]
        assert clean_answer(model.llama_tokenizer.decode(ids, skip_special_tokens=True)) == expected[case]["text"]


# Prompts on which the reference raises


@pytest.mark.parametrize("prompt", ["<ImageHere>", "<ImageHere> what is it?", "what is it? <ImageHere>"])
def test_placeholder_may_stand_at_either_end_of_a_context(model, pool, prompt):
    image = model.encode_img(pool[:1])[0].detach()
    tokenizer, table = model.llama_tokenizer, model.llama_model.get_input_embeddings().weight
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompt.split("<ImageHere>"))
    expected = torch.cat([table[[1, *before]], image[0], table[after]])[None]
    assert torch.equal(model.get_context_emb(prompt, [image]), expected)


# Images that are encoded already


@pytest.fixture(scope="module")
def embeds(model, pool):
    """Of each image of the pool, as `answers_from_embeds` takes one a prompt."""
    with torch.no_grad():
        return [[embeds_1QD] for embeds_1QD in model.project(model.image_features(pool)).split(1)]


def test_encoded_images_give_the_answers_of_pixels(model, pool, embeds):
    texts = [PROMPT, "<Img><ImageHere></Img> A longer question about this image? ", PROMPT]
    decoding = Decoding(max_new_tokens=12, num_beams=2)
    answers = [a.text for a in model.answers_from_embeds(embeds[:3], texts, decoding, ["###"])]
    assert answers == model.generate(pool[:3], texts, max_new_tokens=12, num_beams=2, stop=["###"])


# How answers end


def test_answer_tells_whether_a_stop_string_or_the_limit_ended_it(model, embeds):
    decoding = Decoding(max_new_tokens=12)
    first, second = model.answers_from_embeds(embeds[:2], [PROMPT] * 2, decoding)
    assert (first.ended, second.ended) == (False, False)
    stop = next(piece for piece in first.text[2:] if piece not in second.text)
    stopped, other = model.answers_from_embeds(embeds[:2], [PROMPT] * 2, decoding, [stop])
    assert stopped.ended
    assert stop not in stopped.text
    assert other == second


def ids_of(model, images, decoding):
    prompts = model.prompt_embeds([PROMPT] * len(images), images)
    return generate_ids(model.llama_model, model.llama_tokenizer, *prompts, decoding).tolist()


def test_an_end_token_of_the_best_beam_or_at_the_limit_is_an_end(model, embeds, monkeypatch):
    decoding, end = Decoding(max_new_tokens=12, num_beams=2), model.llama_model.generation_config.eos_token_id
    answers = model.answers_from_embeds(embeds[:2], [PROMPT] * 2, decoding)
    ended = [end in row[1:] for row in ids_of(model, embeds[:2], decoding)]
    assert [answer.ended for answer in answers] == ended == [True, False]
    (ids,) = ids_of(model, embeds[:1], Decoding(max_new_tokens=6))
    decoding = Decoding(max_new_tokens=ids.index(ids[-1], 1))
    assert not model.answers_from_embeds(embeds[:1], [PROMPT], decoding)[0].ended
    monkeypatch.setattr(model.llama_model.generation_config, "eos_token_id", ids[-1])
    assert model.answers_from_embeds(embeds[:1], [PROMPT], decoding)[0].ended


# Likelihoods of given answers

LIKELIHOOD_ATOL = 1e-4
TWO = "<Img><ImageHere></Img> and <Img><ImageHere></Img> differ in what? "


def test_answer_of_greedy_decoding_is_greedy_and_its_beginning_with_another_end_is_not(model, pool, monkeypatch):
    embeds, greedy = model.get_context_emb(PROMPT, [model.encode_img(pool[:1])[0]]), []
    for _ in range(5):
        greedy.append(int(model.llama_model(inputs_embeds=embeds).logits[0, -1].argmax()))
        embeds = torch.cat([embeds, model.llama_model.get_input_embeddings()(torch.tensor([[greedy[-1]]]))], dim=1)
    changed = [*greedy[:-1], (greedy[-1] + 1) % len(model.llama_tokenizer)]
    given, encode = {"greedy": greedy, "changed": changed}, model.prompting.encode  # ids that no text need have
    monkeypatch.setattr(model.prompting, "encode", lambda texts: [given.get(t) or encode([t])[0] for t in texts])
    scores = model.log_likelihoods(pool[:1].repeat(2, 1, 1, 1), [PROMPT] * 2, list(given))
    assert [flag for _, flag in scores] == [True, False]
    assert scores[0][0] > scores[1][0]


def test_sum_is_that_of_the_training_loss(shared_model, pool):
    model = shared_model(end_sym="")
    answer = "A brown dog sleeps on a red blanket."
    ((score, _),) = model.log_likelihoods(pool[:1], [PROMPT], [answer])
    samples = {"image": pool[:1], "instruction_input": [PROMPT], "answer": [answer]}
    result = model(samples)
    assert score == pytest.approx(-result["loss"].item() * result["num_tokens"], abs=LIKELIHOOD_ATOL)


def test_batch_gives_each_request_what_it_gets_alone(model, pool):
    images, texts = [None, pool[0], pool[1:3]], ["Say something. ", PROMPT, TWO]
    answers = ["Two people walk along the river.", "No.", "In colour"]
    together = model.log_likelihoods(images, texts, answers)
    for index, (score, greedy) in enumerate(together):
        ((alone, flag),) = model.log_likelihoods(images[index : index + 1], [texts[index]], [answers[index]])
        assert score == pytest.approx(alone, abs=LIKELIHOOD_ATOL)
        assert greedy == flag


def test_empty_answer_is_certain(model, pool):
    assert model.log_likelihoods(pool[:1], [PROMPT], [""]) == [(0.0, True)]
    assert model.log_likelihoods(pool[:2], [PROMPT] * 2, ["", "No."])[0] == (0.0, True)
    assert model.log_likelihoods(None, [], []) == model.generate(None, []) == []

"""Likelihoods of given answers: those of the LLM's own logits and of training, alone or in a batch."""

import pytest

from minigpt4.common.errors import SampleError

ATOL = 1e-4
PROMPT = "###Human: <Img><ImageHere></Img> What is this? ###Assistant: "
TWO = "<Img><ImageHere></Img> and <Img><ImageHere></Img> differ in what? "


def test_answers_of_one_token_have_the_probabilities_of_the_next_token(shared_model, pool):
    model = shared_model()
    image = model.encode_img(pool[:1])[0]
    logits_1V = model.llama_model(inputs_embeds=model.get_context_emb(PROMPT, [image])).logits[:, -1]
    wanted_V = logits_1V.log_softmax(dim=-1)[0]
    pieces = model.llama_tokenizer.convert_ids_to_tokens(range(len(model.llama_tokenizer)))
    words = [piece.replace("\u2581", "") for piece in pieces]
    ids = [model.llama_tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    single = {word: own[0] for word, own in zip(words, ids, strict=True) if len(own) == 1}
    scores = model.log_likelihoods([pool[0]] * len(single), [PROMPT] * len(single), list(single))
    assert len(single) > 50
    for (score, greedy), token in zip(scores, single.values(), strict=True):
        assert score == pytest.approx(wanted_V[token].item(), abs=ATOL)
        assert greedy == (token == int(wanted_V.argmax()))


def test_sum_is_that_of_the_training_loss(shared_model, pool):
    model = shared_model(end_sym="")
    answer = "A brown dog sleeps on a red blanket."
    ((score, _),) = model.log_likelihoods(pool[:1], [PROMPT], [answer])
    samples = {"image": pool[:1], "instruction_input": [PROMPT], "answer": [answer]}
    result = model(samples)
    assert score == pytest.approx(-result["loss"].item() * result["num_tokens"], abs=ATOL)


def test_batch_gives_each_request_what_it_gets_alone(shared_model, pool):
    model = shared_model()
    images, texts = [None, pool[0], pool[1:3]], ["Say something. ", PROMPT, TWO]
    answers = ["Two people walk along the river.", "No.", "In colour"]
    together = model.log_likelihoods(images, texts, answers)
    for index, (score, greedy) in enumerate(together):
        ((alone, flag),) = model.log_likelihoods(images[index : index + 1], [texts[index]], [answers[index]])
        assert score == pytest.approx(alone, abs=ATOL)
        assert greedy == flag


def test_empty_answer_is_certain(shared_model, pool):
    model = shared_model()
    assert model.log_likelihoods(pool[:1], [PROMPT], [""]) == [(0.0, True)]
    assert model.log_likelihoods(pool[:2], [PROMPT] * 2, ["", "No."])[0] == (0.0, True)
    assert model.log_likelihoods(None, [], []) == []


def test_prompt_without_its_image_is_named(shared_model):
    with pytest.raises(SampleError, match=r"texts\[0\]: the prompt has 1 <ImageHere>"):
        shared_model().log_likelihoods(None, [PROMPT], ["No."])

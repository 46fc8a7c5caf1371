import pytest

from minigpt4.common.errors import SampleError
from minigpt4.conversation import get_template
from minigpt4.conversation.templates import IMAGE_MESSAGE, TemplateConversation


def talk(template, turns, images=(0,)):
    """A conversation with one image before each of the turns `images`, whose last question is open."""
    for turn in range(turns):
        if turn in images:
            template.add_image()
        template.ask(f"question {turn}")
        template.open_answer()
        if turn < turns - 1:
            template.fill_answer(f"answer {turn}")
    return template


@pytest.fixture(params=["vicuna0", "llama2", "training"])
def template(request):
    if request.param == "training":
        return TemplateConversation("###Human: {} ###Assistant: ", "###")
    return get_template(request.param)


def test_a_conversation_that_fits_is_read_whole(template):
    whole = talk(template, 3)
    fitted, dropped = whole.fit(len, 10, len(whole.get_prompt()) + 10)
    assert (fitted.get_prompt(), dropped) == (whole.get_prompt(), 0)


def test_one_position_less_drops_the_oldest_turn_and_keeps_its_image(template):
    whole = talk(template, 3)
    fitted, dropped = whole.fit(len, 10, len(whole.get_prompt()) + 9)
    assert dropped == 1
    assert [text for _, text in fitted.messages] == [f"{IMAGE_MESSAGE} question 1", "answer 1", "question 2", None]
    assert len(whole.messages) == 6


def test_all_images_stay_in_their_order_before_the_turns_that_stay():
    whole = talk(get_template("vicuna0"), 4, images=(0, 1, 3))
    fitted = whole.without_oldest(3)
    texts = [text for _, text in fitted.messages]
    assert texts == [IMAGE_MESSAGE, IMAGE_MESSAGE, f"{IMAGE_MESSAGE} question 3", None]


def test_no_more_turns_go_than_must(template):
    whole = talk(template, 200)
    room = len(whole.without_oldest(150).get_prompt())
    asked = []
    fitted, dropped = whole.fit(lambda prompt: asked.append(1) or len(prompt), 0, room)
    assert dropped == 150
    assert len(fitted.get_prompt()) == room
    assert len(asked) < 12


def test_a_last_question_that_is_too_long_by_itself_is_an_error_with_the_numbers(template):
    with pytest.raises(SampleError, match=r"may take 7, but this LLM reads 20 in all"):
        talk(template, 3).fit(len, 7, 20)


# Taking back the last question


def test_taking_back_returns_the_question_and_keeps_its_image(template):
    template.add_image()
    template.ask("What is it?")
    template.open_answer()
    template.fill_answer("A dog.")
    assert template.take_back() == "What is it?"
    assert [text for _, text in template.messages] == [IMAGE_MESSAGE]
    template.ask("Which colour?")
    assert [text for _, text in template.messages] == [f"{IMAGE_MESSAGE} Which colour?"]


def test_taking_back_removes_one_turn_at_a_time(template):
    whole = talk(template, 3)
    assert [whole.take_back() for _ in range(4)] == ["question 2", "question 1", "question 0", None]
    assert [text for _, text in whole.messages] == [IMAGE_MESSAGE]


def test_an_image_shown_after_the_last_answer_stays(template):
    whole = talk(template, 1)
    whole.fill_answer("answer 0")
    whole.add_image()
    assert whole.take_back() == "question 0"
    assert [text for _, text in whole.messages] == [IMAGE_MESSAGE, IMAGE_MESSAGE]


def test_a_question_about_tags_is_given_back_whole(template):
    template.ask("What does </Img> mean?")
    assert template.take_back() == "What does </Img> mean?"

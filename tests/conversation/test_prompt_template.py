from minigpt4.conversation.templates import TemplateConversation

VICUNA = "###Human: {} ###Assistant: "


def test_one_question_is_the_prompt_of_training():
    talk = TemplateConversation(VICUNA, "###")
    talk.add_image()
    talk.ask("What is this?")
    talk.open_answer()
    assert talk.get_prompt() == "###Human: <Img><ImageHere></Img> What is this? ###Assistant: "


def test_a_second_question_follows_the_ended_answer():
    talk = TemplateConversation(VICUNA, "###")
    talk.ask("Hello")
    talk.open_answer()
    talk.fill_answer("Hi.")
    talk.ask("Who?")
    talk.open_answer()
    assert talk.get_prompt() == "###Human: Hello ###Assistant: Hi.######Human: Who? ###Assistant: "


def test_an_empty_template_leaves_the_words_alone():
    talk = TemplateConversation("", "\n")
    talk.ask("Hello")
    assert talk.get_prompt() == "Hello"


def test_braces_in_an_answer_or_question_stay():
    talk = TemplateConversation(VICUNA, "###")
    talk.ask("{x}")
    talk.open_answer()
    talk.fill_answer("{}")
    assert talk.get_prompt() == "###Human: {x} ###Assistant: {}###"


def test_a_copy_goes_on_by_itself():
    talk = TemplateConversation(VICUNA, "###")
    talk.ask("Hello")
    twin = talk.copy()
    twin.open_answer()
    twin.fill_answer("Hi.")
    assert talk.get_prompt() == "###Human: Hello ###Assistant: "
    assert twin.dict()["messages"] == [["user", "Hello"], ["assistant", "Hi."]]


def test_a_system_text_begins_the_first_instruction_only():
    talk = TemplateConversation(VICUNA, "###")
    talk.set_system("Be brief.")
    talk.add_image()
    talk.ask("What is this?")
    talk.open_answer()
    talk.fill_answer("A dog.")
    talk.copy().ask("Sure?")
    talk.ask("Sure?")
    assert talk.get_prompt() == (
        "###Human: Be brief. <Img><ImageHere></Img> What is this? ###Assistant: A dog.######Human: Sure? ###Assistant: "
    )
    assert talk.copy().get_prompt() == talk.get_prompt()
    assert talk.dict()["system"] == "Be brief."


def test_a_system_text_stays_when_the_oldest_turn_goes():
    talk = TemplateConversation(VICUNA, "###")
    talk.set_system("Be brief.")
    for text in ("One", "Two"):
        talk.ask(text)
        talk.open_answer()
        talk.fill_answer(text)
    talk.ask("Three")
    assert talk.without_oldest(1).get_prompt().startswith("###Human: Be brief. Two ###Assistant: Two###")

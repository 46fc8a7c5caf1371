"""`python demo.py --cli` on tiny weights."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_answers_about_all_images_are_those_of_the_chat(warm, demo_config, parity_dir, shared_model):
    from minigpt4.conversation.chat import Chat, Decoding
    from minigpt4.inference import Engine
    from minigpt4.processors import Blip2ImageEvalProcessor, open_image

    images = [parity_dir / "images" / name for name in ("img0_rgb_nonsquare.png", "img1_rgba.png")]
    command = [REPOSITORY / "demo.py", "--cli", "--cfg-path", demo_config, "--max-new-tokens", "8", "--num-beams", "2"]
    command += ["--image", images[0], "--image", images[1]]
    once = warm.script(*command, "--prompt", "Which?", cwd=REPOSITORY, apart=True)
    asked = warm.script(*command, cwd=REPOSITORY, apart=True, stdin="Which?\nAnd now?\n")
    model = shared_model(model_type="pretrain_vicuna0", end_sym="###")
    chat = Chat(Engine(model, Blip2ImageEvalProcessor(image_size=56)))
    for image in images:
        chat.show(open_image(image))
    wanted = [chat.ask(question, Decoding(num_beams=2, max_new_tokens=8)) for question in ("Which?", "And now?")]
    for run, answers in ((once, wanted[:1]), (asked, wanted)):
        assert run.wait() == [0], run.text()
        assert run.out.read_text().splitlines() == answers

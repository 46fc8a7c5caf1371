"""`python demo.py --cli` on tiny weights."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def demo(warm, config, image, *arguments, questions=""):
    """What it says on standard output."""
    arguments = ("--cli", "--cfg-path", config, "--image", image, *arguments)
    run = warm.script(REPOSITORY / "demo.py", *arguments, cwd=REPOSITORY, apart=True, stdin=questions)
    assert run.wait() == [0], run.text()
    return run.out.read_text()


def test_one_question_gets_one_answer_on_standard_output(warm, demo_config, parity_dir):
    image = parity_dir / "images" / "img0_rgb_nonsquare.png"
    once = demo(warm, demo_config, image, "--prompt", "What is this?", "--max-new-tokens", "5")
    questions = "What is this?\nAnd now?\n\nNever asked\n"
    again = demo(warm, demo_config, image, "--max-new-tokens", "5", questions=questions)
    assert once.strip()
    assert again.startswith(once)
    assert len(again.strip().splitlines()) == 2


def test_several_images_can_be_shown(warm, demo_config, parity_dir, shared_model):
    from minigpt4.conversation.chat import Chat, Decoding
    from minigpt4.inference import Engine
    from minigpt4.processors import Blip2ImageEvalProcessor, open_image

    images = [parity_dir / "images" / name for name in ("img0_rgb_nonsquare.png", "img1_rgba.png")]
    options = ("--image", str(images[1]), "--prompt", "Which?", "--max-new-tokens", "8", "--num-beams", "2")
    said = demo(warm, demo_config, images[0], *options)
    model = shared_model(model_type="pretrain_vicuna0", end_sym="###")
    chat = Chat(Engine(model, Blip2ImageEvalProcessor(image_size=56)))
    for image in images:
        chat.show(open_image(image))
    assert said == chat.ask("Which?", Decoding(num_beams=2, max_new_tokens=8)) + "\n"

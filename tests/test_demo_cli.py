"""`python demo.py --cli` on tiny weights."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def demo(config, image, *arguments, questions=""):
    command = [sys.executable, "demo.py", "--cli", "--cfg-path", str(config), "--image", str(image), *arguments]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, input=questions, capture_output=True, text=True, check=False
    )


def test_one_question_gets_one_answer_on_standard_output(demo_config, parity_dir):
    image = parity_dir / "images" / "img0_rgb_nonsquare.png"
    done = demo(demo_config, image, "--prompt", "What is this?", "--max-new-tokens", "5")
    assert done.returncode == 0, done.stderr
    again = demo(demo_config, image, "--max-new-tokens", "5", questions="What is this?\nAnd now?\n\nNever asked\n")
    assert again.returncode == 0, again.stderr
    assert done.stdout.strip()
    assert again.stdout.startswith(done.stdout)
    assert len(again.stdout.strip().splitlines()) == 2


def test_several_images_can_be_shown(demo_config, parity_dir, shared_model):
    from minigpt4.conversation.chat import Chat, Decoding
    from minigpt4.inference import Engine
    from minigpt4.processors import Blip2ImageEvalProcessor, open_image

    images = [parity_dir / "images" / name for name in ("img0_rgb_nonsquare.png", "img1_rgba.png")]
    options = ("--image", str(images[1]), "--prompt", "Which?", "--max-new-tokens", "8", "--num-beams", "2")
    done = demo(demo_config, images[0], *options)
    assert done.returncode == 0, done.stderr
    model = shared_model(model_type="pretrain_vicuna0", end_sym="###")
    chat = Chat(Engine(model, Blip2ImageEvalProcessor(image_size=56)))
    for image in images:
        chat.show(open_image(image))
    assert done.stdout == chat.ask("Which?", Decoding(num_beams=2, max_new_tokens=8)) + "\n"

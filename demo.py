"""Talk to MiniGPT-4 about a picture, in the terminal.

The checkpoint that the quickstart made, on a CPU:
    python demo.py --cli --cfg-path eval_configs/mini_eval.yaml --image data/mini/flickr30k/flickr30k-images/1001640.jpg
One answer and no conversation:
    python demo.py --cli --cfg-path eval_configs/minigpt4_eval.yaml --image photo.jpg --prompt "What is funny here?"
"""

import argparse
import sys

from minigpt4.common.config import Config
from minigpt4.common.console import setup_logging
from minigpt4.common.errors import MiniGPT4Error, SampleError
from minigpt4.common.experiment import Experiment, read_experiment
from minigpt4.common.schemas.paths import require_paths


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="YAML file with the model")
    parser.add_argument("--options", nargs="*", metavar="KEY=VALUE", help="values that go over the file's")
    parser.add_argument("--gpu-id", type=int, default=0, help="GPU to use, where there is one (0)")
    parser.add_argument("--cli", action="store_true", required=True, help="talk in the terminal")
    parser.add_argument("--image", required=True, help="picture to talk about")
    parser.add_argument("--prompt", help="one question; without it, questions are read until an empty line")
    parser.add_argument("--num-beams", type=int, default=1, help="beams (1)")
    parser.add_argument("--max-new-tokens", type=int, default=300, help="longest answer, tokens (300)")
    return parser.parse_args(argv)


def talk(args: argparse.Namespace, experiment: Experiment) -> None:
    """Load the model, show it the image, and answer."""
    import torch

    from minigpt4.conversation.chat import Chat
    from minigpt4.conversation.decoding import Decoding
    from minigpt4.inference import Engine
    from minigpt4.models import MiniGPT4
    from minigpt4.processors import Blip2ImageEvalProcessor, open_image

    image = open_image(args.image)
    device = f"cuda:{args.gpu_id}" if torch.cuda.is_available() else "cpu"
    model = MiniGPT4.from_config(experiment.model, device).eval()
    chat = Chat(Engine(model, Blip2ImageEvalProcessor(image_size=experiment.model.image_size)))
    chat.show(image)
    decoding = Decoding(num_beams=args.num_beams, max_new_tokens=args.max_new_tokens)
    if args.prompt:
        print(chat.ask(args.prompt, decoding))
        return
    while question := _read_question():
        print(chat.ask(question, decoding))


def _read_question() -> str:
    try:
        return input("you: ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 for an error that the user can mend."""
    args = parse_args(argv)
    setup_logging(rank=0)
    try:
        experiment = read_experiment(Config(args), training=False)
        require_paths({"model": experiment.model}, experiment.source)
        talk(args, experiment)
    except (MiniGPT4Error, SampleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

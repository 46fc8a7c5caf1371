"""A person as judge: a page that shows image, instruction and answer, and takes verdicts.

    python eval_scripts/judge_by_hand.py output/failures              # a folder of eval_failure_rate.py
    python eval_scripts/eval_failure_rate.py ... --verdicts output/failures/verdicts.jsonl

The page does not say which checkpoint an answer is from, and the order is shuffled. Every verdict is written at once;
the same command resumes. Needs gradio: pip install -e ".[demo]"
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.common.errors import ConfigError, MiniGPT4Error
from minigpt4.evaluation.failure_rate import ANSWERS, VERDICTS, AnnotationSession, AskedAnswer, read_answers
from minigpt4.evaluation.failure_rules import KINDS
from minigpt4.processors import open_image

if TYPE_CHECKING:
    import gradio

FINE = "fine"
HELP = """Is this a good answer? **fine**, or what is wrong with it, the worst first: **empty**; **cut off** before its
end; **repetition** that no writer would want, which a refrain in a poem is not; a **fragment** of a text, or one with
debris in it; **not English**; **off the image**: mostly about things that are not there; **off the instruction**: not
what was asked for."""


def page(session: AnnotationSession) -> "gradio.Blocks":
    """The page; each button is an API of its name too, with `_` for blanks."""
    import gradio as gr

    def show(place: int) -> list[Any]:
        done = f"{session.judged} of {len(session.answers)} answers judged"
        buttons = [gr.update(interactive=place < len(session.answers))] * (1 + len(KINDS))
        if place >= len(session.answers):
            return [place, done, None, "Thank you: nothing is left.", "", *buttons]
        answer = session.answers[place]
        instruction = f"**{answer.instruction}**"
        return [place, done, open_image(Path(answer.image)), instruction, answer.text, *buttons]

    def judge(place: int, kinds: list[str]) -> list[Any]:
        if place < len(session.answers):
            session.judge(place, kinds)
        return show(session.next_after(place))

    with gr.Blocks(title="Judge answers", analytics_enabled=False) as blocks:
        place = gr.State(0)
        done = gr.Markdown()
        with gr.Row():
            image = gr.Image(label="image", interactive=False, height=420)
            with gr.Column():
                instruction = gr.Markdown()
                text = gr.Textbox(label="answer", lines=12, interactive=False)
        with gr.Row():
            buttons = {
                name: gr.Button(name, variant="primary" if name == FINE else "secondary") for name in (FINE, *KINDS)
            }
        back = gr.Button("back to the answer before", size="sm")
        gr.Markdown(HELP)
        outputs = [place, done, image, instruction, text, *buttons.values()]
        for name, button in buttons.items():
            kinds = [] if name == FINE else [name]
            button.click(partial(judge, kinds=kinds), place, outputs, api_name=name.replace(" ", "_"))
        back.click(lambda place: show(max(0, place - 1)), place, outputs, api_name="back")
        blocks.load(lambda: show(session.next_after(-1)), None, outputs, api_name="start")
    return blocks


def _require_images(file: Path, answers: Sequence[AskedAnswer]) -> None:
    missing = [image for image in dict.fromkeys(answer.image for answer in answers) if not Path(image).is_file()]
    if missing:
        raise ConfigError(
            f"{file}: {len(missing)} images are not there, the first of them {missing[0]}; after they were moved, "
            "run eval_failure_rate.py again with --images where they are now"
        )


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of eval_failure_rate.py")
    parser.add_argument("--seed", type=int, default=0, help="of the order (0)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all (127.0.0.1)")
    parser.add_argument("--port", type=int, help="(the first free one from 7860)")
    args = parser.parse_args(argv)
    try:
        if importlib.util.find_spec("gradio") is None:
            raise ConfigError('gradio is not installed; run: pip install -e ".[demo]"')
        answers = read_answers(args.folder / ANSWERS)
        _require_images(args.folder / ANSWERS, answers)
        session = AnnotationSession(answers, args.folder / VERDICTS, args.seed)
    except MiniGPT4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{session.judged} of {len(session.answers)} answers are judged; verdicts go to {args.folder / VERDICTS}")
    page(session).launch(server_name=args.host, server_port=args.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())

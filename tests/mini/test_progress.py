import io

from minigpt4.mini.quickstart import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_each_step_ends_with_a_line_of_its_own():
    out = io.StringIO()
    progress = Progress([10, 0, 30], out)
    progress.start("scenes")
    progress.finish("4 scenes")
    progress.start("stage 1", is_done=True)
    progress.start("stage 2")
    progress.finish()
    lines = out.getvalue().splitlines()
    assert lines == [
        "[1/3] scenes ...",
        "[1/3] scenes: 4 scenes",
        "[2/3] stage 1: done before",
        "[3/3] stage 2 ...",
        "[3/3] stage 2: done",
    ]


def test_a_terminal_shows_the_share_and_the_time_left_on_one_line():
    out = Terminal()
    progress = Progress([120, 120], out)
    progress.start("stage 1")
    progress.at(0.5, "50%, loss 1.0")
    progress.at(0.6, "60%")
    text = out.getvalue()
    assert "\r[1/2] stage 1: 50%, loss 1.0; about " in text
    assert text.rstrip().endswith("min left")
    assert "\n" not in text


def test_a_file_is_not_flooded():
    out = io.StringIO()
    progress = Progress([100], out)
    progress.start("stage 1")
    for step in range(100):
        progress.at(step / 100, f"{step}%")
    assert len(out.getvalue().splitlines()) <= 2

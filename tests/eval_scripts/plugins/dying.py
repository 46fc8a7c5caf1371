"""Kills its process, without a chance to clean up, in the middle of writing the fifth batch."""

import os
import signal

from minigpt4.inference.captioning import AnswerStore

written = 0
add = AnswerStore.add


def add_and_die(self, lines):
    global written
    written += 1
    if written == 5:
        with self.path.open("a") as file:
            file.write('{"image_id": "100", "capt')
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, lines)


AnswerStore.add = add_and_die

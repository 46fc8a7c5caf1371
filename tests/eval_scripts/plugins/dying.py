"""Kills its process, without a chance to clean up, in the middle of writing the fifth batch."""

import os
import signal

from minigpt4.evaluation.generate import Predictions

written = 0
add = Predictions.add


def add_and_die(self, batch, answers):
    global written
    written += 1
    if written == 5:
        with self._own.path.open("a") as file:
            file.write('{"batch": 0, "capt')
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, batch, answers)


Predictions.add = add_and_die

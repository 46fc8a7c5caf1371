"""After the fifth checkpoint the system lets this process write small files only."""

import resource

from minigpt4.runners import runner_base

save, saved = runner_base.save_checkpoint, []


def limited_save(path, content, card):
    if len(saved) == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    save(path, content, card)
    saved.append(path)


runner_base.save_checkpoint = limited_save

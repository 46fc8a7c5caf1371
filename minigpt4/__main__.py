"""The commands of an installed package, which are those of a checkout.

    minigpt4 quickstart                               # python -m minigpt4.mini.quickstart
    minigpt4 recipes                                  # copies train_configs, eval_configs and prompts to this folder
    minigpt4 train --cfg-path train_configs/FILE      # python train.py
    minigpt4 chat --cfg-path eval_configs/FILE        # python demo.py
    minigpt4 serve, caption, export, doctor, ...      # serve.py, scripts/caption.py, python -m minigpt4.export, ...
    minigpt4 evaluate NAME                            # eval_scripts/eval_NAME.py
On several GPUs: torchrun --nproc-per-node 4 -m minigpt4 train ...
"""

import argparse
import runpy
import shutil
import sys
from pathlib import Path

from minigpt4.common.utils import project_folder

SCRIPTS = {
    "train": "train.py",
    "chat": "demo.py",
    "serve": "serve.py",
    "prepare-flickr30k": "prepare_flickr30k.py",
    "caption": "scripts/caption.py",
    "ablate": "scripts/ablate.py",
    "curate": "scripts/curate.py",
    "make-instructions": "scripts/make_instructions.py",
    "download-weights": "scripts/download_weights.py",
}
MODULES = {
    "quickstart": "minigpt4.mini.quickstart",
    "export": "minigpt4.export",
    "merge": "minigpt4.merge",
    "doctor": "minigpt4.doctor",
}
RECIPES = ("train_configs", "eval_configs", "prompts")


def copy_recipes(target: Path) -> list[Path]:
    """Copy the recipes that are not there yet to `target`, and return the new files."""
    home, new = project_folder(), []
    for file in (file for name in RECIPES for file in sorted((home / name).rglob("*")) if file.is_file()):
        own = target / file.relative_to(home)
        if not own.exists():
            own.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, own)
            new.append(own)
    return new


def main() -> None:
    """Run a command as if it had been called by its file."""
    evaluations = {file.stem.removeprefix("eval_"): file for file in project_folder().glob("eval_scripts/eval_*.py")}
    parser = argparse.ArgumentParser(
        "minigpt4", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("command", choices=[*SCRIPTS, *MODULES, "evaluate", "recipes"])
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        parser.print_help()
        return
    command, arguments = parser.parse_args(sys.argv[1:2]).command, sys.argv[2:]
    if command == "evaluate":
        parser = argparse.ArgumentParser("minigpt4 evaluate", add_help=not arguments[1:])
        parser.add_argument("name", choices=sorted(evaluations))
        script, arguments = evaluations[parser.parse_args(arguments[:1]).name], arguments[1:]
    elif command in SCRIPTS:
        script = project_folder() / SCRIPTS[command]
    sys.argv = [sys.argv[0], *arguments]
    if command == "recipes":
        parser = argparse.ArgumentParser("minigpt4 recipes", description=copy_recipes.__doc__)
        parser.parse_args()
        sys.stdout.write("".join(f"{file}\n" for file in copy_recipes(Path())))
    elif command in MODULES:
        if command == "quickstart":
            copy_recipes(Path())
        runpy.run_module(MODULES[command], run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = str(script)
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()

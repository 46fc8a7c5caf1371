"""The wheel brings commands and recipes of the checkout along, in `minigpt4/home`; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HOME = ["train.py", "demo.py", "serve.py", "prepare_flickr30k.py", "eval_scripts", "scripts"]
HOME += ["train_configs", "eval_configs", "prompts"]


class BuildWithHome(build_py):
    """Copies `HOME`, unless the installation is editable, which uses the checkout itself."""

    def run(self) -> None:
        super().run()
        target = Path(self.build_lib, "minigpt4", "home")
        for path in [] if self.editable_mode else map(Path, HOME):
            if path.is_dir():
                shutil.copytree(path, target / path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / path)


setup(cmdclass={"build_py": BuildWithHome})

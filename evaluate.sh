#!/usr/bin/env bash
# Caption and score the test images with the pretrained checkpoint and every epoch of a run.
set -euo pipefail

usage() {
    cat >&2 <<'TEXT'
usage: bash evaluate.sh [RUN] [--cfg-path FILE] [--pretrained FILE|none] [--save-path DIR] [--nproc N] [-- ARGUMENTS]

  RUN            folder with checkpoint_0.pth, checkpoint_1.pth, ...; without it the newest run of
                 output/minigpt4_flickr_finetune                                            (or RUN=...)
  --cfg-path     YAML of the evaluation: eval_configs/minigpt4_flickr_eval.yaml             (or CFG_PATH=...)
  --pretrained   the checkpoint that the run began with: weights/prerained_minigpt4_7b.pth;
                 none: the epochs alone                                                     (or PRETRAINED=...)
  --save-path    folder for the results: RUN/evaluation                                     (or SAVE_PATH=...)
  --nproc        processes: one for each GPU, or 1                                          (or NPROC=...)
  ARGUMENTS      go to eval_scripts/eval_flickr30k.py, such as --reference-mode separate --options run.seed=7

Works from any folder: your paths are seen from where you are, those of the YAML from the repository. The same command
again goes on after a kill. PYTHON=... chooses the Python.
TEXT
    exit 2
}

fail() {
    echo "error: $*" >&2
    exit 2
}

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
run=${RUN:-} config=${CFG_PATH:-} pretrained=${PRETRAINED:-} save=${SAVE_PATH:-} processes=${NPROC:-}
more=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage ;;
        --) shift && more=("$@") && break ;;
        --cfg-path | --pretrained | --save-path | --save_path | --nproc)
            [ $# -ge 2 ] || usage
            case $1 in
                --cfg-path) config=$2 ;;
                --pretrained) pretrained=$2 ;;
                --nproc) processes=$2 ;;
                *) save=$2 ;;
            esac
            shift 2
            ;;
        -*) usage ;;
        *)
            [ -z "${run_given:-}" ] || usage
            run=$1 run_given=yes
            shift
            ;;
    esac
done

newest_run() {
    # Run folders are named by their time, so the last by name is the newest.
    find "$repository/output/minigpt4_flickr_finetune" -mindepth 2 -maxdepth 2 -name 'checkpoint_0.pth' 2>/dev/null |
        sort | tail -n 1 | xargs -r dirname || true
}

run=${run:-$(newest_run)}
[ -n "$run" ] || { echo "error: no run given, and none in output/minigpt4_flickr_finetune" >&2; usage; }
[ -d "$run" ] || fail "there is no folder $run"
run=$(realpath "$run")
config=$(realpath -m "${config:-$repository/eval_configs/minigpt4_flickr_eval.yaml}")
pretrained=${pretrained:-$repository/weights/prerained_minigpt4_7b.pth}
save=$(realpath -m "${save:-$run/evaluation}")
if [ -z "$processes" ]; then
    gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
    processes=$((gpus > 1 ? gpus : 1))
fi
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--nproc: $processes is not a number of processes"

checkpoints=()
if [ "$pretrained" != none ]; then
    [ -f "$pretrained" ] || fail "there is no file $pretrained; --pretrained names another one, or none"
    checkpoints+=("pretrained=$(realpath "$pretrained")")
fi
while IFS= read -r file; do
    checkpoints+=("$file")
done < <(find "$run" -maxdepth 1 -regextype posix-extended -regex '.*/checkpoint_[0-9]+\.pth' | sort -V)
[ "${#checkpoints[@]}" -gt 0 ] || fail "$run holds no checkpoint_N.pth"

cd "$repository"
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
launcher=()
[ "$processes" -eq 1 ] || launcher=(-m torch.distributed.run --standalone --nproc-per-node "$processes")
exec "$python" "${launcher[@]}" eval_scripts/eval_flickr30k.py --cfg-path "$config" \
    --ckpt "${checkpoints[@]}" --save_path "$save" "${more[@]}"

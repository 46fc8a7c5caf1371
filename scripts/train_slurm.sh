#!/usr/bin/env bash
# Train on Slurm, on one node or several, for longer than the time limit allows.
#   sbatch scripts/train_slurm.sh train_configs/minigpt4_stage1_pretrain.yaml
#   sbatch --nodes 2 --gres gpu:8 scripts/train_slurm.sh train_configs/minigpt4_stage1_pretrain.yaml run.seed=7
# Five minutes before the limit Slurm signals this script, this script signals the training, and the training writes a
# checkpoint and ends. Then the job goes back into the queue under the same number and goes on from that checkpoint.
# After a crash of a node Slurm requeues it, too, and it goes on from the newest whole checkpoint.
#
#SBATCH --job-name=minigpt4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@300
# B: only this script gets the signal. torchrun would die of it before its workers had saved.
set -uo pipefail

config=${1:?usage: sbatch scripts/train_slurm.sh CONFIG [KEY=VALUE ...]}
shift

stopping=no
forward_signal() {
    stopping=yes
    # The ranks agree on when to stop, so telling the workers of this node, the first of the job, is enough.
    # torchrun starts its workers as `python -u train.py`; its own command line has no -u.
    for pid in $(scontrol listpids "$SLURM_JOB_ID" | awk 'NR > 1 && $1 > 0 { print $1 }' | sort -u); do
        if tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q -- ' -u train\.py '; then
            kill -USR1 "$pid"
        fi
    done
}
trap forward_signal USR1

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# A folder of its own for this job: `auto` takes the newest checkpoint in it, and must not find another run's.
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first_node:${MASTER_PORT:-29500}" \
    train.py --cfg-path "$config" \
    --options "run.output_dir=output/slurm-$SLURM_JOB_ID" run.resume_ckpt_path=auto "$@" &
training=$!

# `wait` also returns when the signal arrives; the training is over when its process is gone.
while kill -0 "$training" 2>/dev/null; do
    wait "$training"
done
wait "$training"
status=$?

if [ "$stopping" = yes ]; then
    echo "Time limit: saved, and back into the queue (training ended with status $status)"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"

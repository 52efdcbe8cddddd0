#!/usr/bin/env bash
# Trains under Slurm, one task a GPU, and goes on in a new time slot until the run is finished:
#   sbatch launch/slurm.sh --recipe listops
#SBATCH --job-name=spion
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
# SIGUSR1 to every task this many seconds before the end: enough for one step and a checkpoint.
#SBATCH --signal=USR1@300
# Slurm may start the job again, after a node's failure or when asked to below.
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))  # two jobs on a node must not meet

# The ranks end by themselves when one is lost (3) or when they are asked to stop (75); srun must
# not cut them off before. Its own code is the highest of theirs.
srun --kill-on-bad-exit=0 python launch/train.py \
    --ds_config ds_configs/zero2.json --run_name "job-$SLURM_JOB_ID" --resume auto "$@"
code=$?

# 75: stopped by the signal, with a checkpoint: go on. 2: an error to mend. Else a rank was lost
# (3, or the number of what killed it) or the signal came before there was a checkpoint (138): go
# on, but not for ever.
restarts=${SLURM_RESTART_COUNT:-0}
if [ "$code" -eq 75 ] || { [ "$code" -gt 2 ] && [ "$restarts" -lt 5 ]; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

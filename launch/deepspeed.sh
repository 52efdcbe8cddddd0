#!/usr/bin/env bash
# Trains on the nodes of a hostfile with the deepspeed launcher, which reaches them by ssh:
#   launch/deepspeed.sh launch/hostfile --recipe listops
# The same paths must hold on every node. One line of the hostfile a node: NAME slots=GPUS.
set -euo pipefail
hostfile=$1
shift
# The first node of the file is where the ranks meet; it must be reachable by that name.
master=$(awk '!/^ *(#|$)/ {print $1; exit}' "$hostfile")
exec deepspeed --hostfile "$hostfile" --master_addr "$master" --master_port "${MASTER_PORT:-29500}" \
    launch/train.py --ds_config ds_configs/zero2.json --resume auto "$@"

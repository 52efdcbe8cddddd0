#!/usr/bin/env bash
# Trains on several nodes with torchrun; start it on every node with the same arguments:
#   launch/torchrun.sh HOST:29400 2 8 --recipe listops
# HOST: any of the nodes, where they meet; then the number of nodes, and ranks (GPUs) a node.
set -euo pipefail
endpoint=$1 nodes=$2 ranks=$3
shift 3
# A lost rank ends all; torchrun starts them again, and --resume auto goes on from the last
# checkpoint. JOB tells jobs that share an endpoint apart.
exec torchrun --nnodes "$nodes" --nproc_per_node "$ranks" --max_restarts "${RESTARTS:-3}" \
    --rdzv_backend c10d --rdzv_endpoint "$endpoint" --rdzv_id "${JOB:-spion}" \
    launch/train.py --ds_config ds_configs/zero2.json --resume auto "$@"

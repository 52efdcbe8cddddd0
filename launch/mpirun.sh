#!/usr/bin/env bash
# Trains with Open MPI's mpirun, on this node or on those of a hostfile (NAME slots=GPUS):
#   launch/mpirun.sh 16 --recipe listops
#   HOSTFILE=launch/hostfile launch/mpirun.sh 16 --recipe listops
# Needs the mpi extra (mpi4py): the ranks agree through it on an address and a port.
set -euo pipefail
ranks=$1
shift
# -x hands environment variables on to the other nodes; one thread pool a rank is enough.
exec mpirun -np "$ranks" ${HOSTFILE:+--hostfile "$HOSTFILE"} -x PATH -x OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" \
    python launch/train.py --ds_config ds_configs/zero2.json --resume auto "$@"

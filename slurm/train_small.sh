#!/usr/bin/env bash
# Train the small model: 1 node of 8 GPUs as it stands. See train_large.sh for what it does at its
# time limit, and how to stop it.
#
#   sbatch slurm/train_small.sh                                 # from the repository
#   sbatch --time=4:00:00 --account=NAME slurm/train_small.sh data.path=/data/openwebtext
#
#   SEDD_CONFIG    the run's YAML file (configs/runs/openwebtext_small.yaml)
#   SEDD_RUN_DIR   where metrics and checkpoints go (runs/small)
# and those of slurm/launch.sh.
#
#SBATCH --job-name=sedd-small
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
# shellcheck source=slurm/launch.sh
. "${SEDD_HOME:-$SLURM_SUBMIT_DIR}/slurm/launch.sh"
run_dir=${SEDD_RUN_DIR:-runs/small}
sedd_job "$run_dir/slurm" "$run_dir" train \
  "${SEDD_CONFIG:-configs/runs/openwebtext_small.yaml}" --run-dir "$run_dir" "$@"

#!/usr/bin/env bash
# Train the large model: 2 nodes of 8 GPUs as it stands.
#
#   sbatch slurm/train_large.sh                                  # from the repository
#   sbatch --nodes=4 --time=12:00:00 --account=NAME --partition=NAME slurm/train_large.sh \
#     data.path=/data/openwebtext training.steps=100000         # section.key=value: changes
#   SEDD_CONFIG=configs/runs/openwebtext_xl.yaml SEDD_RUN_DIR=runs/xl \
#     sbatch --nodes=4 slurm/train_large.sh                      # 1.3B parameters
#
# Flags of sbatch stand before the script and win over those below. The job ends before its time
# limit, saves, and requeues itself until the run is finished. Stop it for good with `scancel JOB`;
# `scancel --signal=USR1 JOB` saves and requeues.
#
#   SEDD_CONFIG    the run's YAML file (configs/runs/openwebtext_large.yaml)
#   SEDD_RUN_DIR   where metrics and checkpoints go, on a filesystem of all nodes (runs/large)
# and those of slurm/launch.sh.
#
#SBATCH --job-name=sedd-large
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
# shellcheck source=slurm/launch.sh
. "${SEDD_HOME:-$SLURM_SUBMIT_DIR}/slurm/launch.sh"
run_dir=${SEDD_RUN_DIR:-runs/large}
sedd_job "$run_dir/slurm" "$run_dir" train \
  "${SEDD_CONFIG:-configs/runs/openwebtext_large.yaml}" --run-dir "$run_dir" "$@"

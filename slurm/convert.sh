#!/usr/bin/env bash
# Convert a checkpoint into another format, in the memory of one process.
#
#   SEDD_CHECKPOINT=runs/large SEDD_OUTPUT=exported sbatch slurm/convert.sh \
#     --from native --to sedd-hf
#
# What stands after the script goes to `sedd-scale convert_ckpt`.
#
#   SEDD_CHECKPOINT   what to convert (runs/large)
#   SEDD_OUTPUT       where to (exported)
# and those of slurm/launch.sh.
#
#SBATCH --job-name=sedd-convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=1:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
# shellcheck source=slurm/launch.sh
. "${SEDD_HOME:-$SLURM_SUBMIT_DIR}/slurm/launch.sh"
output=${SEDD_OUTPUT:-exported}
SEDD_DONE=$output
sedd_job "$output.slurm" "$output" convert_ckpt convert "$@" \
  "${SEDD_CHECKPOINT:-runs/large}" "$output"

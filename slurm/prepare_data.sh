#!/usr/bin/env bash
# Turn text into a dataset, on the CPUs of one node. Cut short, it goes on where it was.
#
#   SEDD_OUTPUT=data/openwebtext sbatch --cpus-per-task=64 slurm/prepare_data.sh \
#     --input 'openwebtext/*.jsonl.xz' --tokenizer gpt2 --tokenizer-path GPT2_DIR \
#     --block-length 1024
#
# What stands after the script goes to `sedd-scale prepare_data`.
#
#   SEDD_OUTPUT   the dataset's directory (data/openwebtext)
# and those of slurm/launch.sh.
#
#SBATCH --job-name=sedd-prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
# Its processes are one a CPU, with one thread each.
export SEDD_THREADS=1
# shellcheck source=slurm/launch.sh
. "${SEDD_HOME:-$SLURM_SUBMIT_DIR}/slurm/launch.sh"
output=${SEDD_OUTPUT:-data/openwebtext}
sedd_job "$output.slurm" "$output" prepare_data "$@" --output "$output" \
  --processes "$SLURM_CPUS_PER_TASK"

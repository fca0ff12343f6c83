#!/usr/bin/env bash
# Draw samples on one node, on several, or as an array of jobs that share the prompts. All three
# write the same file.
#
#   SEDD_CHECKPOINT=runs/large SEDD_OUTPUT=samples.jsonl \
#     sbatch slurm/generate.sh --prompts prompts.jsonl --steps 256      # one node
#   sbatch --nodes=4 slurm/generate.sh --num-samples 10000              # one job of four nodes
#   sbatch --array=0-7 slurm/generate.sh --prompts prompts.jsonl        # eight jobs of one node
#
# What stands after the script goes to `sedd-scale generate`. A job that was cut short resumes after
# the batches that are done. In an array each job draws every n-th batch, or nothing, and
# the last one to end joins the files; the report over all samples is written by the other two forms
# only.
#
#   SEDD_CHECKPOINT   a run directory or checkpoint (runs/large)
#   SEDD_OUTPUT       the samples, on a filesystem of all nodes (samples.jsonl)
# and those of slurm/launch.sh.
#
#SBATCH --job-name=sedd-generate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=4:00:00
#SBATCH --signal=USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
# shellcheck source=slurm/launch.sh
. "${SEDD_HOME:-$SLURM_SUBMIT_DIR}/slurm/launch.sh"
output=${SEDD_OUTPUT:-samples.jsonl}
words=(--checkpoint "${SEDD_CHECKPOINT:-runs/large}")
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  # shellcheck disable=SC2153
  ((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1 == SLURM_ARRAY_TASK_COUNT)) ||
    sedd_exit 2 "an array with gaps has parts that nobody draws: give --array=0-N"
  if [[ -e $output ]]; then
    ((${SLURM_RESTART_COUNT:-0} == 0)) || exit 0 # joined, and then started again
    sedd_exit 2 "$output exists: give another SEDD_OUTPUT"
  fi
  shard=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
  words+=(--shard "$shard/$SLURM_ARRAY_TASK_COUNT")
  whole=$output
  name=${whole##*/}
  [[ $name == *.* ]] && suffix=.${name##*.} || suffix=
  output=${whole%"$suffix"}.shard-$shard-of-$SLURM_ARRAY_TASK_COUNT$suffix
  sedd_after() {
    "$SEDD_PYTHON" -m sedd_scale.cluster.merge_samples "$whole" --shards "$SLURM_ARRAY_TASK_COUNT"
  }
fi
SEDD_DONE=$output
sedd_job "${SEDD_OUTPUT:-samples.jsonl}.slurm" "$output" generate \
  "${words[@]}" --output "$output" "$@"

#!/usr/bin/env bash
# Caption a large input with a SLURM array: every task does its own parts, all in one folder.
#   sbatch examples/slurm.sh rows.parquet captions/
# The same again does what is missing, once all tasks have ended, with as many as you like: sbatch --array=1-4 ...
# While others work, `scontrol requeue JOB_3` runs a task again that was stopped or lost. Parts that are there stay.
#SBATCH --job-name=idefics
#SBATCH --array=1-16
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
input=${1:-examples/images} output=${2:-captions/}

idefics caption "$input" -m "${IDEFICS_MODEL:-demo}" -o "$output" --format jsonl --shard auto

# When all tasks have ended: idefics merge captions/ -o captions.jsonl

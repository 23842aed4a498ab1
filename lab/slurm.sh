#!/bin/sh
# One line of a list of commands for each task of a Slurm array. Where every node sees the same folders:
#
#   python -m lab.reproduce --list > todo.txt && sbatch --array=1-$(wc -l < todo.txt) lab/slurm.sh todo.txt
#
# Again once the array is done, until the list is empty: encoders, then tuning, then all runs. What was killed
# goes on, what is done stays. On nodes with GPUs add --gpus-per-task=1.
#SBATCH --job-name=lpft
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --output=slurm-%A-%a.txt
sed -n "${SLURM_ARRAY_TASK_ID}p" "$1" | sh

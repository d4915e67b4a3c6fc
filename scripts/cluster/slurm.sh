#!/usr/bin/env bash
# Trains on several machines under SLURM: sbatch scripts/cluster/slurm.sh configs/mnist.toml
# Sent again after a machine was lost, it goes on from the last checkpoint of the run of that NAME,
# by that run's own configuration. NAME is the configuration's unless it is set: NAME=mine sbatch ...
#SBATCH --job-name=trainer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
set -euo pipefail
config=${1:-configs/mnist.toml}
name=${NAME:-$(basename "$config" .toml)}

# The folder runs/ must be one that every machine sees: the chief writes it, all read it to go on.
# This script decides once, before any worker starts; so they all do the same.
if compgen -G "runs/*Z-$name/summary.json" >/dev/null; then
    echo "$name is finished"
elif compgen -G "runs/*Z-$name/config.toml" >/dev/null; then
    srun --kill-on-bad-exit=0 .venv/bin/trainer fit --resume "$name"
else
    srun --kill-on-bad-exit=0 .venv/bin/trainer fit "$config" --device all --name "$name"
fi

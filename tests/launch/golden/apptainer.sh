#!/bin/bash

# Parameters
#SBATCH --chdir=/home/me/study
#SBATCH --comment=maehpc:TOKEN
#SBATCH --error=/shared/results/study/jobs/0001-pretrain/logs/%j_0_log.err
#SBATCH --gpus-per-node=4
#SBATCH --job-name=maehpc-study-pretrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/shared/results/study/jobs/0001-pretrain/logs/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60

# setup
export PYTHONPATH=/shared/results/.code/0123456789abcdef${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
trap : TERM USR1 USR2  # what is meant for the ranks must not end this shell before its last line

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/results/study/jobs/0001-pretrain/logs/%j_%t_log.out --error /shared/results/study/jobs/0001-pretrain/logs/%j_%t_log.err --open-mode=append --kill-on-bad-exit=1 apptainer exec --nv --bind /home/me/study:/home/me/study --bind /shared/results:/shared/results --bind /data:/data:ro --no-home /shared/images/maehpc.sif env PYTHONPATH=/shared/results/.code/0123456789abcdef PYTHONSAFEPATH=1 python3 -u -m maehpc.launch.worker /shared/results/study/jobs/0001-pretrain


# teardown
code=$?
trap '' TERM USR1 USR2  # the last line takes signals when it is ready to
exec /usr/bin/python3 -m maehpc.launch.after /shared/results/study/jobs/0001-pretrain "$code"

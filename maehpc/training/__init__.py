"""Training: the loop and its exact resume, MAE pretraining, finetuning, checkpoints, logs, scores."""

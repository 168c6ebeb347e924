"""Training: knows torch and never Optuna; takes a TrialConfig, gives EpochResults."""

"""The report of a study: its page, its figures, and the same figures in optuna-dashboard."""

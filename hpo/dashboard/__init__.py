"""optuna-dashboard, read-only, behind a login."""

"""The search space, samplers and pruners, and the study as they see it."""

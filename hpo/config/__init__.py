"""The study file: what a user asked for, checked before anything is trained."""

"""Loggers: a study's trials as runs in TensorBoard, MLflow and Weights & Biases."""

"""Range tests of the learning rate, and what `lr = "auto"` becomes."""

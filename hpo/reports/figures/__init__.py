"""One module a figure, each with a text that says the same."""

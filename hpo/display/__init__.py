"""What people look at while a study trains, and its answer: in a terminal, in a notebook, in a log."""

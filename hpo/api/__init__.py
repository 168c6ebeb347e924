"""The public functions: train studies, read them, write files of them, manage stores."""

"""The sections of a GPU day: each module has `run(section)`, which runs in a process of its own."""

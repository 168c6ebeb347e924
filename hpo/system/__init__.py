"""This machine: its devices, processes and files, and where a result came from."""

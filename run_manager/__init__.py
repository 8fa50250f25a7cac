"""Behind manage_runs.py: list, show, delete and restore runs. Imports no torch."""

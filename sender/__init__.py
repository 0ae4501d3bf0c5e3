"""The rooms of send_job.py, which sends without them, too."""

"""The rooms of parse_job.py: a job's way through one instance."""

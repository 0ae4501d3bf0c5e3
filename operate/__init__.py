"""The rooms of fleet.py: how a fleet stands, its dead jobs, the report of jobs that have ended."""

"""`raypipe JOB …`, the same as `python jobs/JOB.py …` under `ray job submit`."""

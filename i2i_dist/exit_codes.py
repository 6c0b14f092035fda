"""The exit codes of a run, for people, launchers and schedulers alike."""

DONE, FAILED, MISCONFIGURED, STOPPED = 0, 1, 2, 75  # 75: stopped early, and can be resumed

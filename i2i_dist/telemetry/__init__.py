"""What a run tells the outside: console lines, a log of statistics, Prometheus metrics, sheets of samples."""

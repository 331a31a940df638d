"""What a run tells: metrics, figures with intervals, tables, and the files they go to."""

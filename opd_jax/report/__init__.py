"""What a run reports: metrics, figures with intervals, tables, and the files that hold them."""

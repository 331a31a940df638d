"""Reports of a run: metrics, figures with intervals, tables, and the files that hold them."""

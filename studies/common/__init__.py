"""What studies share: rows of a table on disk, and asking under a progress bar."""

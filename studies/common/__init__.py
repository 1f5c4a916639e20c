"""What studies share: methods as they are asked, asking under a progress bar, rows on disk and tables of them."""

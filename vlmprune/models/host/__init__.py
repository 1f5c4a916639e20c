"""What transformers calls things, keeps and expects: what may change with its releases."""

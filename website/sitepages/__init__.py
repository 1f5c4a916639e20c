"""What the docs site shows beside the Markdown of the repository: pages made from the registry, the ops and the docstrings."""

"""What several test files import; pytest finds it through ``pythonpath`` in pyproject.toml."""

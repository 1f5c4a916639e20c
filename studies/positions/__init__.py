"""What it costs to let the kept tokens stand at 0, 1, 2, ... instead of where they were."""

"""Accuracy of policies at equal cost: questions in, one scored answer at a time, then tables, plots and a report."""

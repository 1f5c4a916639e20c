"""Looking at pruning: one question asked with several policies, what each kept as pictures, all methods side by side."""

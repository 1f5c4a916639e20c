"""The page of ``vlmprune show``: put in a picture, ask, and see side by side what each method drops and answers."""

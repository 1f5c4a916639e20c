"""Training of what can be learned: the captioner and the selector of ACCM."""

"""Training of a small LLaVA on the synthetic world: the model, packed batches, the losses, the loop."""

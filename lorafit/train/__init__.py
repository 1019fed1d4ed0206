"""The training step: loss, optimiser, and a loop that yields steps and does no input or output."""

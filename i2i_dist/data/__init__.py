"""Data: sources of images, their order, and the micro-batches that training reads."""

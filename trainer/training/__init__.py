"""Training: batches that reach the device, the step, the loop around it, and what it keeps."""

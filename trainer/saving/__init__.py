"""The life of a model after training: save, load, export, verify."""

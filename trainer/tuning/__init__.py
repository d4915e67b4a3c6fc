"""Hyperparameter search: keras-tuner chooses the values, the training loop of this package runs."""

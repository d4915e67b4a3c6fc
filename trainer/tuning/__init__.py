"""The search for better settings: keras-tuner chooses, this project's own loop trains."""

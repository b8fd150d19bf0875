"""Things to train: models, their data and their settings."""

"""Things that a user trains: models, their data and their settings."""

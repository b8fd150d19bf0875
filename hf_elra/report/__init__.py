"""Reads the files of a finished or running run and shows them: tables and model cards. Trains nothing."""

"""Reads the files of a finished or running run and shows them: a page, text, tables, model cards. Trains nothing."""

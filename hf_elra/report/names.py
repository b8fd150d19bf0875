"""Names of the files of a run, which whoever writes them and whoever reads them agree on. Imports nothing."""

SETTINGS, METRICS, SAMPLE, LOG = "settings.json", "metrics.json", "sample.txt", "log_history.json"
"""What a recipe of ours leaves in its folder."""
LOG_FILE = "elra_log.jsonl"
"""The log history of any Trainer with the mixin, a JSON line an entry, as it goes; its first line says what was run."""
STATE = "trainer_state.json"
"""The Trainer's own, in every checkpoint; it holds the log history."""

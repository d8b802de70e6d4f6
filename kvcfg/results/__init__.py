"""What was measured: one row an experiment, kept in a JSONL file, shown as a table."""

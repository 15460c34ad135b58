"""The prompts of an offline run: read from JSONL files, answered in JSONL files; no models."""

"""What a run tells: logs, pictures, summaries, tables."""

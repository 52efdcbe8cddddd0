"""Processes: launchers and process groups, agreement between ranks, signs of life, stopping."""

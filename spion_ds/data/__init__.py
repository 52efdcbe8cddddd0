"""What is trained on: tasks with their configurations, vocabularies and losses, and caches."""

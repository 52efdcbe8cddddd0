"""A run's configuration: sections, recipes, DeepSpeed's JSON."""

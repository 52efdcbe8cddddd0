"""Recipes: one YAML file a task and track."""

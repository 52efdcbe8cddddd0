"""Dense to sparse for any model and any loop."""

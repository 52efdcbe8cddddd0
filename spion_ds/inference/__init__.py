"""A trained model at work: test, compare, predict, export."""

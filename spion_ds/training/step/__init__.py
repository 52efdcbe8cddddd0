"""What makes up one training step."""

"""Pathfinder and Path-X: whether two dots are joined by a path."""

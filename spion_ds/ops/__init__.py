"""Operators under the names that older code knows them by."""

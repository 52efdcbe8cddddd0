"""Thin adapters to other people's loops, one file a library: they translate, switching/ decides."""

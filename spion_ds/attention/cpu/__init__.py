"""The C++ operators: block-sparse attention and attention maps on CPUs."""

"""One method a file, its variants in ``CONTESTANTS``; a file more is a method more."""

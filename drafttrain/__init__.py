"""Training of the small models that make large language models decode faster without changing their output."""

__version__ = "0.1.0"

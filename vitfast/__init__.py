"""vitfast: a fast Vision Transformer for PyTorch."""

__version__ = "0.1.0"

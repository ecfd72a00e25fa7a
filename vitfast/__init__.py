"""vitfast: a fast Vision Transformer for PyTorch."""

from vitfast.models.registry import create_model, list_models

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "list_models"]

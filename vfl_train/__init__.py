"""Find the vision function layers of a vision-language model, select data by them, train LoRA on them."""

__version__ = "0.1.0"

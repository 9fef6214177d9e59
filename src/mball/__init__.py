"""MBALL: serve more language models than your GPUs can hold."""

__version__ = "0.1.0"

"""Sparse-attention Transformers for the Long Range Arena: model, attention, transition, training, evaluation.

Importing the package imports nothing heavy; `python -m sat --help` shows the command line.
"""

__version__ = "0.1.0"

"""Sparse-attention Transformers for the Long Range Arena: model, attention, transition, training, evaluation.

Importing the package imports nothing heavy; `python -m sat --help` shows the command line.
"""

__version__ = "0.1.0"


def load(folder, device=None):
    """A finished run, ready to predict: `sat.load("results/demo/models/text/sat").predict(["a fine film"])`.

    folder: below results/<run>/models/ or results/<run>/runs/; device: "cpu", or None for the best one there is.
    Returns a sat.predict.Predictor. Raises sat.data.DataError when there is no finished run.
    """
    from sat.predict import Predictor

    return Predictor(folder, device)

"""tune_steel: hyperparameter search for small tabular classifiers on Ray Tune and Optuna."""

__version__ = "0.1.0"

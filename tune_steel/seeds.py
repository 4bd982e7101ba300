"""One seed in, every other seed derived from it."""

import hashlib


def derive(*parts: int | str) -> int:
    """A seed from a seed and the names of what it is for: `derive(7, "trial", 12)`.

    The same parts give the same seed on every machine, and seeds of different parts are
    independent for all practical purposes (SHA-256).

    Returns:
        An integer in [0, 2**32), the range that NumPy and scikit-learn accept.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def replica_seeds(trial_seed: int, replicas: int) -> list[int]:
    """The seed of each replica of a trial."""
    return [derive(trial_seed, "replica", r) for r in range(replicas)]

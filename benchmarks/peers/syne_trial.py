"""A trial of Syne Tune's local backend: its training script, a process of its own."""

from __future__ import annotations

from argparse import ArgumentParser

from syne_tune import Reporter
from syne_tune.utils import add_config_json_to_argparse, load_config_json

from benchmarks.peers.training import Data, epochs


def main() -> None:
    parser = ArgumentParser()
    add_config_json_to_argparse(parser)
    arguments, _ = parser.parse_known_args()
    config = load_config_json(vars(arguments))
    report = Reporter()
    data = Data.read(config["data"])
    for epoch in epochs(config, data, config["max_epochs"], config["seed"]):
        report(epoch=epoch.number, val_loss=epoch.val_loss)


if __name__ == "__main__":
    main()

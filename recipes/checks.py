"""Measure FVU and L0 of a preset's SAEs, which every opening compares with: `python -m recipes.checks NAME [SAE_SET]`."""

import logging
import sys

from steerkit.models.check import record
from steerkit.models.load import open, preset


def main(argv: list[str]) -> None:
    """Write the `expect` line of one SAE set into data/models.yaml."""
    if len(argv) not in (1, 2):
        raise SystemExit("usage: python -m recipes.checks NAME [SAE_SET]")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    spec, set_name = preset(argv[0]), (argv[1:] or [None])[0]
    record(open(spec, layers=spec.sae_set(set_name).layers, check=False, saes=set_name), set_name)


if __name__ == "__main__":
    main(sys.argv[1:])

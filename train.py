"""Train, validate, test or predict: `python train.py fit --config demo` is the same program as `grit fit --config demo`."""

from grit_lightning.cli import main

if __name__ == "__main__":
    main()

"""The folder of a run: which files it holds and how they are written."""

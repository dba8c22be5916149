"""Held-out accuracy of digit classifiers, with ONNX Runtime and NumPy only.

python examples/digits/evaluate.py MODEL...
"""

from __future__ import annotations

import argparse
import os
import pathlib

import numpy as np
import onnxruntime as ort

HELDOUT = pathlib.Path(__file__).with_name("heldout.npz")


def accuracy(model: str | os.PathLike[str] | bytes) -> float:
    """The share of the held-out images that a model classifies correctly.

    Args:
        model: the path of an ONNX file, or its content.

    Returns:
        A fraction in [0, 1].
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    source = model if isinstance(model, bytes) else os.fspath(model)
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    with np.load(HELDOUT) as heldout:
        (logits,) = session.run(["logits"], {"input": heldout["input"]})
        return float(np.mean(logits.argmax(axis=1) == heldout["label"]))


def main() -> None:
    """Prints the accuracy of every model on the command line."""
    parser = argparse.ArgumentParser(description="Held-out accuracy of digit classifiers.")
    parser.add_argument("models", metavar="MODEL", nargs="+", help="an ONNX file")
    for path in parser.parse_args().models:
        print(f"{accuracy(path):7.2%}  {path}")


if __name__ == "__main__":
    main()

"""Ask one sentence of many videos, in batches.

    python examples/ground_many.py drn.onnx DATA "person opens the door"

Prints the best moment of every test video, most certain first. DRN is trained on videos in which the sentence happens:
its score orders the moments of one video well, and says less about which video is the right one:
`runtime.rank` measures that, and `train --negatives` teaches it.
"""

from __future__ import annotations

import sys

from runtime import Grounder
from runtime.datasets.dataset import DataSet


def main(model: str, data: str, sentence: str) -> None:
    grounder = Grounder.load(model)
    data_set = DataSet(data)
    names = sorted({annotation.video for annotation in data_set.annotations("test")})
    answers = grounder.ground_batch([(data_set.video(name), sentence) for name in names], top_k=1)
    # A model that carries a threshold finds nothing in some.
    found = [(name, moments[0]) for name, moments in zip(names, answers, strict=True) if moments]
    for name, best in sorted(found, key=lambda pair: -pair[1].score):
        print(f"{name}  {best.start:6.1f} s to {best.end:6.1f} s  {best.score:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

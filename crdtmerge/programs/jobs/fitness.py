"""How good a model is on data: the number that a search maximises.

    accuracy        the share of examples whose largest logit is the label's
    loss            minus the mean cross-entropy of the labels
    squared_error   minus the mean of (output - label)^2
    output          the mean of what the program gives out: a program that scores itself

Over several tasks the mean of the tasks' numbers.
"""

from __future__ import annotations

import torch

from crdtmerge.errors import NeedsError, UsageError
from crdtmerge.programs.context import Context, Result, labels_of
from crdtmerge.programs.exported import Batches

METRICS = ("accuracy", "loss", "squared_error", "output")

BATCH = 256


def run(context: Context) -> Result:
    """``fitness``: {"score": a float in hexadecimal}, NaN where the model gives NaN."""
    metric = context.params["metric"]
    if metric not in METRICS:
        raise UsageError(f"metric = {metric!a}: must be one of {', '.join(METRICS)}.")
    tensors = context.program.fitted({**context.rest, **context.groups["model"]}, "the model")
    scores, done, examples = [], 0, sum(data.size for data in context.data.values())
    with torch.no_grad():
        for data in context.data.values():
            total = 0.0
            for part in data.parts(BATCH):
                total += _summed(metric, context.program(tensors, part.inputs).double(), part)
                done += part.size
                context.progress(done, examples)
            scores.append(total / data.size)
    score = 0.0
    for one in scores:
        score += one
    return Result({"score": (score / len(scores)).hex()}, {})


def _summed(metric: str, out: torch.Tensor, part: Batches) -> float:
    """A metric's sum over the examples of a batch."""
    if metric == "output":
        return float(out.mean()) * part.size
    if metric == "squared_error":
        if part.labels is None or part.labels.numel() != out.numel():
            raise NeedsError("the data needs 'labels': one number for each number that the program gives out.")
        error = out.reshape(part.size, -1) - part.labels.double().reshape(part.size, -1)
        return -float((error * error).mean(dim=1).sum())
    labels = labels_of(part)
    if metric == "accuracy":
        known = torch.where(torch.isnan(out).any(-1), -1, out.argmax(-1))
        return float((known == labels).sum())
    return -float(torch.nn.functional.cross_entropy(out, labels, reduction="sum"))

"""What a change of the model costs, by the pixels of its videos: two models play the same prompts from the same noise, stream by stream."""

import numpy as np

from longlive_jax.config import require
from longlive_jax.data.toyeval import FOUR, take, verdicts
from longlive_jax.data.toyfigures import Row, loss_bound

ASPECTS = (*FOUR, "four", "all")


def adherence_of(seen):
    """Aspect -> percentage of the chunks read that show what was asked, ``[N]`` streams each."""
    read = [verdicts(seen.readings[k], seen.scenes, k) for k in sorted(seen.readings)]
    return {key: 100 * np.mean([chunk[key] for chunk in read], 0) for key in ASPECTS}


def motion_of(seen):
    """Mean way of the objects' centres, px a frame, ``[N]``; NaN where a chunk shows another number of objects than asked."""
    out = np.full(len(seen.scenes), np.nan)
    for i, scene in enumerate(seen.scenes):
        readings = [take(seen.readings[k], i) for k in sorted(seen.readings)]
        count = int(scene.attributes["objects"][0])
        if all(int(r.objects) == count for r in readings):
            out[i] = np.mean([np.hypot(*np.diff(r.centre[:, :count], axis=0).T).mean() for r in readings])
    return out


def paired_rows(group, before, after):
    """What is lost from ``before`` to ``after``, two ``Seen`` of the same scenes: Rows of points of adherence and per cent of mean motion.

    ``value`` is the mean loss, negative for a gain; ``high`` its upper 95 % bound. Motion counts streams that both models show with the right
    number of objects. Raises ``ConfigError`` where the scenes differ.
    """
    same = [a.captions == b.captions for a, b in zip(before.scenes, after.scenes)]
    require(len(before.scenes) == len(after.scenes) and all(same), "the two models were shown different scenes; pair those of the same prompts")
    n, chunks = len(before.scenes), len(before.readings)
    old, new = adherence_of(before), adherence_of(after)
    losses = {key: loss_bound(old[key], new[key], chunks) for key in ASPECTS}
    rows = [Row(group, f"{key}, loss", loss, "points", high=upper, n=n, readings=n * chunks) for key, (loss, upper) in losses.items()]
    motions = np.stack([motion_of(before), motion_of(after)])
    motions = motions[:, np.isfinite(motions).all(0)]
    if motions.size and motions[0].mean() > 0:
        loss, upper = loss_bound(*(100 * motions / motions[0].mean()))
        rows.append(Row(group, "mean motion, loss", loss, "%", high=upper, n=motions.shape[1], readings=motions.shape[1] * chunks))
    return rows


__all__ = ["ASPECTS", "adherence_of", "motion_of", "paired_rows"]

"""Time of building weights, as a share of the loss that they weight.

    python benchmarks/builders.py

The loss is measured on fewer rows and scaled up in proportion: its three products take time linear in
the rows. The builders are measured at full size, 16384 tokens and four heads, in turns with it.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from measure import Job, chip, interleaved, medians, versions, write_csv
from peers import Sizes, make_inputs

import wmtp


TARGET = 0.02


def builders(batch: int, seq: int, heads: int) -> dict[str, Job]:
    """Every kind of rule at least once; a tenth of the entries is not valid."""
    rng = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=rng)
    ce = random(batch, seq, heads).exp()
    valid = torch.rand(batch, seq, heads, generator=rng) > 0.1
    token_valid = valid[..., 0]
    reference, values, raw = random(batch, seq).exp(), random(batch, seq), ce.exp()
    spans = torch.arange(seq).div(64, rounding_mode="floor").expand(batch, -1)
    first, second = wmtp.normalize_weights(ce, valid), wmtp.softmax_weights(ce, valid)
    critic = partial(wmtp.critic_delta_weights, values, token_valid)
    return {
        "rho1_weights, top-k": partial(wmtp.rho1_weights, ce, valid, reference),
        "rho1_weights, top-k by sequence": partial(
            wmtp.rho1_weights, ce, valid, reference, scope="sequence"
        ),
        "rho1_weights, softmax": partial(wmtp.rho1_weights, ce, valid, reference, mode="softmax"),
        "dft_weights": partial(wmtp.dft_weights, ce, valid),
        "critic_delta_weights": critic,
        "critic_delta_weights, lam 0.95, documents": partial(critic, lam=0.95, segment_ids=spans),
        "normalize_weights": partial(wmtp.normalize_weights, raw, valid),
        "normalize_weights, clip": partial(wmtp.normalize_weights, raw, valid, clip=(0.1, 3.0)),
        "normalize_weights, clip, min_ess": partial(
            wmtp.normalize_weights, raw, valid, clip=(0.1, 10.0), min_ess=0.5
        ),
        "combine_weights, mixture": partial(wmtp.combine_weights, [first, second], valid),
        "combine_weights, product": partial(
            wmtp.combine_weights, [first, second], valid, mode="product"
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for size, default in zip(Sizes._fields, (8, 2048, 4, 512, 32000), strict=True):
        parser.add_argument(f"--{size}", type=int, default=default)
    parser.add_argument("--loss-rows", type=int, default=2048, help="predictions of the timed loss")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    full = Sizes(*(getattr(options, name) for name in Sizes._fields))
    part = Sizes(1, options.loss_rows // full.heads, *full[2:])
    x = make_inputs(part, torch.float32)

    def loss() -> None:
        wmtp.linear_weighted_mtp_loss(x.hidden, x.unembedding, x.targets, x.weights).backward()
        x.hidden.grad = x.unembedding.grad = None

    jobs: dict[str, Job] = {**builders(full.batch, full.seq, full.heads), "loss": loss}
    seconds = medians(interleaved(jobs, options.rounds))
    scale = full.predictions / part.predictions
    whole = seconds.pop("loss") * scale
    used = {**versions([]), "wmtp": wmtp.__version__, "chip": chip(), "threads": options.threads}
    print(", ".join(f"{name} {value}" for name, value in used.items()))
    print(
        f"{full.batch * full.seq} tokens, {full.heads} heads; loss fp32, dim {full.dim}, vocab "
        f"{full.vocab}: {whole:.2f} s, measured on {part.predictions} rows and scaled by {scale:g}"
    )
    rows: list[dict[str, object]] = []
    for name, value in seconds.items():
        share = value / whole
        verdict = "" if share <= TARGET else "   MISSED"
        print(f"  {name:42} {1e3 * value:8.2f} ms   {share:7.3%} of the loss{verdict}")
        sizes = {**full._asdict(), "loss_rows": part.predictions}
        rows.append({**used, **sizes, "builder": name, "seconds": value, "of_loss": share})
    worst = max(value / whole for value in seconds.values())
    print(f"target: each at most {TARGET:.0%} of the loss; measured: at most {worst:.3%}")
    if options.csv:
        write_csv(options.csv, rows)
    sys.exit(worst > TARGET)


if __name__ == "__main__":
    main()

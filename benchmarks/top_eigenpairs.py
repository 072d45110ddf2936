"""Every layer's exact leading eigenpairs of a trained F-200^2 on all of MNIST, with residuals.

    python benchmarks/top_eigenpairs.py [--checkpoint FILE] [--pairs 200] [--json FILE]

Without a checkpoint the network is trained first (10 epochs of plain SGD); its time is not counted.
Processor time adds up over threads; on a machine that does something else it is the steadier
number.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import torch
from torch import nn

import hesskern as hk
from hesskern.apps.bench.machine import facts
from hesskern.zoo import data, models, training


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights of an F-200^2.")
@click.option("--pairs", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--tol", type=float, default=1e-4, show_default=True, help="Bound on residuals.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many samples.")
@click.option("--root", type=click.Path(path_type=Path), help="Folder with MNIST's files.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    checkpoint: Path | None,
    pairs: int,
    tol: float,
    limit: int | None,
    root: Path | None,
    json_file: Path | None,
) -> None:
    """Times the pass over the data and each layer's eigenpairs; residuals are computed anew."""
    samples = data.load("mnist", root, limit=limit)
    model = models.build("f200x2", samples.input_shape, samples.classes)
    if checkpoint is not None:
        models.load_checkpoint(model, checkpoint)
    else:
        training.train(model, samples, training.recipe_for("quick", "mnist"), progress=True)
    loss, accuracy = training.evaluate(model, samples)
    machine = facts(0)
    click.echo(
        f"F-200^2, {len(samples):,} samples, training loss {loss:.4f}, accuracy {accuracy:.4f}; "
        f"{torch.get_num_threads()} threads"
    )
    started, used = time.perf_counter(), time.process_time()
    hessians = hk.layer_hessians(model, samples.batches(512), nn.CrossEntropyLoss())
    rows = [
        {
            "what": "pass over the data",
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - used,
        }
    ]
    click.echo("{what}: {seconds:.1f} s, {cpu_seconds:.1f} s of processor time".format(**rows[0]))
    for name, H in hessians.items():
        begun, used = time.perf_counter(), time.process_time()
        found = hk.eigsh(H, min(pairs, H.shape[0]), tol=tol)
        seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - used
        # By products of its own, not by the solver's word.
        gaps = H @ found.vectors - found.vectors * found.values
        residual = float(gaps.norm(dim=0).max() / found.values[0])
        gram = found.vectors.T @ found.vectors
        skew = float((gram - torch.eye(len(gram))).abs().max())
        rows.append(
            {
                "what": f"{len(found.values)} eigenpairs of {name}",
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "products": found.matvecs,
                "converged": found.converged,
                "residual": residual,
                "orthogonality": skew,
                "largest": float(found.values[0]),
                "smallest": float(found.values[-1]),
            }
        )
        click.echo(
            f"{rows[-1]['what']} {list(H.layer_shape)}: {seconds:.1f} s ({cpu_seconds:.1f} s of "
            f"processor time), {found.matvecs} products, "
            f"worst residual {residual:.1e}, ‖VᵀV − I‖_max {skew:.1e}, "
            f"eigenvalues {found.values[0]:.4g} to {found.values[-1]:.4g}"
        )
    total = sum(float(row["seconds"]) for row in rows)
    cpu = sum(float(row["cpu_seconds"]) for row in rows)
    click.echo(f"all: {total:.1f} s, {cpu:.1f} s of processor time")
    if json_file is not None:
        result = {"machine": machine, "loss": loss, "rows": rows, "seconds": total}
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
